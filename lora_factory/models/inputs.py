"""Turn examples into model inputs: causal and sequence-to-sequence texts, and images with texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PaliGemmaProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lora_factory.adapters.live_models import base_of
from lora_factory.arguments import TokenOptions
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import Example, ImageExample

Row = TypeVar("Row")
# Of prompted tasks (P3) in batches of 8, 0.76 of what a model reads are tokens without sorting, 0.94 with it in 8
# batches, and 0.98 in 50.
SORTED_BATCHES = 8
IGNORED = -100  # the label that PyTorch's cross-entropy skips


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence: token ids and labels of equal length; label -100 is not scored."""

    tokens: list[int]
    labels: list[int]


def encode_sequences(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], options: TokenOptions
) -> list[TokenSequence]:
    """Tokenise examples into sequences of at most ``sequence_length`` tokens, with the loss on the completion only.

    With packing, examples follow each other (closed by the end-of-text token) and every sequence is full, unless all
    the text is shorter than one. Without it, each example is cut into its own sequences. With ``max_tokens``, only the
    first tokens are used, and no more text is tokenised than these need.

    Raises:
        LoraFactoryError: When no token is left to learn from.
    """
    length, budget = options.sequence_length, options.max_tokens
    encoded, used = [], 0
    for example in examples:
        sequence = encode_example(tokenizer, example, length, chat_template=options.chat_template)
        if budget and used + len(sequence.tokens) >= budget:
            rest = budget - used
            encoded.append(TokenSequence(sequence.tokens[:rest], sequence.labels[:rest]))
            break
        used += len(sequence.tokens)
        encoded.append(sequence)
    if options.packing:
        stream = TokenSequence([t for s in encoded for t in s.tokens], [label for s in encoded for label in s.labels])
        whole = max(length, len(stream.tokens) // length * length)
        encoded = [TokenSequence(stream.tokens[:whole], stream.labels[:whole])]
    cut = [
        TokenSequence(sequence.tokens[start : start + length], sequence.labels[start : start + length])
        for sequence in encoded
        for start in range(0, len(sequence.tokens), length)
    ]
    sequences = [sequence for sequence in cut if any(label != IGNORED for label in sequence.labels[1:])]
    if not sequences:
        raise LoraFactoryError(f"{len(examples)} examples hold no token to learn from; give longer texts")
    return sequences


def collate(batch: Sequence[TokenSequence], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pad sequences on the right to the batch's longest; tensors of shape ``(batch, tokens)``."""
    inputs = pad_tokens([sequence.tokens for sequence in batch], device, pad_token_id)
    return inputs | {"labels": padded([sequence.labels for sequence in batch], IGNORED, device)}


def scored_tokens(batch: Sequence[TokenSequence]) -> int:
    """Count the tokens of a batch whose mean loss a model returns."""
    return sum(label != IGNORED for sequence in batch for label in sequence.labels[1:])


def encode_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, length: int, *, chat_template: bool = False
) -> TokenSequence:
    """One example as tokens; an over-long prompt loses its beginning, so that the completion stays.

    A chat template has its own beginning and end of a text; otherwise these are the tokenizer's.
    """
    if chat_template:
        example = render_chat(tokenizer, example)
    prompt = text_tokens(tokenizer, example.prompt, begins=not chat_template) if example.prompt else []
    answer = example.completion
    completion = following_tokens(tokenizer, answer) if prompt else text_tokens(tokenizer, answer, begins=True)
    if not chat_template:
        completion = closed(tokenizer, completion)
    if prompt:
        prompt = prompt[-max(1, length - len(completion)) :]
    return TokenSequence(prompt + completion, [IGNORED] * len(prompt) + completion)


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool, target: bool = False) -> list[int]:
    """The tokens of a text; never those that the tokenizer puts behind one, since another text may follow.

    Args:
        tokenizer: Any; whether it puts special tokens before a text, behind it, both or none is found out here.
        text: What is read; special tokens that are written out in it stay.
        begins: Whether the special tokens that start a text come first.
        target: Whether the text is an answer of an encoder-decoder, which some tokenizers frame in another way.
    """
    tokens = _tokens(tokenizer, text, target=target, add_special_tokens=False)
    return [*special_tokens(tokenizer, target=target)[0], *tokens] if begins else tokens


