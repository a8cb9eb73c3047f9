"""Hidden states of examples on any base model (Eq. 1): what conditions made of a user's examples consist of."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.adapters.live_models import base_of, plain_model, without_adapters
from lora_factory.arguments import TokenOptions
from lora_factory.errors import LoraFactoryError
from lora_factory.models.inputs import IGNORED, CausalInputs, frozen, pad_tokens, positions, text_tokens
from lora_factory.models.losses import Base
from lora_factory.models.text_encoders import _refuse_empty, masked_mean
from lora_factory.tasks.examples import Example
from lora_factory.utils.cache import TensorCache
from lora_factory.utils.paths import cache_folder
from lora_factory.utils.progress import progress_bar

if TYPE_CHECKING:
    from lora_factory.tasks.task import Task


# Directions of errors and states whose products are kept. On the grid's validation fold, 16 examples gain 0.137 nats
# (seen cells), 0.109 (combinations), 0.026 (languages) and 0.046 (kind) on the multi-task LoRA without the products,
# and 0.153, 0.119, 0.057 and 0.073 with them.
MEMORY = 24


class HiddenStateEncoder:
    """Hidden states of examples on the base model: the paper's task vectors, before their mean (Eq. 1).

    Any adapter of the model is switched off: the vectors exist for tasks that no LoRA was trained on.

    Args:
        model: The base model, with or without adapters attached.
        tokenizer: Its tokenizer.
        max_length: Tokens read of each example, from its beginning.
        batch_size: Examples a forward pass.

    Attributes:
        width: Size of the vectors, three times the model's hidden size and the memory's.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 128,
        batch_size: int = 16,
    ) -> None:
        """Keep the model; nothing is computed but its fingerprint."""
        self.model = plain_model(model)
        self.tokenizer = tokenizer
        self.max_length = min(max_length, positions(model) or max_length)
        self.batch_size = batch_size
        self._base = base = cast(PreTrainedModel, base_of(model))
        self._backbone = base.base_model
        self._head = base.get_output_embeddings()
        hidden_size = base.config.get_text_config().hidden_size
        self.width = 3 * hidden_size + min(MEMORY, hidden_size) ** 2

    @cached_property
    def identifier(self) -> str:
        """The name of the vectors of token sequences, for example as a cache key; reads all of the base's weights."""
        with without_adapters(self.model):  # a merged adapter is in the base model's own weights
            fingerprint = model_fingerprint(self._base)
        return f"hidden-states-and-errors-5:{self._base.config.model_type}:{fingerprint}:{self.max_length}"

    @cached_property
    def _plain_head(self) -> bool:
        """Whether the base's logits are its states times the output embedding alone: no bias, factor or bound."""
        weight, states = self._head.weight, next(self._backbone.parameters())
        ids = torch.arange(min(8, len(weight)), device=weight.device)[None]
        with torch.autocast(weight.device.type, states.dtype, enabled=states.dtype != weight.dtype):
            whole = self._base(input_ids=ids, use_cache=False, output_hidden_states=True)
            logits = whole.hidden_states[-1].to(weight) @ weight.T
        tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
        return torch.allclose(logits, whole.logits.to(logits), rtol=0, atol=tolerance)

    def encode(self, examples: Sequence[Example | str]) -> Tensor:
        """Read examples with the model.

        Args:
            examples: Texts, or prompts with their completions, which are read as one text.

        Returns:
            ``[hidden state of the last token; mean over all tokens; mean prediction error; memory]`` of the last
            layer, float32, on the CPU, shape ``(examples, width)``. The prediction error is the output embedding of
            the next token less its expectation under the model: the direction in which the hidden states have to move
            for the example to become more likely, whatever the adapter is that moves them. The memory is the mean
            outer product of error and state, each in `MEMORY` fixed directions: the gradient of the example's
            likelihood by a linear map of the last states, which says where they have to move from where.

        Raises:
            LoraFactoryError: When an example is empty, or the tokenizer has no token for it.
        """
        texts = [example if isinstance(example, str) else example.prompt + example.completion for example in examples]
        _refuse_empty(texts)
        if not texts:
            return torch.empty(0, self.width)
        starts = range(0, len(texts), self.batch_size)
        with frozen(self.model), without_adapters(self.model):
            return torch.cat([self._read(texts[start : start + self.batch_size]) for start in starts])

    def tokens(self, text: str) -> list[int]:
        """The tokens that are read of a text."""
        return text_tokens(self.tokenizer, text, begins=True)[: self.max_length]

    def _read(self, texts: Sequence[str]) -> Tensor:
        rows = [self.tokens(text) for text in texts]
        if not all(rows):
            raise LoraFactoryError(
                f"the tokenizer has no token for the example {texts[rows.index([])][:60]!r}; "
                "write it in characters that it knows"
            )
        inputs = pad_tokens(rows, next(self._backbone.parameters()).device)
        mask, embeddings = inputs["attention_mask"], self._head.weight
        scored = mask[:, 1:].bool()
        if self._plain_head:  # the logits of one example at a time take less memory
            hidden = self._backbone(**inputs, use_cache=False).last_hidden_state
            chosen = (states[counted].to(embeddings) for states, counted in zip(hidden[:, :-1], scored, strict=True))
            logits = (states @ embeddings.T for states in chosen)
        else:
            outputs = self._base(**inputs, use_cache=False, output_hidden_states=True)
            hidden = outputs.hidden_states[-1]
            logits = (row[counted] for row, counted in zip(outputs.logits[:, :-1], scored, strict=True))
        return _summary(hidden, mask, logits, inputs["input_ids"][:, 1:], scored, embeddings)


