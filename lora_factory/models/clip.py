"""The base class of text and image encoders, and the towers of contrastive models such as CLIP."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.paths import local_path, weights_identifier

if TYPE_CHECKING:
    from PIL import Image

Value = TypeVar("Value")
OPEN_CLIP = "open_clip:"
# The transformers that have get_text_features and get_image_features, with vectors of one space.
TWO_TOWERS = frozenset({"clip", "metaclip_2", "siglip", "siglip2"})


class Encoder:
    """The base class of text and image encoders: a tower computes vectors, which are normalised to length 1.

    Args:
        name_or_path: As the sub-class says.
        device: Where to compute; default: the CPU.
        revision: Branch, tag or commit of a Hub id.

    Attributes:
        width: Size of the vectors.
        identifier: Names the vectors, for example as a cache key: the Hub id with its revision, or a folder's name
            with a hash of its weights.

    Raises:
        LoraFactoryError: When the encoder cannot be loaded, or would start from random weights.
    """

    _open_clip: Any
    _transformers: Any

    def __init__(
        self, name_or_path: str | Path, *, device: str | torch.device | None = None, revision: str | None = None
    ) -> None:
        """Load the encoder."""
        local_path(name_or_path)  # refuses what is no path
        name = os.path.expanduser(name_or_path)
        tower = self._open_clip if name.startswith(OPEN_CLIP) else self._transformers
        self._tower = tower(name, revision, torch.device(device or "cpu"))
        self.width: int = self._tower.width

    @cached_property
    def identifier(self) -> str:
        """The name of the vectors; the weights of a folder are read for it."""
        return str(self._tower.identifier)

    def _unit_vectors(self, values: Sequence[Value], batch_size: int, read: Callable[[Value], Any]) -> Tensor:
        """Encode what ``read`` makes of each value: float32, on the CPU, shape ``(values, width)``."""
        if not len(values):
            return torch.empty(0, self.width)
        starts = range(0, len(values), batch_size)
        with torch.no_grad():
            batches = [self._tower([*map(read, values[start : start + batch_size])]) for start in starts]
        return functional.normalize(torch.cat(batches).float().cpu(), dim=-1)


class OpenClip:
    """An open_clip model of which one tower is kept.

    Args:
        name: ``open_clip:<model>:<pretrained tag or checkpoint>``, ``open_clip:hf-hub:<id>`` or
            ``open_clip:local-dir:<folder>``.
        revision: Must be None: open_clip takes none.
        device: Where to compute.

    Raises:
        LoraFactoryError: When the model cannot be loaded, or would start from random weights.
    """

    width: int

    def __init__(self, name: str, revision: str | None, device: torch.device) -> None:
        import open_clip

        if revision is not None:
            raise LoraFactoryError(f"revision={revision!r}: open_clip takes none; leave it out")
        model, pretrained = parse_open_clip(name)
        try:
            clip, self._transform = open_clip.create_model_from_pretrained(model, pretrained, device=device)
            self._tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise LoraFactoryError(
                f"cannot load {name!r}: {error}; give a checkpoint file or one of open_clip's pretrained tags "
                f"for {model!r} ({tags})"
            ) from error
        self._model: Any = clip.eval()
        self._device = device
        self._name = name

    @property
    def identifier(self) -> str:
        """The name of the vectors; a checkpoint file is read for it."""
        model, pretrained = parse_open_clip(self._name)
        return self._name if pretrained is None else f"{OPEN_CLIP}{model}:{weights_identifier(pretrained, None)}"


class OpenClipText(OpenClip):
    """The text tower of an open_clip model."""

    def __init__(self, name: str, revision: str | None, device: torch.device) -> None:
        super().__init__(name, revision, device)
        self._model.visual = None  # the image tower's memory is not needed
        self.limit = int(self._tokenizer.context_length)
        with torch.no_grad():
            self.width = self(["a"]).shape[-1]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of shape ``(texts, width)``."""
        vectors: Tensor = self._model.encode_text(self._tokenizer(list(texts)).to(self._device))
        return vectors

    def count(self, text: str) -> int:
        """Count the tokens of a text."""
        inner = getattr(self._tokenizer, "tokenizer", None)  # transformers', in open_clip's wrapper
        if inner is not None:
            return len(inner(text, verbose=False).input_ids)
        return len(self._tokenizer.encode(text)) + 2  # open_clip's own puts a token before and one behind


class OpenClipImage(OpenClip):
    """The image tower of an open_clip model."""

    def __init__(self, name: str, revision: str | None, device: torch.device) -> None:
        super().__init__(name, revision, device)
        self.channels = 3
        from PIL import Image

        with torch.no_grad():
            self.width = self([Image.new("RGB", (32, 32))]).shape[-1]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Vectors of RGB images, shape ``(images, width)``."""
        pixels = torch.stack([self._transform(image) for image in images])
        vectors: Tensor = self._model.encode_image(pixels.to(self._device))
        return vectors


def parse_open_clip(name: str) -> tuple[str, str | None]:
    """Split ``open_clip:<model>:<pretrained>``; a name with a scheme brings its weights along."""
    model = name.removeprefix(OPEN_CLIP)
    if model.startswith(("hf-hub:", "local-dir:")):
        return model, None
    model, _, pretrained = model.partition(":")
    if not model or not pretrained:
        from open_clip import list_pretrained_tags_by_model

        tags = ", ".join(list_pretrained_tags_by_model(model)) or "none known for this model"
        raise LoraFactoryError(
            f"{name!r} names no weights, and a random tower knows nothing; "
            f"write open_clip:<model>:<pretrained tag or checkpoint file>, tags: {tags}"
        )
    return model, pretrained
