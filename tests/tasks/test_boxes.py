"""Boxes as location tokens: exact to half a bin, equal to transformers' bins, and read back from any text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.boxes import BINS, Box, boxes_to_text, clipped, quantise, text_to_boxes

sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
shares = st.tuples(*[st.floats(0, 1)] * 4)


def box_in(size: tuple[int, int], part: tuple[float, ...]) -> Box:
    (x1, x2), (y1, y2) = sorted(part[:2]), sorted(part[2:])
    return Box(x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1])


@settings(deadline=None)
@given(sizes, st.lists(shares, min_size=1, max_size=4))
def test_a_box_comes_back_to_half_a_bin(size: tuple[int, int], parts: list[tuple[float, ...]]) -> None:
    boxes = [box_in(size, part) for part in parts]
    found = text_to_boxes(boxes_to_text("traffic light", boxes, size), size)
    assert {one.label for one in found} == {"traffic light"}
    assert len(found) == len(boxes)
    for before, after in zip(boxes, found, strict=True):
        for old, new, length in zip(before, after.box, (*size, *size), strict=True):
            assert abs(old - new) <= length / BINS / 2 * (1 + 1e-9)


@settings(deadline=None)
@given(sizes, shares)
def test_bins_are_those_of_transformers(size: tuple[int, int], part: tuple[float, ...]) -> None:
    class Nothing:
        all_special_tokens = ()

    box = box_in(size, part)
    theirs = Florence2PostProcessor(None, Nothing()).quantize(torch.tensor([box], dtype=torch.float64), size)[0]
    # On the border of two bins rounding decides, here and there.
    assert all(abs(ours - other) <= 1 for ours, other in zip(quantise(box, size), theirs.tolist(), strict=True))
    if all(
        0.01 < rest < 0.99 for rest in (value * BINS / s % 1 for value, s in zip(box, (*size, *size), strict=True))
    ):
        assert quantise(box, size) == theirs.tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a dog", []),
        ("dog<loc_0><loc_0><loc_499>", []),
        ("dog<loc_0><loc_0><loc_499><loc_999>", [("dog", (0.05, 0.05, 49.95, 99.95))]),
        ("dog<loc_0><loc_0><loc_499><loc_999><loc_7>", [("dog", (0.05, 0.05, 49.95, 99.95))]),
        ("dog<loc_9><loc_0><loc_3><loc_5>", []),
        (
            " cat <loc_0><loc_0><loc_9><loc_9> sofa<loc_1><loc_1><loc_1><loc_1>",
            [("cat", (0.05, 0.05, 0.95, 0.95)), ("sofa", (0.15, 0.15, 0.15, 0.15))],
        ),
    ],
    ids=["nothing", "no box", "three numbers", "one box", "a rest", "ends before it begins", "two labels"],
)
def test_whatever_a_model_writes_can_be_read(text: str, expected: list[tuple[str, tuple[float, ...]]]) -> None:
    found = text_to_boxes(text, (100, 100))
    assert [one.label for one in found] == [label for label, _ in expected]
    for one, (_, box) in zip(found, expected, strict=True):
        assert one.box == pytest.approx(box)
        assert text[one.start : one.end].count("<loc_") == 4


def test_boxes_are_cut_off_at_the_image() -> None:
    boxes = [Box(-5, 2, 4, 50), Box(20, 1, 30, 2), Box(3, 3, 3, 9), Box(1, 1, 2, 2)]
    assert clipped(boxes, (10, 20), "photo") == [Box(0, 2, 4, 20), Box(1, 1, 2, 2)]
    with pytest.raises(LoraFactoryError, match=r"photo: the box .*nan.* four finite numbers"):
        clipped([Box(0, 0, float("nan"), 1)], (10, 20), "photo")
