"""Boxes as text: corners in pixels, quantised to the thousand location tokens of Florence-2, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora_factory.errors import LoraFactoryError

BINS = 1000
_LOCATION = re.compile(r"<loc_(\d+)>")
_PHRASE = re.compile(r"([^<]*)((?:<loc_\d+>)+)")


class Box(NamedTuple):
    """The corners of a box in pixels, from the image's upper left; ``x2`` and ``y2`` lie behind the last pixel."""

    x1: float
    y1: float
    x2: float
    y2: float


class FoundBox(NamedTuple):
    """A box in a text.

    Attributes:
        label: What it shows.
        box: Where it is, in pixels.
        start: Where its location tokens start in the text.
        end: Where they end.
    """

    label: str
    box: Box
    start: int
    end: int


def boxes_to_text(label: str, boxes: Iterable[Box], size: tuple[int, int]) -> str:
    """Write boxes as Florence-2 does: ``label<loc_x1><loc_y1><loc_x2><loc_y2>…``, the label once.

    Args:
        label: What the boxes show.
        boxes: Inside the image.
        size: The image's width and height in pixels.
    """
    numbers = [number for box in boxes for number in quantise(box, size)]
    return label + "".join(f"<loc_{number}>" for number in numbers)


def text_to_boxes(text: str, size: tuple[int, int]) -> list[FoundBox]:
    """Read the boxes of a text that a model wrote; what is no box is passed over.

    Four locations are a box, what is left of them none, and no box ends before it begins. Locations without a label
    of their own belong to the label before them.

    Args:
        text: ``label<loc_…>…``, any number of times.
        size: The image's width and height in pixels.
    """
    found, label = [], ""
    for phrase in _PHRASE.finditer(text):
        label = phrase[1].strip() or label
        places = list(_LOCATION.finditer(phrase[2]))
        for first in range(0, len(places) - 3, 4):
            four = places[first : first + 4]
            box = dequantise([int(place[1]) for place in four], size)
            if box.x1 <= box.x2 and box.y1 <= box.y2:
                offset = phrase.start(2)
                found.append(FoundBox(label, box, offset + four[0].start(), offset + four[3].end()))
    return found


def quantise(box: Box, size: tuple[int, int]) -> list[int]:
    """The four bins, 0 to 999, that a box's corners lie in; ``size`` is the image's width and height."""
    return [
        min(max(math.floor(value * BINS / length), 0), BINS - 1)
        for value, length in zip(box, (*size, *size), strict=True)
    ]


def dequantise(bins: Sequence[int], size: tuple[int, int]) -> Box:
    """The middles of four bins, in pixels: off by half a bin at most, as transformers' own, which rounds, is not."""
    lengths = zip(bins, (*size, *size), strict=True)
    return Box(*((min(number, BINS - 1) + 0.5) * length / BINS for number, length in lengths))


def clipped(boxes: Iterable[Box], size: tuple[int, int], where: str) -> list[Box]:
    """The parts of boxes that lie inside the image; boxes without any area there are left out.

    Args:
        boxes: In pixels.
        size: The image's width and height.
        where: Names the image in errors.

    Raises:
        LoraFactoryError: When a coordinate is not a finite number.
    """
    kept = []
    for box in boxes:
        if len(box) != 4 or not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
            raise LoraFactoryError(f"{where}: the box {list(box)} must be four finite numbers; repair or remove it")
        x1, x2 = (min(max(value, 0.0), float(size[0])) for value in (box[0], box[2]))
        y1, y2 = (min(max(value, 0.0), float(size[1])) for value in (box[1], box[3]))
        if x1 < x2 and y1 < y2:
            kept.append(Box(x1, y1, x2, y2))
    return kept