def following_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, target: bool = False) -> list[int]:
    """The tokens of a text that continues another one, such as an answer.

    Tokenizers such as those of Llama 2 and Mistral put a space before every text that they are given. Here the text is
    tokenised behind a character with which it shares no token.
    """
    for mark in ("\n", "a") if line_break(tokenizer) else ():
        before = _tokens(tokenizer, mark, target=target, add_special_tokens=False)
        both = _tokens(tokenizer, mark + text, target=target, add_special_tokens=False)
        if both[: len(before)] == before:
            return both[len(before) :]
    return text_tokens(tokenizer, text, begins=False, target=target)


@lru_cache(maxsize=4)
def line_break(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a line break, if the tokenizer puts a space before every text; none if not."""
    before, both, alone = (
        _tokens(tokenizer, text, target=False, add_special_tokens=False) for text in ("\n", "\na", "a")
    )
    return tuple(before) if both[: len(before)] == before and both[len(before) :] != alone else ()


def special_tokens(tokenizer: PreTrainedTokenizerBase, *, target: bool = False) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those that it puts behind it."""
    bare = _tokens(tokenizer, "a", target=target, add_special_tokens=False)
    framed = _tokens(tokenizer, "a", target=target, add_special_tokens=True)
    spare = len(framed) - len(bare)
    if not bare:  # the tokenizer does not know the letter: the first end token ends the beginning
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
        start = next((index for index, token in enumerate(framed) if token in ends), spare)
        return framed[:start], framed[start:]
    start = next((index for index in range(spare + 1) if framed[index : index + len(bare)] == bare), 0)
    return framed[:start], framed[start + len(bare) :]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a text: the tokenizer's own, else the first that it puts behind a text, such as [SEP]."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    return next(iter(special_tokens(tokenizer)[1]), None)


def closed(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """The tokens of an answer with exactly one end token behind them, where the tokenizer has one."""
    end = end_token(tokenizer)
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, target: bool, add_special_tokens: bool) -> list[int]:
    words = {"text_target" if target else "text": text}
    return list(tokenizer(**words, add_special_tokens=add_special_tokens, verbose=False).input_ids)


def render_chat(tokenizer: PreTrainedTokenizerBase, example: Example) -> Example:
    """An example in the tokenizer's chat template: up to the assistant's turn, and what the assistant says in it.

    Raises:
        LoraFactoryError: When the tokenizer has no chat template, the example no prompt, or the template writes the
            start of a reply in another way than a reply.
    """
    if not tokenizer.chat_template:
        raise LoraFactoryError("the base model's tokenizer has no chat template; leave out chat_template")
    if not example.prompt:
        raise LoraFactoryError(
            "chat_template needs prompts; give prompt_column and completion_column, or leave it out"
        )
    turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
    try:
        start = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # the base model's own template: whatever it raises, it cannot be used
        raise LoraFactoryError(f"the tokenizer's chat template fails: {error}; leave out chat_template") from error
    if not whole.startswith(start):
        raise LoraFactoryError(
            f"the tokenizer's chat template starts a reply with {start[-40:]!r}, but writes a given one in another "
            "way; leave out chat_template"
        )
    return Example(start, whole.removeprefix(start))


def shuffled_batches(sequences: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Endless shuffled batches; an epoch's last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [sequences[index] for index in order[start : start + size]]


def length_batches(sequences: Sequence[TokenSequence], size: int, seed: int) -> Iterator[list[TokenSequence]]:
    """Endless shuffled batches of sequences of similar lengths, which need little padding.

    What is sorted by length are the sequences of a few batches, not all: batches stay different from epoch to epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for start in range(0, len(order), size * SORTED_BATCHES):
            some = [sequences[index] for index in order[start : start + size * SORTED_BATCHES]]
            some.sort(key=lambda sequence: len(sequence.tokens))
            batches = [some[first : first + size] for first in range(0, len(some), size)]
            yield from (batches[index] for index in torch.randperm(len(batches), generator=generator).tolist())


@contextmanager
def frozen(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """A context without gradients and with the model in eval mode; afterwards it is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device, side: str = "right") -> Tensor:
    """Integers padded to the longest row, on the right or on the left; shape ``(rows, longest)``."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=side).to(device)


def pad_tokens(
    rows: Sequence[Sequence[int]], device: torch.device, pad_token_id: int = 0, side: str = "right"
) -> dict[str, Tensor]:
    """Token ids padded to the longest row, with the mask that leaves the padding out.

    Causal attention never looks right, and the mask covers the rest, so that any id serves as padding.

    Returns:
        ``input_ids`` and ``attention_mask``, shape ``(rows, tokens)``.
    """
    mask = padded([[1] * len(row) for row in rows], 0, device, side)
    return {"input_ids": padded(rows, pad_token_id, device, side), "attention_mask": mask}


class ModelInputs(Protocol):
    """Turns examples into rows, and rows into the model's inputs."""

    def encode(self, examples: Sequence[Any], options: TokenOptions) -> Sequence[TokenSequence]:
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

    def encode(self, examples: Sequence[Any], options: TokenOptions) -> list[TokenSequence]:
        """As `encode_sequences`."""
        return encode_sequences(self.tokenizer, _only(Example, examples), options)

    def collate(self, rows: Sequence[TokenSequence], device: torch.device) -> dict[str, Tensor]:
        """As `collate`."""
        return collate(rows, self.tokenizer.pad_token_id or 0, device)


@dataclass(frozen=True)
class Seq2SeqInputs:
    """Texts for encoder-decoder models: the prompt goes into the encoder, the answer into the decoder."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, examples: Sequence[Any], options: TokenOptions) -> list[TokenSequence]:
        """One row an example, never packed; an over-long prompt loses its beginning, an over-long answer its end."""
        length = options.sequence_length
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
        inputs = pad_tokens(sources, device, self.tokenizer.pad_token_id or 0)
        return inputs | {"labels": padded(answers, IGNORED, device)}


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

    def encode(self, examples: Sequence[Any], options: TokenOptions) -> list[ImageSequence]:
        """One row an example; images are not opened, and an over-long answer loses its end."""
        rows = []
        for example in _only(ImageExample, examples):
            if self.processor.chat_template:
                self._as_chat(example.prompt)  # what cannot be rendered is found here
            prompt = text_tokens(self.tokenizer, example.prompt, begins=True) or [0]
            answer = answer_tokens(
                self.tokenizer, example.completion, options.sequence_length, special=self.is_encoder_decoder
            )
            row = _answered(prompt, answer)
            rows.append(ImageSequence(row.tokens, row.labels, example))
        return rows

    def collate(self, rows: Sequence[ImageSequence], device: torch.device) -> dict[str, Tensor]:
        """Let the processor read images and prompts, and add the answers as labels.

        Raises:
            LoraFactoryError: When an image cannot be read.
        """
        inputs = self.questions([row.example for row in rows], device)
        answers = [_split(row)[1] for row in rows]
        if self.is_encoder_decoder:
            return inputs | {"labels": padded(answers, IGNORED, device)}
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
        tails = pad_tokens(answers, device, self.tokenizer.pad_token_id or 0)
        answer = padded(answers, IGNORED, device)
        labels = torch.cat([torch.full(shape, IGNORED, device=device), answer], 1)
        # Token types of an answer. To PaliGemma, 0 is what every token may see, such as the prompt; to others, a text.
        types = torch.full_like(answer, isinstance(self.processor, PaliGemmaProcessor))
        continued = {
            name: torch.cat([value, tails.get(name, types).to(value.dtype)], 1)
            for name, value in inputs.items()
            if value.shape == shape
        }
        return inputs | continued | {"labels": labels}


def model_inputs(model: PreTrainedModel | PeftModel, reader: PreTrainedTokenizerBase | ProcessorMixin) -> ModelInputs:
    """Choose the inputs for a model: images with texts when there is a processor, else texts.

    Raises:
        LoraFactoryError: When a model with a processor has no output embeddings: features of examples consist of them.
    """
    if isinstance(reader, ProcessorMixin):
        if base_of(model).get_output_embeddings() is None:
            raise LoraFactoryError(
                f"a {type(base_of(model)).__name__} has no output embeddings, which are needed to learn tasks with "
                "images; give another base model, for example florence-community/Florence-2-base"
            )
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
    if not special:
        return closed(tokenizer, following_tokens(tokenizer, answer, target=True))[:length]
    tokens = text_tokens(tokenizer, answer, begins=True, target=True)
    behind = special_tokens(tokenizer, target=True)[1]
    if tokenizer.eos_token_id in behind:  # some put a language behind the end token
        return [*(tokens[:-1] if tokens[-1:] == behind[:1] else tokens), *behind][:length]
    return closed(tokenizer, [*tokens, *behind])[:length]


def positions(model: PreTrainedModel | PeftModel) -> int | None:
    """The number of positions of a model, in tokens, by its configuration; None where it does not say."""
    base = base_of(model)
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
