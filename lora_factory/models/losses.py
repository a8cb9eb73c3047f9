"""Losses of a frozen base model that reads text with given adapters: for refinement, training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lora_factory.adapters.attach import adapters_in_batch
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.live_models import plain_model
from lora_factory.models.inputs import IGNORED, ModelInputs, model_inputs, pad_tokens


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
    # In fp32, one window at a time, since logits are large.
    losses = [
        functional.cross_entropy(
            row[item.first - 1 : len(item.tokens) - 1].float(), targets[item.first : len(item.tokens)], reduction="sum"
        )
        for item, row, targets in zip(windows, logits, inputs["input_ids"], strict=True)
    ]
    return torch.stack(losses).tolist()


class Base(Protocol):
    """A frozen base model that reads examples with adapters of one layout; an ``LoRATrainer`` is one."""

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


def query_loss(
    base: Base,
    adapters: torch.Tensor | AbstractContextManager[None],
    queries: Sequence[Sequence[Any]],
    *,
    until: ExitStack | None = None,
) -> torch.Tensor:
    """Mean over tasks of the mean loss per scored token (per image, for a classifier).

    Args:
        base: The frozen base model; adapters that are active in it take part too.
        adapters: Shape ``(tasks, D)``; or a context in which the model reads each task's rows with its adapter.
        queries: For every task equally many rows, as ``base.inputs`` encodes examples.
        until: The adapters stay in the model until it closes: a backward pass that computes activations again, as
            gradient checkpointing does, needs them there.
    """
    if isinstance(adapters, torch.Tensor):
        adapters = adapters_in_batch(base.model, base.layout, adapters)
    inputs = base.inputs.collate([row for rows in queries for row in rows], base.model.device)
    labels, decodes = inputs["labels"], bool(getattr(base.model.config, "is_encoder_decoder", False))
    if not decodes:  # an encoder-decoder makes its inputs of the labels
        del inputs["labels"]
    with ExitStack() as here:
        (until or here).enter_context(adapters)
        logits = base.model(**inputs, **({"use_cache": False} if labels.ndim > 1 else {})).logits.float()
    if labels.ndim > 1 and not decodes:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = functional.cross_entropy(logits.movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none")
    scored = (labels != IGNORED).reshape(len(queries), -1).sum(1)
    return (losses.reshape(len(queries), -1).sum(1) / scored).mean()
