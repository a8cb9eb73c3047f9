"""What a generator is asked: task vectors by modality, checked, made of examples, and compared with the zoo's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.base_loss import FrozenBase
from lora_factory.base_models import load_base_model
from lora_factory.data_source import Example
from lora_factory.encoders import HiddenStateEncoder, task_vector
from lora_factory.errors import LoraFactoryError
from lora_factory.layout import AdapterLayout


def check_conditions(vectors: Mapping[str, Tensor], modalities: Mapping[str, int]) -> None:
    """Refuse task vectors that a generator does not take.

    Raises:
        LoraFactoryError: When there is none, or one has an unknown name, another width, or values that are not finite.
    """
    if not vectors:
        raise LoraFactoryError('nothing to condition on; pass a text: generate_adapter("Legal notices")')
    for name, vector in vectors.items():
        width = modalities.get(name)
        if width is None or vector.shape != (width,):
            raise LoraFactoryError(
                f"condition {name!r} has shape {tuple(vector.shape)}; this generator takes {dict(modalities)}"
            )
        if not torch.isfinite(vector).all():
            raise LoraFactoryError(f"condition {name!r} holds NaN or infinite values; encode it again")


def random_subset(modalities: Sequence[str], source: torch.Generator) -> list[str]:
    """Some of the modalities, at least one, so that training makes every subset a valid condition."""
    drawn = int(torch.randint(1, 2 ** len(modalities), (), generator=source))
    return [name for bit, name in enumerate(modalities) if drawn >> bit & 1]


def open_base(
    layout: AdapterLayout, base_model: str | Path | PreTrainedModel | PeftModel | None
) -> PreTrainedModel | PeftModel:
    """The live base model of a layout, loaded unless it is one."""
    if base_model is None or isinstance(base_model, str | Path):
        return _load(layout, base_model)[0]
    return base_model


def open_reader(
    layout: AdapterLayout,
    base_model: str | Path | PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> FrozenBase:
    """The same with its tokenizer, to read examples with.

    Raises:
        LoraFactoryError: When a live model comes without its tokenizer.
    """
    if base_model is None or isinstance(base_model, str | Path):
        return FrozenBase(*_load(layout, base_model), layout)
    if tokenizer is None:
        raise LoraFactoryError("examples and a live base model need its tokenizer; pass tokenizer=")
    return FrozenBase(base_model, tokenizer, layout)


def encode_examples(
    modalities: Mapping[str, int],
    layout: AdapterLayout,
    examples: Sequence[Example | str],
    base_model: str | Path | PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Tensor]:
    """See :meth:`lora_factory.CVAELoRAGenerator.encode_examples`."""
    if "hidden" not in modalities:
        raise LoraFactoryError(
            f"this generator listens to {', '.join(modalities)} and not to examples; pass a text, or train one with "
            "train_generator(zoo, output_dir, tasks=tasks)"
        )
    base = open_reader(layout, base_model, tokenizer)
    return {"hidden": task_vector(HiddenStateEncoder(base.model, base.tokenizer).encode(examples))}


def nearest_tasks(
    names: Sequence[str], known: Mapping[str, Tensor], vectors: Mapping[str, Tensor], count: int
) -> list[dict[str, Any]]:
    """The tasks whose vectors are nearest by cosine similarity, mean over modalities, best first.

    Args:
        names: The zoo's tasks.
        known: Their vectors by modality, shape ``(tasks, width)``.
        vectors: The condition by modality, shape ``(width,)``.
        count: How many to name.
    """
    similarities = [
        functional.cosine_similarity(known[name], vector[None].to(known[name])) for name, vector in vectors.items()
    ]
    values, indices = torch.stack(similarities).mean(0).topk(min(count, len(names)))
    return [
        {"task": names[index], "similarity": round(value, 4)}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def _load(layout: AdapterLayout, base_model: str | Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    revision = layout.base_revision if base_model in (None, layout.base_model) else None
    return load_base_model(base_model or layout.base_model, revision=revision)
