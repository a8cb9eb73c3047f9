"""How examples become what a model reads: causal and sequence-to-sequence texts, and images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lora_factory.arguments import CollectArguments
from lora_factory.data_source import Example
from lora_factory.errors import LoraFactoryError
from lora_factory.image_data import ImageExample
from lora_factory.sequences import (
    IGNORED,
    TokenSequence,
    closed,
    collate,
    encode_sequences,
    special_tokens,
    text_tokens,
)


class ModelInputs(Protocol):
    """Turns examples into rows, and rows into the model's inputs."""

    def encode(self, examples: Sequence[Any], arguments: CollectArguments) -> Sequence[TokenSequence]:
        """The rows that are learned from; ``tokens`` of a row are those of its texts, prompt and answer.

        Raises:
            LoraFactoryError: When there is nothing to learn from, or the examples are not for this model.
        """

    def collate(self, rows: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """One batch of the model's inputs with labels; -100 is not scored."""


@dataclass(frozen=True)
class ImageSequence(TokenSequence):
    """The texts of an example as tokens, with its image, which is opened when the row is read."""

    example: ImageExample


@dataclass(frozen=True)
class CausalInputs:
    """Texts for causal language models: prompt and answer in one sequence."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, examples: Sequence[Any], arguments: CollectArguments) -> list[TokenSequence]:
        """As ``sequences.encode_sequences``."""
        return encode_sequences(self.tokenizer, _only(Example, examples), arguments)

    def collate(self, rows: Sequence[TokenSequence], device: torch.device) -> dict[str, Tensor]:
        """As ``sequences.collate``."""
        return collate(rows, self.tokenizer.pad_token_id or 0, device)


@dataclass(frozen=True)
class Seq2SeqInputs:
    """Texts for encoder-decoder models: the prompt goes into the encoder, the answer into the decoder."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, examples: Sequence[Any], arguments: CollectArguments) -> list[TokenSequence]:
        """One row an example, never packed; an over-long prompt loses its beginning, an over-long answer its end."""
        length = arguments.sequence_length
        rows = []
        for example in _only(Example, examples):
            source = source_tokens(self.tokenizer, example.prompt, length)
            answer = answer_tokens(self.tokenizer, example.completion, length)
            if not source or not answer:
                raise LoraFactoryError(
                    f"the tokenizer has no token for the {'answer' if source else 'prompt'} of the example "
                    f"{(example.prompt, example.completion)!r:.120}; write it in characters that it knows"
                )
            rows.append(_answered(source, answer))
        return rows

    def collate(self, rows: Sequence[TokenSequence], device: torch.device) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` of the prompts, ``labels`` of the answers, padded on the right."""
        sources, answers = zip(*map(_split, rows), strict=True)
        return {
            "input_ids": _padded(sources, self.tokenizer.pad_token_id or 0, device),
            "attention_mask": _padded([[1] * len(source) for source in sources], 0, device),
            "labels": _padded(answers, IGNORED, device),
        }


@dataclass(frozen=True)
class ImageInputs:
    """Images with prompts for image-text-to-text models, encoder-decoders such as Florence-2 and decoders alone.

    Attributes:
        processor: The model's own: sizes images, writes prompts, knows the tokens that stand for an image.
        is_encoder_decoder: Whether answers are the decoder's, or follow the prompt in one sequence.
    """

    processor: ProcessorMixin
    is_encoder_decoder: bool

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def encode(self, examples: Sequence[Any], arguments: CollectArguments) -> list[ImageSequence]:
        """One row an example; images are not opened, and an over-long answer loses its end."""
        rows = []
        for example in _only(ImageExample, examples):
            if self.processor.chat_template:
                self._as_chat(example.prompt)  # what cannot be rendered is found here
            prompt = text_tokens(self.tokenizer, example.prompt, begins=True) or [0]
            answer = answer_tokens(
                self.tokenizer, example.completion, arguments.sequence_length, special=self.is_encoder_decoder
            )
            row = _answered(prompt, answer)
            rows.append(ImageSequence(row.tokens, row.labels, example))
        return rows

    def collate(self, rows: Sequence[ImageSequence], device: torch.device) -> dict[str, Tensor]:
        """What the processor makes of images and prompts, and the answers as labels.

        Raises:
            LoraFactoryError: When an image cannot be read.
        """
        inputs = self.questions([row.example for row in rows], device)
        answers = [_split(row)[1] for row in rows]
        if self.is_encoder_decoder:
            return inputs | {"labels": _padded(answers, IGNORED, device)}
        return self._continued(inputs, answers)

    def questions(self, examples: Sequence[ImageExample], device: torch.device) -> dict[str, Tensor]:
        """Images and prompts alone, as generation wants them: padded on the left for a decoder alone."""
        images, prompts = [example.open() for example in examples], [example.prompt for example in examples]
        options = {}
        if self.processor.chat_template:
            prompts = [self._as_chat(prompt) for prompt in prompts]
            start = self.tokenizer.bos_token
            if start is not None and prompts[0].startswith(start):  # the template begins a text itself
                options["add_special_tokens"] = False
        inputs = self.processor(
            text=prompts,
            images=[[image] for image in images] if self.processor.chat_template else images,
            padding=True,
            padding_side="right" if self.is_encoder_decoder else "left",
            return_tensors="pt",
            **options,
        )
        tensors = {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
        return tensors if self.is_encoder_decoder else self._open(tensors)

    def _open(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prompts that an answer can follow: without the special tokens that the tokenizer puts behind a text."""
        behind = special_tokens(self.tokenizer)[1]
        ids = inputs["input_ids"]
        last = ids[:, ids.shape[1] - len(behind) :]
        if not behind or not (last == torch.tensor(behind, device=ids.device)).all():
            return inputs
        return {
            name: value[:, : -len(behind)] if value.shape == ids.shape else value for name, value in inputs.items()
        }

    def _as_chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        message: Any = [{"role": "user", "content": content}]
        try:
            return self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the base model's own template: whatever it raises, it cannot be used
            raise LoraFactoryError(
                f"the processor's chat template fails for the prompt {prompt[:60]!r}: {error}; give another prompt"
            ) from error

    def _continued(self, inputs: dict[str, Tensor], answers: Sequence[list[int]]) -> dict[str, Tensor]:
        """Prompts padded on the left, continued by their answers; what the answer's end needs is masked padding."""
        device, shape = inputs["input_ids"].device, inputs["input_ids"].shape
        answer = _padded(answers, self.tokenizer.pad_token_id or 0, device)
        mask = _padded([[1] * len(row) for row in answers], 0, device)
        labels = torch.cat([torch.full(shape, IGNORED, device=device), answer.masked_fill(mask == 0, IGNORED)], 1)
        tails = {"input_ids": answer, "attention_mask": mask}
        continued = {
            name: torch.cat([value, tails.get(name, torch.zeros_like(answer)).to(value.dtype)], 1)
            for name, value in inputs.items()
            if value.shape == shape  # token types as well: an answer's are 0
        }
        return inputs | continued | {"labels": labels}


def model_inputs(model: PreTrainedModel | PeftModel, reader: PreTrainedTokenizerBase | ProcessorMixin) -> ModelInputs:
    """How a model reads examples: images where there is a processor, texts where there is a tokenizer alone."""
    if isinstance(reader, ProcessorMixin):
        return ImageInputs(reader, bool(model.config.is_encoder_decoder))
    return Seq2SeqInputs(reader) if model.config.is_encoder_decoder else CausalInputs(reader)


def source_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> list[int]:
    """The ids of a prompt as an encoder reads it, framed as the tokenizer does; too long a one loses its beginning."""
    before, behind = special_tokens(tokenizer)
    room = max(1, length - len(before) - len(behind))
    source = [*before, *text_tokens(tokenizer, prompt, begins=False)[-room:], *behind]
    return source or [token for token in (tokenizer.eos_token_id,) if token is not None]


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str, length: int, *, special: bool = True) -> list[int]:
    """The ids of an answer, closed by one end token and cut to ``length``; ``special``: framed as texts are."""
    tokens = text_tokens(tokenizer, answer, begins=special, target=True)
    behind = special_tokens(tokenizer, target=True)[1] if special else []
    if tokenizer.eos_token_id in behind:  # some put a language behind the end token
        return [*(tokens[:-1] if tokens[-1:] == behind[:1] else tokens), *behind][:length]
    return closed(tokenizer, [*tokens, *behind])[:length]


def positions(model: PreTrainedModel | PeftModel) -> int | None:
    """How many tokens a model has positions for, by its configuration; None where it does not say."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in base.named_modules():
        # RoBERTa and its kind count from behind the padding token.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - int(module.padding_idx) - 1
    return limit


def check_lengths(model: PreTrainedModel | PeftModel, rows: Sequence[TokenSequence]) -> None:
    """Refuse rows of more tokens than a model has positions for.

    Raises:
        LoraFactoryError: When a row's text, prompt or answer is too long.
    """
    if (limit := positions(model)) is None:
        return
    apart = bool(model.config.is_encoder_decoder)  # prompt and answer have positions of their own
    longest = max((max(map(len, _split(row))) if apart else len(row.tokens) for row in rows), default=0)
    if longest > limit:
        raise LoraFactoryError(
            f"a sequence of {longest} tokens is longer than the {limit} positions of the base model; "
            f"pass sequence_length={limit} (--sequence-length {limit}) or less"
        )


def _only(kind: type, examples: Sequence[Any]) -> Sequence[Any]:
    if wrong := [example for example in examples if not isinstance(example, kind)]:
        needed = "a model that reads texts alone" if kind is Example else "an image-text-to-text model"
        raise LoraFactoryError(
            f"{type(wrong[0]).__name__} among the examples, but this is {needed}; give each model tasks of its kind"
        )
    return examples


def _answered(source: list[int], answer: list[int]) -> TokenSequence:
    return TokenSequence(source + answer, [IGNORED] * len(source) + answer)


def _split(row: TokenSequence) -> tuple[list[int], list[int]]:
    """Source and answer of a row, whose labels are ignored on the one and scored on the other."""
    asked = sum(label == IGNORED for label in row.labels)
    return row.tokens[:asked], row.tokens[asked:]


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=device)
