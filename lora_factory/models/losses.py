"""Losses of a frozen base model that reads text with given adapters: for refinement, training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lora_factory.adapters.attach import adapters_in_batch, single_experts
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.live_models import base_of, plain_model
from lora_factory.models.inputs import IGNORED, CausalInputs, ModelInputs, model_inputs, pad_tokens

# Makes a context in which a model reads the rows of these tasks, each with its adapter.
ReadWith = Callable[[slice], AbstractContextManager[None]]
# Logits in float32 at a time on a CPU: so many stay in its cache, while a whole batch needs new pages of memory each
# time. 256 tokens of 49,152, forwards and backwards on one core: 18 ms, all at once 109 ms.
_LOGITS_AT_A_TIME = 2**20
# Rows times squared length up to which `fast_attention` keeps all of attention in memory: 8 rows of 256 tokens take
# SmolLM2-135M 1.4 GB.
_ATTENTION_SIZE = 2**19


@dataclass(frozen=True)
class Window:
    """Some consecutive token ids of a text.

    Attributes:
        tokens: The ids.
        first: Index of the first one to score, at least 1; those before it are only read.
    """

    tokens: list[int]
    first: int


def negative_log_likelihoods(model: PreTrainedModel | PeftModel, windows: Sequence[Window]) -> list[float]:
    """One forward pass: the summed loss of each window's scored tokens, in nats."""
    inputs = pad_tokens([item.tokens for item in windows], next(model.parameters()).device)
    logits = model(**inputs, use_cache=False).logits
    losses = [
        label_losses(row[item.first - 1 : len(item.tokens) - 1], targets[item.first : len(item.tokens)]).sum()
        for item, row, targets in zip(windows, logits, inputs["input_ids"], strict=True)
    ]
    return torch.stack(losses).tolist()


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of every label in nats, in float32; 0 for a label that is ignored.

    Args:
        logits: Shape ``(*labels.shape, classes)``.
        labels: Class numbers.
    """
    rows, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    size = max(1, _LOGITS_AT_A_TIME // rows.shape[1] if rows.device.type == "cpu" else len(rows))
    losses = [
        functional.cross_entropy(part.float(), some, ignore_index=IGNORED, reduction="none")
        for part, some in zip(rows.split(size), wanted.split(size), strict=True)
    ]
    return torch.cat(losses).view(labels.shape)


def next_token_labels(labels: torch.Tensor, length: int) -> torch.Tensor:
    """Labels at the positions whose logits predict them: one to the left, the last ignored.

    Args:
        labels: Of the tokens of texts.
        length: Logits of a row; GIT's begin with those of the image, which are ignored.
    """
    return functional.pad(labels[:, 1:], (length - labels.shape[1], 1), value=IGNORED)


class Base(Protocol):
    """A frozen base model that reads examples with adapters of one layout; a ``LoRATrainer`` is one."""

    @property
    def model(self) -> Any: ...  # noqa: ANN401, D102

    @property
    def tokenizer(self) -> Any: ...  # noqa: ANN401, D102

    @property
    def inputs(self) -> ModelInputs: ...  # noqa: D102

    @property
    def layout(self) -> AdapterLayout: ...  # noqa: D102


@dataclass(frozen=True)
class FrozenBase:
    """A live base model, its tokenizer (or processor), and the layout of the adapters that it is read with."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    layout: AdapterLayout

    def __post_init__(self) -> None:
        """Take the model out of its wrappers."""
        object.__setattr__(self, "model", plain_model(self.model))

    @property
    def inputs(self) -> ModelInputs:
        """The inputs of this model, made of examples."""
        return model_inputs(self.model, self.tokenizer)


