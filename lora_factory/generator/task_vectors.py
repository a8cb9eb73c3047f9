"""Check task vectors, and open the model that reads examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.hub.cards import heard
from lora_factory.tasks.examples import Example, ImageExample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from lora_factory.models.losses import FrozenBase


def check_conditions(vectors: Mapping[str, Tensor], modalities: Mapping[str, int]) -> None:
    """Refuse task vectors that a generator does not take.

    Raises:
        LoraFactoryError: When there is none, or one has an unknown name, another width, or values that are not finite.
    """
    if not vectors:
        raise LoraFactoryError("nothing to condition on; pass a text, such as 'Legal notices'")
    for name, vector in vectors.items():
        width = modalities.get(name)
        if width is None or vector.shape != (width,):
            taken = ", ".join(f"{_named(one)} of shape ({size},)" for one, size in modalities.items())
            raise LoraFactoryError(
                f"condition {_named(name)} has shape {tuple(vector.shape)}; this generator takes {taken}"
            )
        if not torch.isfinite(vector).all():
            raise LoraFactoryError(f"condition {_named(name)} holds NaN or infinite values; encode it again")


def _named(modality: str) -> str:
    """A key of ``conditions=``, and what users hand in for it where they call it otherwise."""
    noun = heard([modality])
    return repr(modality) if noun == modality else f"{modality!r} (of {noun})"


def open_base(
    layout: AdapterLayout, base_model: str | Path | PreTrainedModel | PeftModel | None
) -> PreTrainedModel | PeftModel:
    """The live base model of a layout, loaded unless it is one."""
    if base_model is None or isinstance(base_model, str | Path):
        return _load(layout, base_model)[0]
    return base_model


def open_reader(
    layout: AdapterLayout,
    examples: Sequence[Example | ImageExample | str],
    base_model: str | Path | PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> FrozenBase:
    """The live base model of a layout with its tokenizer, or with its processor for examples with images.

    Raises:
        LoraFactoryError: When a live model comes without its tokenizer.
    """
    from lora_factory.models.loading import base_source, load_processor
    from lora_factory.models.losses import FrozenBase

    if base_model is None or isinstance(base_model, str | Path):
        (name, revision), (model, tokenizer) = base_source(layout, base_model), _load(layout, base_model)
        if any(isinstance(example, ImageExample) for example in examples):
            tokenizer = load_processor(name, revision=revision)
        base_model = model
    if tokenizer is None:
        raise LoraFactoryError("examples and a live base model need its tokenizer; pass tokenizer=")
    return FrozenBase(base_model, tokenizer, layout)


def _load(
    layout: AdapterLayout, base_model: str | Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A layout's base model and, unless it is an image classifier, its tokenizer."""
    from lora_factory.models.classifiers import is_image_classifier, load_image_classifier
    from lora_factory.models.loading import base_source, load_base_model

    name, revision = base_source(layout, base_model)
    try:
        return load_base_model(name, revision=revision)
    except LoraFactoryError:
        if not is_image_classifier(name, revision):
            raise
    return load_image_classifier(name, revision=revision)[0], None
