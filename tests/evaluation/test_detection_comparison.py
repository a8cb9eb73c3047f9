"""Detection results on paper: Table 1's layout, and the drawn boxes of every method side by side."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from detection_report import detection_table, draw_detections, write_detection_report
from PIL import Image

from lora_factory.reporting.report import markdown_table

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def make_result() -> dict[str, Any]:
    """The original LoRA finds the dog but not the sofa, the generated one both."""
    scores = {
        ("original", "dog"): 0.9,
        ("original", "sofa"): 0.0,
        ("generated", "dog"): 0.9,
        ("generated", "sofa"): 0.5,
    }
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(buffer, format="JPEG")
    box = {"label": "dog", "box": [0.1, 0.1, 0.5, 0.5], "score": 0.875}
    return {
        "base_model": "pico/florence",
        "created_with": {"lora-factory": "0.1.0"},
        "methods": ["original", "generated"],
        "tasks": ["dog", "sofa"],
        "settings": {"seeds": "3, 4"},
        "remark": "Made up for a test.",
        "images": {"dog": 7, "sofa": 5},
        "cells": [
            {"method": method, "task": task, "map": value / 2, "map_50": value, "map_75": value / 3}
            for (method, task), value in scores.items()
        ],
        "pictures": [
            {
                "task": task,
                "jpeg": base64.b64encode(buffer.getvalue()).decode(),
                "truth": [[0.1, 0.1, 0.6, 0.6]],
                "found": {"original": [], "generated": [box]},
            }
            for task in ("dog", "sofa")
        ],
    }


def svg(uri: str) -> str:
    return base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()


def test_table_one() -> None:
    table = detection_table(make_result())
    assert table.headings == [("", 1), ("dog", 2), ("sofa", 2)]
    assert table.rows == (
        ("original", "0.900", "0.300", "0.000", "0.000"),
        ("generated", "0.900", "0.300", "0.500", "0.167"),
    )
    assert table.best == {(1, 3), (1, 4)}  # no winner among equals
    assert "dog 7, sofa 5" in table.note and table.note.endswith(" Made up for a test.")
    assert "**0.500**" in markdown_table(table)


def test_boxes_are_drawn_for_every_method() -> None:
    result = make_result()
    (plot,) = draw_detections(result["methods"], result["pictures"])
    drawing = svg(plot.light)
    assert drawing.count("<image") == 4  # two photos, two methods
    assert len(re.findall(r">dog 0\.88<", drawing)) == 2
    assert all(f">{word}<" in drawing for word in ("original", "generated", "dog", "sofa"))
    assert "#1f2428" in drawing
    assert "#1f2428" not in svg(plot.dark)


def test_a_page_of_its_own(tmp_path: Path) -> None:
    page = write_detection_report(make_result(), tmp_path).read_text(encoding="utf-8")
    assert "Detection on pico/florence" in page
    assert "<dt>Seeds</dt><dd>3, 4</dd>" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
