"""LoRA on image classifiers: loading one, its inputs, and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)

from lora_factory.arguments import TokenOptions
from lora_factory.errors import LoraFactoryError
from lora_factory.models.image_encoders import image_channels
from lora_factory.models.inputs import IGNORED, TokenSequence, frozen
from lora_factory.models.loading import load_pretrained
from lora_factory.tasks.image_files import ImageLike, read_image
from lora_factory.tasks.images import LabelledImage

MAX_KEPT_BYTES = 1 << 28  # of preprocessed images, which most tasks read many times


@dataclass(frozen=True)
class ImageRow(TokenSequence):
    """An image with its class, which counts as one token that is predicted."""

    image: ImageLike


@dataclass
class ClassifierInputs:
    """Labelled images for image classifiers.

    Attributes:
        processor: The model's image processor.
        labels: Index of every class among the model's outputs.
        channels: Colour channels that the model reads, 1 or 3.
    """

    processor: Any
    labels: dict[str, int]
    channels: int
    _kept: dict[int, tuple[ImageLike, Tensor]] = field(default_factory=dict, repr=False)

    def encode(self, examples: Sequence[LabelledImage], options: TokenOptions | None = None) -> list[ImageRow]:
        """One row an example; images are read when they are needed.

        Raises:
            LoraFactoryError: When the model has no output for a class.
        """
        if strangers := sorted({example.label for example in examples} - set(self.labels)):
            raise LoraFactoryError(
                f"the classifier has no output for {strangers}, its classes are {list(self.labels)[:20]}; save it "
                "with id2label= and label2id= that name the tasks' classes"
            )
        known = {label: ([index], [IGNORED, index]) for label, index in self.labels.items()}
        return [ImageRow(*known[example.label], example.image) for example in examples]

    def collate(self, rows: Sequence[ImageRow], device: torch.device) -> dict[str, Tensor]:
        """``pixel_values`` of shape ``(rows, channels, height, width)`` and ``labels`` of shape ``(rows,)``."""
        new = [row.image for row in rows if id(row.image) not in self._kept]
        if new:
            opened = [read_image(image, self.channels) for image in new]
            pixels = self.processor(opened, return_tensors="pt")["pixel_values"]
            if (len(self._kept) + len(new)) * pixels[0].nbytes > MAX_KEPT_BYTES:
                self._kept = {id(row.image): self._kept[id(row.image)] for row in rows if id(row.image) in self._kept}
            # The image is kept with its pixels, so that its id stays its own.
            self._kept |= {id(image): (image, row) for image, row in zip(new, pixels, strict=True)}
        stacked = torch.stack([self._kept[id(row.image)][1] for row in rows])
        return {
            "pixel_values": stacked.to(device),
            "labels": torch.tensor([row.tokens[0] for row in rows], device=device),
        }


def load_image_classifier(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, ClassifierInputs]:
    """Load an image classifier, frozen and in evaluation mode, and what makes its inputs.

    Any classifier that transformers knows, timm's among them (``timm/resnet18.a1_in1k``); only safetensors are read.

    Args:
        name: Hub id, or a folder with model and image processor as `save_pretrained` wrote them.
        revision: Branch, tag or commit on the Hub.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16", or the torch dtype.
        device: Where the model goes; default: the CPU.

    Raises:
        LoraFactoryError: The model is unknown, cannot be reached or read, or is no image classifier.
    """
    model, processor = load_pretrained(
        str(name),
        (AutoModelForImageClassification, AutoImageProcessor),
        "image classifier",
        "a classifier that transformers or timm knows, not its backbone, with safetensors and an image processor",
        revision=revision,
        dtype=dtype,
    )
    labels = {str(label): int(index) for index, label in model.config.id2label.items()}
    inputs = ClassifierInputs(processor, labels, image_channels(model.config))
    return model.to(device or "cpu"), inputs


def is_image_classifier(name: str | Path, revision: str | None = None) -> bool:
    """Return whether a model's configuration can be read and names an architecture with image classifiers."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def image_accuracy(
    model: PreTrainedModel | PeftModel,
    inputs: ClassifierInputs,
    examples: Sequence[LabelledImage],
    *,
    batch_size: int = 64,
) -> float:
    """The share of images that the model puts into their class; scored in eval mode, whatever mode it is in.

    Raises:
        LoraFactoryError: When there is no image, or the model has no output for a class.
    """
    if not examples:
        raise LoraFactoryError("no image to score; give at least one labelled image")
    rows, right = inputs.encode(examples), 0
    with frozen(model):
        for start in range(0, len(rows), batch_size):
            batch = inputs.collate(rows[start : start + batch_size], next(model.parameters()).device)
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)
