"""The paper's first experiment as a table and a picture: the boxes of every method's adapter on every task."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from lora_factory._version import __version__
from lora_factory.collection.trainer import AdapterFactory
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.detection import Detection, detect, score_detections
from lora_factory.models.inputs import ImageInputs
from lora_factory.reporting.plots import draw_detections
from lora_factory.reporting.report import markdown_table, render_page
from lora_factory.reporting.tables import detection_table
from lora_factory.tasks.examples import ImageExample
from lora_factory.tasks.task import Task
from lora_factory.utils.files import write_json, write_text
from lora_factory.utils.folders import check_reports
from lora_factory.utils.versions import LIBRARIES

_FIGURES = ("map", "map_50", "map_75")
_SHOWN_PIXELS = 240  # the longer side of a picture in the report


def compare_detection(
    factory: AdapterFactory,
    methods: Mapping[str, Mapping[str, Tensor | None]],
    tasks: Sequence[Task],
    output_dir: str | Path,
    *,
    unseen: Sequence[str] = (),
    pictures: int = 1,
    max_new_tokens: int = 256,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score adapters on the test splits of detection tasks and write ``detection.json``, a table and a page.

    Args:
        factory: The base model with its slot, attached with a processor.
        methods: For every method and task the adapter's weights, shape ``(D,)``; None for the base model alone.
        tasks: Detection tasks.
        output_dir: Folder of the results, made if missing.
        unseen: Names of the tasks that no method was trained on, but the task's own LoRA.
        pictures: Test images a task that are drawn with every method's boxes.
        max_new_tokens: Where an answer is cut off.
        settings: What else a reader should know, seeds among it; told as it is.

    Returns:
        ``cells`` with mAP50, mAP75 and mAP of every method and task, and ``pictures``.

    Raises:
        LoraFactoryError: When the factory reads no images, or an image or an adapter cannot be read.
    """
    if not isinstance(factory.inputs, ImageInputs):
        raise LoraFactoryError("the base model reads texts alone; attach the factory with inputs=model_inputs(…)")
    folder = check_reports(output_dir, "detection.json", "detection.md")
    cells, found = [], {}
    for method, task in tqdm([(method, task) for method in methods for task in tasks], desc="detect", unit="cell"):
        examples, weights = task.examples("test"), methods[method][task.name]
        factory.slot.load(factory.initial if weights is None else weights)  # the initialisation adds nothing
        boxes = detect(factory.model, factory.inputs, examples, max_new_tokens=max_new_tokens)
        figures = score_detections(boxes, examples)
        cells.append({"method": method, "task": task.name} | {key: figures[key] for key in _FIGURES})
        found[method, task.name] = boxes
    result = {
        "base_model": factory.layout.base_model,
        "created_with": {"lora-factory": __version__, **{name: version(name) for name in LIBRARIES}},
        "methods": list(methods),
        "tasks": [task.name for task in tasks],
        "unseen": list(unseen),
        "settings": dict(settings or {}),
        "images": {task.name: len(task.examples("test")) for task in tasks},
        "cells": cells,
        "pictures": [
            _picture(task.name, example, {method: found[method, task.name][number] for method in methods})
            for task in tasks
            for number, example in enumerate(task.examples("test")[:pictures])
        ],
    }
    write_json(folder / "detection.json", result)
    table = detection_table(result)
    write_text(folder / "detection.md", f"# {table.title}\n\n{markdown_table(table)}\n\n{table.note}\n")
    return result


def write_detection_report(result: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``detection.html``: the table and the drawn boxes, requesting nothing from anywhere.

    Args:
        result: What ``compare_detection`` returns.
        folder: Where to; made if missing.

    Raises:
        LoraFactoryError: If the extra ``report`` is not installed.
    """
    path = check_reports(folder, "detection.html") / "detection.html"
    page = render_page(
        base_model=result["base_model"],
        findings=[],
        tables=[detection_table(result)],
        plots=draw_detections(result["methods"], result["pictures"]),
        seeds=result["settings"].get("seeds", "not told"),
        folds=[", ".join(result["unseen"])],
        versions=", ".join(f"{name} {it}" for name, it in result["created_with"].items()),
        settings=json.dumps(result["settings"], indent=2, default=str),
    )
    write_text(path, page)
    return path


def _picture(task: str, example: ImageExample, found: Mapping[str, Sequence[Detection]]) -> dict[str, Any]:
    """A small copy of the image with all boxes, as JSON; boxes as shares of width and height."""
    image = example.open()
    width, height = image.size

    def shares(box: Sequence[float]) -> list[float]:
        return [round(value / length, 4) for value, length in zip(box, (width, height) * 2, strict=True)]

    image.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return {
        "task": task,
        "jpeg": base64.b64encode(buffer.getvalue()).decode(),
        "truth": [shares(box) for box in example.boxes],
        "found": {
            method: [{"label": one.label, "box": shares(one.box), "score": round(one.score, 3)} for one in boxes]
            for method, boxes in found.items()
        },
    }
