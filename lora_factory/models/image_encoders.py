"""Vectors of images, for task vectors: the mean over a task's images (Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from lora_factory.errors import LoraFactoryError
from lora_factory.models.clip import TWO_TOWERS, Encoder, OpenClipImage
from lora_factory.models.hidden_states import FEATURE_EXAMPLES
from lora_factory.models.loading import load_pretrained
from lora_factory.tasks.image_files import ImageLike, image_fingerprint, read_image
from lora_factory.utils.cache import TensorCache
from lora_factory.utils.paths import cache_folder, weights_identifier
from lora_factory.utils.progress import progress_bar


class _AnyImageModel:
    """Loads an image model; of a CLIP or SigLIP that was saved as a classifier, the image tower: it has no other."""

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> tuple[Any, Any]:  # noqa: ANN401
        config = AutoConfig.from_pretrained(source, revision=options["revision"], trust_remote_code=False)
        classifies = any(name.endswith("ForImageClassification") for name in config.architectures or ())
        if not (classifies and config.model_type in TWO_TOWERS):
            return AutoModel.from_pretrained(source, **options)
        model, report = AutoModelForImageClassification.from_pretrained(source, **options)
        return model.vision_model, report


class _ImageModel:
    """An image model of transformers: CLIP's or SigLIP's image tower, else the first and the mean hidden state."""

    def __init__(self, name: str, revision: str | None, device: torch.device) -> None:
        self._model, self._processor = load_pretrained(
            name,
            (_AnyImageModel, AutoImageProcessor),
            "image encoder",
            "an image model with its image processor, or open_clip:<model>:<pretrained tag>",
            revision=revision,
            spare="pooler",  # hidden states make no use of it, and classifiers are saved without
            dtype=torch.float32,
        )
        self._model.to(device)
        self.channels = image_channels(self._model.config)
        self._name, self._revision = name, revision
        with torch.no_grad():
            self.width: int = self([read_image(Image.new("RGB", (32, 32)), self.channels)]).shape[-1]

    @property
    def identifier(self) -> str:
        """The name of the vectors; a folder's weights are read for it."""
        return weights_identifier(self._name, self._revision)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self._processor(list(images), return_tensors="pt")["pixel_values"].to(self._model.device)
        if self._model.config.model_type in TWO_TOWERS:
            vectors: Tensor = self._model.get_image_features(pixel_values=pixels).pooler_output
            return vectors
        hidden: Tensor = self._model(pixel_values=pixels).last_hidden_state
        if hidden.ndim == 4:  # a convolutional network's map has no first token
            return hidden.mean((2, 3))
        return torch.cat([hidden[:, 0], hidden.mean(1)], dim=-1)


class ImageEncoder(Encoder):
    """An image encoder: one unit vector per image.

    A CLIP or SigLIP gives the vectors of its image tower, which live in one space with its texts: there the mean over
    images and descriptions together is a task vector too. Another model, for example the classifier that the adapters
    are for, gives its hidden states as `HiddenStateEncoder` does those of a language model.

    ``name_or_path`` is the Hub id or folder of a transformers image model; or ``open_clip:<model>:<pretrained tag or
    checkpoint>``, ``open_clip:hf-hub:<id>`` or ``open_clip:local-dir:<folder>``.
    """

    _open_clip, _transformers = OpenClipImage, _ImageModel

    def encode(self, images: Sequence[ImageLike], *, batch_size: int = 32) -> Tensor:
        """Encode images; each vector depends on its own image alone.

        Args:
            images: Files, or images in memory, of any size and mode; on white where they are transparent.
            batch_size: Images per forward pass.

        Returns:
            L2-normalised vectors, float32, on the CPU, shape ``(images, width)``.

        Raises:
            LoraFactoryError: When a file is missing, cut short or no image.
        """
        return self._unit_vectors(images, batch_size, lambda image: read_image(image, self._tower.channels))


def image_vectors(encoder: ImageEncoder, images: Mapping[str, Sequence[ImageLike]]) -> dict[str, Tensor]:
    """Vectors of every task's first 128 images, from the cache where they are.

    Args:
        encoder: What encodes them.
        images: At least one image by the name of the task.

    Returns:
        Shape ``(images, width)`` by the name of the task; a progress bar shows on the main process.

    Raises:
        LoraFactoryError: When a task has no image, or one cannot be read.
    """
    cache, vectors, identifier = TensorCache(cache_folder() / "features"), {}, encoder.identifier
    hidden = not PartialState().is_local_main_process
    for task, given in progress_bar(images.items(), desc="images", unit="tasks", disable=hidden):
        if not len(given):
            raise LoraFactoryError(f"task {task!r} has no image; give at least one of every task")
        keys = [image_fingerprint(image) for image in given[:FEATURE_EXAMPLES]]
        known = dict(zip(keys, given, strict=False))

        def encode(missing: list[str], known: dict[str, ImageLike] = known) -> Tensor:
            return encoder.encode([known[key] for key in missing])

        vectors[task] = cache.get_or_compute(identifier, keys, encode)
    return vectors


def image_channels(config: Any) -> int:  # noqa: ANN401
    """The number of colour channels of a model's images, by its configuration or that of its image tower."""
    values = config.to_dict()
    return int(values.get("vision_config", values).get("num_channels", 3))
