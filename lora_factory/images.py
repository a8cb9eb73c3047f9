"""Images as they come, from a file or in memory, in the one form that a model's processor takes."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from lora_factory.errors import LoraFactoryError
from lora_factory.files import local_path, sha256_file

ImageLike = str | Path | bytes | Image.Image
IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_image(image: ImageLike, channels: int = 3) -> Image.Image:
    """An image turned upright, without transparency (on white) and EXIF data, in 8 bits: RGB, or grey for one channel.

    Grey of 16 bits is scaled: 65535 is white. So is that of the modes I and F where a value is above 255.

    Args:
        image: A file, a file's content, or an image of any mode.
        channels: How many colour channels the model reads, 1 or 3.

    Raises:
        LoraFactoryError: When the file is missing, cut short or no image.
    """
    if not isinstance(image, Image.Image):
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
                file.load()
                image = file
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = f"of {len(image)} bytes" if isinstance(image, bytes) else repr(str(image))
            raise LoraFactoryError(f"cannot read the image {name}: {error}; give a whole image file") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # convert() would cut off what is above 255
        values = numpy.asarray(image, dtype=numpy.float64)
        deep = image.mode.startswith("I;16") or values.max() > 255
        image = Image.fromarray((values / 257 if deep else values).clip(0, 255).round().astype(numpy.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    image.info.clear()
    return image


def images_in(folder: str | Path) -> list[Path]:
    """The image files of a folder, in the order of their names.

    Raises:
        LoraFactoryError: When there is none.
    """
    folder = local_path(folder)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = [file for file in files if file.suffix.lower() in IMAGE_ENDINGS and file.is_file()]
    if not images:
        raise LoraFactoryError(
            f"no image in {folder}; give a folder with files that end in {', '.join(IMAGE_ENDINGS)}"
        )
    return images


def image_fingerprint(image: ImageLike) -> str:
    """SHA-256 of a file's content, or of the size, mode and pixels of an image in memory."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else sha256_file(image)