def task_vector(features: Tensor) -> Tensor:
    """The mean over a task's examples (Eq. 1): shape ``(examples, width)`` to ``(width,)``.

    Raises:
        LoraFactoryError: When there is no example.
    """
    if features.ndim != 2 or not len(features):
        raise LoraFactoryError(
            f"features have shape {tuple(features.shape)}, expected (examples, width) with at least one example"
        )
    return features.mean(dim=0)


def _summary(
    hidden: Tensor, mask: Tensor, logits: Iterable[Tensor], targets: Tensor, scored: Tensor, embeddings: Tensor
) -> Tensor:
    """Join last state, mean state, mean prediction error and memory to a vector per example, on the CPU.

    Args:
        hidden: Shape ``(n, tokens, width)``.
        mask: The tokens whose states count, shape ``(n, tokens)``.
        logits: For each example those that predict its ``scored`` targets; one at a time, since they are large.
        targets: Token ids that are predicted.
        scored: Those of ``targets`` whose error counts, bool.
        embeddings: Rows ``e`` of the output embedding; an error is ``e(target) - sum_v p(v) e(v)``. Of single tokens
            only its products with the directions are computed, in the precision of the logits.
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    last = hidden[torch.arange(len(hidden), device=hidden.device), (mask * places).argmax(1)].float()
    directions = _directions(hidden.shape[-1]).to(hidden.device)
    embeddings = embeddings.float()
    projected, wanted, expected, memory = embeddings @ directions, [], [], []
    for states, counted, ids, row in zip(hidden, scored, targets, logits, strict=True):
        probabilities, ids = row.softmax(-1), ids[counted]
        wanted.append(embeddings[ids].sum(0))
        expected.append(probabilities.sum(0, dtype=torch.float32))
        moved = projected[ids] - (probabilities @ projected.to(probabilities)).float()
        memory.append((moved.mT @ (states[: len(counted)][counted].float() @ directions)).flatten())
    errors = torch.stack(wanted) - torch.stack(expected) @ embeddings
    sums = torch.cat([errors, torch.stack(memory)], dim=-1)
    means = sums / scored.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([last, masked_mean(hidden.float(), mask), means], dim=-1).cpu()


def _directions(width: int) -> Tensor:
    """Orthonormal columns ``(width, MEMORY)`` that are the same on every machine: those of a cosine transform."""
    places, frequencies = torch.arange(width) + 0.5, torch.arange(min(MEMORY, width))
    columns = torch.cos(torch.pi * places[:, None] * frequencies / width)
    return columns / columns.norm(dim=0)


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash over a base model: its configuration, and the names, shapes, precision and values of its parameters."""
    unimportant = ("_name_or_path", "transformers_version", "use_cache")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unimportant}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# How a tokenizer was loaded or last called, which its files hold beside what it is.
