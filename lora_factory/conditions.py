"""What a generator is asked: task vectors by modality, checked, made of examples, and compared with the zoo's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from lora_factory.answer_states import example_states
from lora_factory.base_loss import FrozenBase
from lora_factory.base_models import load_base_model, load_processor
from lora_factory.data_source import Example
from lora_factory.encoders import TextEncoder, task_vector
from lora_factory.errors import LoraFactoryError
from lora_factory.given import as_examples, as_images, as_vectors
from lora_factory.image_classification import is_image_classifier, load_image_classifier
from lora_factory.image_data import ImageExample
from lora_factory.image_encoders import ImageEncoder
from lora_factory.images import ImageLike
from lora_factory.layout import AdapterLayout

if TYPE_CHECKING:
    from lora_factory.modeling import CVAELoRAGenerator


class ConditionMixin:
    """How a generator is told what to write: texts, examples and images become task vectors, a modality each."""

    _text_encoder: TextEncoder | None = None
    _image_encoder: ImageEncoder | None = None

    def conditions(  # type: ignore[misc]  # the mixin's host is always a generator
        self: CVAELoRAGenerator, text: str | None = None, conditions: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Task vectors of shape ``(width,)`` by modality, checked against the config."""
        vectors = as_vectors(conditions)
        if text is not None:
            vectors["text"] = self.text_encoder.encode([text])[0]
        check_conditions(vectors, self.config.modalities or {})
        return vectors

    def encode_examples(  # type: ignore[misc]
        self: CVAELoRAGenerator,
        examples: Sequence[Example | ImageExample | str],
        base_model: str | Path | PreTrainedModel | PeftModel | None = None,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ) -> dict[str, Tensor]:
        """A few examples of a task as a condition: their mean hidden states on the frozen base model (Eq. 1).

        Args:
            examples: Texts, prompts with their completions (as pairs or as ``{"prompt", "completion"}``), or images
                with both; from 4 to 32 is what training saw.
            base_model: Model, folder or Hub id; by default the one that the generator's layout names.
            tokenizer: Tokenizer or processor of a live model; a folder or Hub id has its own.

        Returns:
            ``{"hidden": vector}``, to be passed as ``conditions``.

        Raises:
            LoraFactoryError: When this generator was trained without examples, one is empty, or a live model comes
                without its tokenizer.
        """
        self._refuse_unheard("hidden", "examples", "tasks= (--tasks) of the zoo")
        examples = as_examples(examples)
        base = open_reader(self.layout, examples, base_model, tokenizer)
        return {"hidden": task_vector(example_states(base, examples))}

    def encode_images(self: CVAELoRAGenerator, images: Sequence[ImageLike]) -> dict[str, Tensor]:  # type: ignore[misc]
        """A few images of a task as a condition: the mean of their vectors.

        Args:
            images: Files or images in memory, of any size and mode, at least one.

        Returns:
            ``{"image": vector}``, to be passed as ``conditions``.

        Raises:
            LoraFactoryError: When this generator was trained without images, none is given, or one cannot be read.
        """
        self._refuse_unheard("image", "images", "images= (--images) of every task")
        images = as_images(images)
        return {"image": task_vector(self.image_encoder.encode(images))}

    def nearest_tasks(  # type: ignore[misc]
        self: CVAELoRAGenerator, vectors: Mapping[str, Tensor], count: int = 3
    ) -> list[dict[str, Any]]:
        """The zoo's tasks whose vectors are nearest by cosine similarity, best first: ``{"task", "similarity"}``."""
        known = {name: self.get_buffer(f"{name}_task_vectors") for name in vectors}
        return nearest_tasks([task["name"] for task in self.config.tasks or []], known, vectors, count)

    @property
    def text_encoder(self: CVAELoRAGenerator) -> TextEncoder:  # type: ignore[misc]
        """The sentence encoder that the config names, loaded on first use."""
        if self._text_encoder is None:
            if self.config.text_encoder is None:
                raise LoraFactoryError("this generator was trained without texts; pass conditions= instead of text")
            self._text_encoder = TextEncoder(self.config.text_encoder)
        return self._text_encoder

    @property
    def image_encoder(self: CVAELoRAGenerator) -> ImageEncoder:  # type: ignore[misc]
        """The image encoder that the config names, loaded on first use."""
        if self._image_encoder is None:
            if self.config.image_encoder is None:
                raise LoraFactoryError("this generator's config names no image encoder; pass conditions= instead")
            self._image_encoder = ImageEncoder(self.config.image_encoder)
        return self._image_encoder

    def _refuse_unheard(self: CVAELoRAGenerator, modality: str, noun: str, remedy: str) -> None:  # type: ignore[misc]
        modalities = self.config.modalities or {}
        if modality not in modalities:
            raise LoraFactoryError(
                f"this generator listens to {', '.join(modalities)} and not to {noun}; pass a text, or train "
                f"a generator with {remedy}"
            )


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
    examples: Sequence[Example | ImageExample | str],
    base_model: str | Path | PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> FrozenBase:
    """The same with its tokenizer, or for examples with images its processor.

    Raises:
        LoraFactoryError: When a live model comes without its tokenizer.
    """
    if base_model is None or isinstance(base_model, str | Path):
        name, (model, tokenizer) = base_model or layout.base_model, _load(layout, base_model)
        if any(isinstance(example, ImageExample) for example in examples):
            tokenizer = load_processor(name, revision=_revision(layout, base_model))
        base_model = model
    if tokenizer is None:
        raise LoraFactoryError("examples and a live base model need its tokenizer; pass tokenizer=")
    return FrozenBase(base_model, tokenizer, layout)


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


def _load(
    layout: AdapterLayout, base_model: str | Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A layout's base model and, unless it is an image classifier, its tokenizer."""
    name, revision = str(base_model or layout.base_model), _revision(layout, base_model)
    try:
        return load_base_model(name, revision=revision)
    except LoraFactoryError:
        if not is_image_classifier(name, revision):
            raise
    return load_image_classifier(name, revision=revision)[0], None


def _revision(layout: AdapterLayout, base_model: str | Path | None) -> str | None:
    return layout.base_revision if base_model in (None, layout.base_model) else None