@contextmanager
def fast_attention(base: Base, rows: int, length: int) -> Iterator[None]:
    """Do attention step by step where PyTorch's kernel has a slow backward pass: in bfloat16 on a CPU.

    A step of SmolLM2-135M on 4 sequences takes one core 0.65 s with the kernel and 0.56 s without it for 64 tokens,
    1.37 and 1.14 s for 128, 2.9 and 2.2 s for 256.

    Args:
        base: The model that is trained through.
        rows: Of a batch.
        length: Tokens of a row at most.
    """
    model: Any = base_of(base.model)
    parts = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    kernels = {part._attn_implementation for part in parts if part is not None}
    slow = (model.device.type, model.dtype, kernels) == ("cpu", torch.bfloat16, {"sdpa"})
    if not (slow and isinstance(base.inputs, CausalInputs) and rows * length**2 <= _ATTENTION_SIZE):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def query_loss(
    base: Base,
    adapters: torch.Tensor | ReadWith,
    queries: Sequence[Sequence[Any]],
) -> torch.Tensor:
    """Mean over tasks of the mean loss per scored token (per image, for a classifier): the sum of `query_losses`."""
    return torch.stack(list(query_losses(base, adapters, queries))).sum()


def query_losses(
    base: Base,
    adapters: torch.Tensor | ReadWith,
    queries: Sequence[Sequence[Any]],
) -> Iterator[torch.Tensor]:
    """Read every task's rows with its own adapter, in one forward pass where the rows can be told apart in it.

    They cannot be in single experts of a mixture, which get their tokens in any order, nor where images become
    different numbers of patches (Qwen2-VL, LLaVA-Next, SmolVLM): there each task has a forward pass of its own.

    Args:
        base: The frozen base model; adapters that are active in it take part too.
        adapters: Shape ``(tasks, D)``; or what makes a context in which the model reads the rows of these tasks.
        queries: For every task equally many rows, as ``base.inputs`` encodes examples.

    Yields:
        Losses whose sum is the mean over tasks. The adapters stay in the model until the next is asked for: a backward
        pass that computes activations again, as gradient checkpointing does, needs them there.
    """
    if isinstance(adapters, torch.Tensor):
        weights = adapters
        adapters = lambda share: adapters_in_batch(base.model, base.layout, weights[share])  # noqa: E731
    count = len(queries)
    inputs = base.inputs.collate([row for rows in queries for row in rows], base.model.device)
    if count == 1 or not (single_experts(base.layout) or _images_differ(inputs)):
        with adapters(slice(None)):
            yield mean_loss(base.model, base.model.config, inputs, count)
        return
    for task, rows in enumerate(queries):
        with adapters(slice(task, task + 1)):
            yield mean_loss(base.model, base.model.config, base.inputs.collate(rows, base.model.device)) / count


def mean_loss(
    forward: Callable[..., Any],
    config: object,
    inputs: Mapping[str, torch.Tensor],
    count: int = 1,
) -> torch.Tensor:
    """Mean over equal shares of a batch of the mean loss per scored token (per image, for a classifier).

    What a model itself computes from labels takes longer, and not every one does.

    Args:
        forward: The model, maybe in a wrapper.
        config: The model's configuration.
        inputs: A batch with labels, as ``ModelInputs.collate`` makes it.
        count: Number of shares.
    """
    labels, decodes = inputs["labels"], bool(getattr(config, "is_encoder_decoder", False))
    if not decodes:  # an encoder-decoder makes its inputs of the labels
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    logits = forward(**inputs, **({"use_cache": False} if labels.ndim > 1 else {})).logits
    if labels.ndim > 1 and not decodes:
        labels = next_token_labels(labels, logits.shape[1])
    losses = label_losses(logits, labels)
    scored = (labels != IGNORED).reshape(count, -1).sum(1)
    return (losses.reshape(count, -1).sum(1) / scored).mean()


def _images_differ(inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether a batch has more of its images than one ``(rows, channels, height, width)``: sizes, or patches."""
    rows = inputs["labels"]
    text = {rows.shape, inputs.get("input_ids", rows).shape}
    images = [value for value in inputs.values() if value.shape not in text]
    return bool(images) and not (len(images) == 1 and images[0].ndim == 4 and len(images[0]) == len(rows))