_OF_A_CALL = frozenset("backend is_local local_files_only name_or_path".split())
_OF_A_CALL |= {"padding", "padding_side", "truncation", "truncation_side", "model_max_length"}


def base_fingerprint(base: Base) -> str:
    """A hash over all that a base reads examples with: its model, and the files of its tokenizer or processor."""
    facts = [model_fingerprint(base_of(base.model))]
    with tempfile.TemporaryDirectory(prefix="lora_factory-") as folder:
        if base.tokenizer is not None:  # image classifiers have none
            base.tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            content: Any = path.read_bytes() if path.is_file() else None
            if path.suffix == ".json" and isinstance(values := json.loads(content), dict):
                content = sorted((name, json.dumps(value)) for name, value in values.items() if name not in _OF_A_CALL)
            facts.append(f"{path.name} {content!r}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


BATCH = 8
READ = TokenOptions(packing=False, sequence_length=128)


def example_states(base: Base, examples: Sequence[Any]) -> Tensor:
    """Read examples with the frozen base model alone.

    A causal language model reads prompt and answer as one text, see ``HiddenStateEncoder``. Of an encoder-decoder, and
    of a model that reads images, the states are those in which the answer is predicted: they have seen the rest.

    Returns:
        ``[last state; mean state; mean prediction error; memory]`` as ``HiddenStateEncoder`` has them.

    Raises:
        LoraFactoryError: When an example is empty, or not one for this model.
    """
    if isinstance(base.inputs, CausalInputs):
        return HiddenStateEncoder(base.model, base.tokenizer).encode(examples)
    settings = replace(READ, sequence_length=min(READ.sequence_length, positions(base.model) or READ.sequence_length))
    rows = base.inputs.encode(examples, settings)
    with frozen(base.model), without_adapters(base.model):
        return torch.cat([_read(base, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])


def _read(base: Base, rows: Sequence[Any]) -> Tensor:
    inputs = base.inputs.collate(rows, base.model.device)
    outputs = base.model(**inputs, output_hidden_states=True, use_cache=False)
    states, labels, logits = outputs.get("decoder_hidden_states"), inputs["labels"], outputs.logits
    read = slice(None)
    if states is None:  # a decoder alone predicts the token that follows; GIT has the image's states before the text's
        read, states = slice(-labels.shape[1], -1), outputs.hidden_states
        labels, logits = labels[:, 1:], logits[:, read]
    hidden, answered = states[-1][:, read], labels != IGNORED
    scored_logits = (row[counted] for row, counted in zip(logits, answered, strict=True))
    embeddings = base.model.get_output_embeddings().weight
    return _summary(hidden, answered, scored_logits, labels, answered, embeddings)


FEATURE_EXAMPLES = 128  # training examples per task whose hidden states are computed


def example_features(base: Base, tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Hidden states of every task's first 128 training examples on the frozen base; those of texts are cached.

    Args:
        base: The base model, with or without adapters attached.
        tasks: Tasks with training examples.

    Returns:
        Shape ``(examples, width)`` by the name of the task; a progress bar shows on the main process.
    """
    hidden = not PartialState().is_local_main_process
    states, bar = {}, progress_bar(tasks, desc="hidden states", unit="tasks", disable=hidden)
    if not isinstance(base.inputs, CausalInputs):
        return {task.name: example_states(base, task.examples("train")[:FEATURE_EXAMPLES]) for task in bar}
    encoder, cache = HiddenStateEncoder(base.model, base.tokenizer), TensorCache(cache_folder() / "features")

    for task in bar:
        examples = task.examples("train")[:FEATURE_EXAMPLES]
        keys = [str(encoder.tokens(example.prompt + example.completion)) for example in examples]
        known = dict(zip(keys, examples, strict=True))

        def encode(missing: list[str], known: dict[str, Example] = known) -> Tensor:
            return encoder.encode([known[key] for key in missing])

        states[task.name] = cache.get_or_compute(encoder.identifier, keys, encode)
    return states
