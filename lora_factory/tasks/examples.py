"""Examples with an image, which is opened when it is used."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.boxes import Box, boxes_to_text, clipped
from lora_factory.tasks.image_files import MAX_IMAGE_BYTES, opened_image, read_image
from lora_factory.utils.safe_files import read_bytes

DETECTION_PROMPT = "<OD>"  # Florence-2's own name for object detection


@dataclass(frozen=True)
class StoredImage:
    """An image that is read when it is used.

    Attributes:
        name: File or data-set row, for error messages; images of one name are the same.
        read: Returns the bytes of the image file.
    """

    name: str
    read: Callable[[], bytes] = field(compare=False, repr=False)

    @classmethod
    def of(cls, image: StoredImage | Image.Image | str | Path) -> StoredImage:
        """The image of a file, or one that is in memory, kept as PNG."""
        if isinstance(image, StoredImage):
            return image
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            content = buffer.getvalue()
            return cls(f"image {hashlib.sha256(content).hexdigest()[:12]}", lambda: content)
        path = Path(image).expanduser()
        return cls(str(image), partial(read_bytes, path, MAX_IMAGE_BYTES))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes."""
        return hashlib.sha256(self._bytes()).hexdigest()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright; only the file's head is decoded."""
        with self._file() as file:
            width, height = file.size
            lies = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (height, width) if lies else (width, height)

    def open(self) -> Image.Image:
        """The image in RGB, as `read_image` gives it.

        Raises:
            LoraFactoryError: The file is missing, or not a whole image.
        """
        with self._file() as file:
            file.load()
            return read_image(file)

    @contextmanager
    def _file(self) -> Iterator[Image.Image]:
        content = self._bytes()
        with opened_image(content, self.name, "replace the image, or remove it from the data") as file:
            yield file

    def _bytes(self) -> bytes:
        try:
            return self.read()
        except OSError as error:
            raise LoraFactoryError(f"{self.name} cannot be read ({error}); check the folder of images") from error


@dataclass(frozen=True)
class ImageExample:
    """One image with what a model is asked about it and what it is to answer; the loss falls on the answer only.

    Attributes:
        image: Given as a file, a PIL image or a stored one.
        prompt: The question, or one of the model's own task words.
        completion: The answer; for detection the label and its boxes as location tokens.
        boxes: For detection the boxes themselves, in pixels.
        label: What the boxes show.
        size: For detection width and height of the image that the boxes refer to.
    """

    image: StoredImage
    prompt: str
    completion: str
    boxes: tuple[Box, ...] = ()
    label: str = ""
    size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Take a file or a PIL image for a stored one."""
        object.__setattr__(self, "image", StoredImage.of(self.image))

    @classmethod
    def of_boxes(
        cls,
        image: StoredImage | Image.Image | str | Path,
        label: str,
        boxes: Sequence[Sequence[float]],
        *,
        size: tuple[int, int] | None = None,
        prompt: str = DETECTION_PROMPT,
    ) -> ImageExample:
        """A detection example; boxes are cut off at the image's edges, those without area in it are left out.

        Args:
            image: File, PIL image or stored image.
            label: What the boxes show.
            boxes: Corners x1, y1, x2, y2 in pixels.
            size: Width and height of the image; default: read from it.
            prompt: What the model is asked.

        Raises:
            LoraFactoryError: A coordinate is not finite, or the image cannot be read.
        """
        stored = StoredImage.of(image)
        size = size or stored.size
        inside = clipped((Box(*box) for box in boxes), size, stored.name)
        completion = boxes_to_text(label, inside, size) if inside else ""
        return cls(stored, prompt, completion, tuple(inside), label, size)

    def open(self) -> Image.Image:
        """The image in RGB, see `StoredImage.open`.

        Raises:
            LoraFactoryError: It cannot be read, or has not the size that its boxes refer to.
        """
        image = self.image.open()
        if self.boxes and image.size != self.size:
            raise LoraFactoryError(
                f"{self.image.name} is {image.size[0]} x {image.size[1]} pixels (upright), but its boxes are for"
                f" {self.size[0]} x {self.size[1]}; give the image that was annotated"
            )
        return image

    def facts(self) -> list[Any]:
        """Everything that a training depends on, as JSON; the image by its bytes."""
        return [self.image.sha256, self.prompt, self.completion, self.boxes, self.label]


class Example(NamedTuple):
    """One training text: the loss falls on the completion only; plain text has an empty prompt."""

    prompt: str
    completion: str
