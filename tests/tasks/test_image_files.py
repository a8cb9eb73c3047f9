"""Images of every mode in one form, and damaged ones refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
from helpers.images import picture
from PIL import Image

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import StoredImage
from lora_factory.tasks.image_files import check_image, image_fingerprint, images_in, read_image


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "F"])
@pytest.mark.parametrize(("channels", "expected"), [(1, "L"), (3, "RGB")])
def test_every_mode_is_read(mode: str, channels: int, expected: str) -> None:
    image = read_image(picture(0, mode), channels)
    assert (image.mode, image.size) == (expected, (8, 8))


def test_transparency_shows_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert list(read_image(image).get_flattened_data()) == [(255, 255, 255), (10, 20, 30)]


@pytest.mark.parametrize("kind", [numpy.uint16, numpy.int32, numpy.float32])
def test_sixteen_bits_are_scaled(kind: type) -> None:
    image = Image.fromarray(numpy.array([[0, 256 * 100, 65535]], dtype=kind))
    assert list(read_image(image, 1).get_flattened_data()) == [0, 100, 255]


def test_dark_images_stay_dark(tmp_path: Path) -> None:
    image = Image.fromarray(numpy.array([[0, 200, 257]], dtype=numpy.uint16))
    image.save(tmp_path / "dark.png")
    assert list(read_image(image, 1).get_flattened_data()) == [0, 1, 1]
    shades = [(value,) * 3 for value in (0, 1, 1)]
    assert list(read_image(tmp_path / "dark.png").get_flattened_data()) == shades
    assert list(StoredImage.of(tmp_path / "dark.png").open().get_flattened_data()) == shades
    for mode in ("I", "F"):  # no deeper than a byte, where nothing is above it
        assert read_image(picture(0, "L").convert(mode), 1).tobytes() == picture(0, "L").tobytes()


def test_a_file_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    image = Image.new("RGB", (4, 2))
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (2, 4)


def test_file_and_content_are_the_same_image(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert read_image(content).tobytes() == read_image(str(tmp_path / "a.png")).tobytes() == picture(1).tobytes()
    assert image_fingerprint(content) == image_fingerprint(tmp_path / "a.png")
    assert image_fingerprint(picture(1)) != image_fingerprint(picture(2))
    assert image_fingerprint(picture(1).resize((16, 4))) != image_fingerprint(picture(1).resize((4, 16)))


def test_broken_images_are_one_error(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture(0, size=64).save(stream, "png")
    cut = stream.getvalue()[:1000]
    (tmp_path / "cut.png").write_bytes(cut)
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png", "absent.png"):
        with pytest.raises(LoraFactoryError, match=rf"cannot read the image '.*{name}'.*give a whole image file"):
            read_image(tmp_path / name)
    with pytest.raises(LoraFactoryError, match="cannot read the image of 1000 bytes"):
        read_image(cut)


def test_images_in_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in images_in(tmp_path)] == ["a.jpg", "b.PNG"]
    for name in (".ipynb_checkpoints/a.jpg", "._a.jpg", "more/deep/c.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in images_in(tmp_path)] == ["a.jpg", "b.PNG", "c.gif"]
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(LoraFactoryError, match="no image in"):
            images_in(folder)
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_images_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_image("~/red.png").getpixel((0, 0)) == (255, 0, 0)
    assert image_fingerprint("~/red.png") == image_fingerprint(tmp_path / "red.png")
    check_image("~/red.png", "red")


def test_images_in_memory_without_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.png")
    closed = Image.open(tmp_path / "red.png")
    closed.close()
    for image in (closed, Image.new("RGB", (0, 5))):
        with pytest.raises(LoraFactoryError, match="in memory"):
            read_image(image)
