"""How well a frozen base model reads text with given adapters: the loss that stage 2 and refinement go down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.adapters import adapters_in_batch
from lora_factory.layout import AdapterLayout
from lora_factory.sequences import IGNORED, TokenSequence, collate


class Base(Protocol):
    """A frozen base model that reads text with adapters of one layout; an ``AdapterFactory`` is one."""

    @property
    def model(self) -> PreTrainedModel | PeftModel: ...  # noqa: D102

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...  # noqa: D102

    @property
    def layout(self) -> AdapterLayout: ...  # noqa: D102


@dataclass(frozen=True)
class FrozenBase:
    """A live base model, its tokenizer, and the layout of the adapters that it is read with."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    layout: AdapterLayout


def query_loss(base: Base, adapters: torch.Tensor, queries: Sequence[Sequence[TokenSequence]]) -> torch.Tensor:
    """Mean over tasks of the mean loss a scored token, each task's sequences read with its own adapter.

    Args:
        base: The frozen base model; adapters that are active in it take part too.
        adapters: Shape ``(tasks, D)``.
        queries: For every task equally many sequences.
    """
    inputs = collate([row for rows in queries for row in rows], base.tokenizer.pad_token_id or 0, adapters.device)
    labels = inputs.pop("labels")[:, 1:]
    with adapters_in_batch(base.model, base.layout, adapters):
        logits = base.model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    scored = (labels != IGNORED).view(len(adapters), -1).sum(1)
    return (losses.view(len(adapters), -1).sum(1) / scored).mean()
