"""Images as they come, from a file or in memory, in the one form that a model's processor takes."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.paths import local_path, sha256_file
from lora_factory.utils.safe_files import check_ordinary, reading

ImageLike = str | Path | bytes | Image.Image
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # 400 MB as RGBA
MAX_IMAGE_BYTES = 1 << 30
IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@contextlib.contextmanager
def opened_image(source: str | Path | bytes, name: str, remedy: str) -> Iterator[Image.Image]:
    """Open an image file of a known format and size; it is not decoded yet.

    Args:
        source: A file or a file's content.
        name: Names the image in errors.
        remedy: What the user can do about a damaged one.

    Raises:
        LoraFactoryError: The file is missing, of another format, or damaged, or it holds more than `MAX_PIXELS`; also
            when the block raises, which decodes the image.
    """
    Image.init()  # without it, Pillow knows some of these formats only after it has met one
    with reading(name, remedy):
        if not isinstance(source, bytes):
            source = local_path(source)
            check_ordinary(source, MAX_IMAGE_BYTES)
        # Without formats=, a file of PostScript starts Ghostscript, whatever its name is.
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise LoraFactoryError(
                    f"{name} has {file.width} x {file.height} pixels, at most {MAX_PIXELS:,} are read; make it smaller"
                )
            yield file


def check_image(source: str | Path | bytes, name: str) -> None:
    """Raise a `LoraFactoryError` unless the image can be opened; it is not decoded."""
    with opened_image(source, name, "give a whole image file"):
        pass


def read_image(image: ImageLike, channels: int = 3) -> Image.Image:
    """An image turned upright, without transparency (on white) and EXIF data, in 8 bits: RGB, or grey for one channel.

    Grey of 16 bits is scaled: 65535 is white. So is that of the modes I and F where a value is above 255.

    Args:
        image: A file, a file's content, or an image of any mode.
        channels: How many colour channels the model reads, 1 or 3.

    Raises:
        LoraFactoryError: When the file is missing, cut short or no image.
    """
    if isinstance(image, Image.Image):
        with reading("the image in memory", "give one that is open"):
            image.load()
        if not image.width * image.height:
            raise LoraFactoryError(f"an image in memory has {image.width} x {image.height} pixels; leave it out")
    else:
        name = f"of {len(image)} bytes" if isinstance(image, bytes) else repr(str(image))
        try:
            with opened_image(image, f"image {name}", "give a whole image file") as file:
                file.load()
                image = file
        except LoraFactoryError as error:
            raise LoraFactoryError(f"cannot read the image {name}: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # convert() would cut off what is above 255
        image = _in_8_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    image.info.clear()
    return image


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits in 8; strip by strip, since all of it as numbers would be 8 times the file."""
    highest = image.getextrema()[1]
    deep = image.mode.startswith("I;16") or (isinstance(highest, int | float) and highest > 255)
    result = Image.new("L", image.size)
    rows = max(1, (1 << 22) // max(1, image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        values = numpy.nan_to_num(numpy.asarray(strip, dtype=numpy.float64))
        values = (values / 257 if deep else values).clip(0, 255).round().astype(numpy.uint8)
        result.paste(Image.fromarray(values), (0, top))
    return result


def images_in(folder: str | Path) -> list[Path]:
    """The image files of a folder and of the folders in it, in the order of their paths; hidden ones are left out.

    Raises:
        LoraFactoryError: When there is none.
    """
    folder = local_path(folder)
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    images = [
        file
        for file in files
        if file.suffix.lower() in IMAGE_ENDINGS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not images:
        raise LoraFactoryError(
            f"no image in {folder}; give a folder with files that end in {', '.join(IMAGE_ENDINGS)}"
        )
    return images


def image_fingerprint(image: ImageLike) -> str:
    """SHA-256 of a file's content, or of the size, mode and pixels of an image in memory.

    Raises:
        LoraFactoryError: When the file cannot be read.
    """
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    path = local_path(image)
    with reading(path, "give a whole image file"):
        check_ordinary(path, MAX_IMAGE_BYTES)
        return sha256_file(path)
