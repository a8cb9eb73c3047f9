"""The paper's Table 1 and Figure 4: average precision of every method on every detection task, and the drawn boxes."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from lora_factory.collection.trainer import LoRATrainer
from lora_factory.evaluation.detection import Detection, detect, score_detections
from lora_factory.reporting.plots import COLOURS, INK, PAPER, Plot, render, shortened, svg_settings
from lora_factory.reporting.report import markdown_table, render_page
from lora_factory.reporting.tables import Column, Table, best_rows
from lora_factory.tasks.examples import ImageExample
from lora_factory.tasks.task import Task
from lora_factory.utils.files import write_json, write_text
from lora_factory.utils.folders import check_reports
from lora_factory.utils.versions import versions

FIGURES = ("map", "map_50", "map_75")
SHOWN_PIXELS = 240  # the longer side of a picture in the report


def compare_detection(
    trainer: LoRATrainer,
    methods: Mapping[str, Mapping[str, Tensor | None]],
    tasks: Sequence[Task],
    output_dir: str | Path,
    *,
    max_new_tokens: int,
    settings: Mapping[str, Any],
    remark: str = "",
) -> dict[str, Any]:
    """Score adapters on the test splits of detection tasks and write ``detection.json`` and ``detection.md``.

    ``methods`` has the adapter's weights, shape ``(D,)``, per method and task; None stands for the base model alone.
    ``remark`` ends the table's note. The result holds mAP, mAP50 and mAP75 per method and task, and the first test
    image of every task with all boxes.
    """
    folder = check_reports(output_dir, "detection.json", "detection.md")
    cells, found = [], {}
    for method, task in tqdm([(method, task) for method in methods for task in tasks], desc="detect", unit="cell"):
        examples, weights = task.examples("test"), methods[method][task.name]
        trainer.slot.load(trainer.initial if weights is None else weights)  # the initialisation adds nothing
        boxes = detect(trainer.model, trainer.inputs, examples, max_new_tokens=max_new_tokens)
        figures = score_detections(boxes, examples)
        cells.append({"method": method, "task": task.name} | {key: figures[key] for key in FIGURES})
        found[method, task.name] = boxes[0]
    result = {
        "base_model": trainer.layout.base_model,
        "created_with": versions(),
        "methods": list(methods),
        "tasks": [task.name for task in tasks],
        "settings": dict(settings),
        "remark": remark,
        "images": {task.name: len(task.examples("test")) for task in tasks},
        "cells": cells,
        "pictures": [
            picture(task.name, task.examples("test")[0], {method: found[method, task.name] for method in methods})
            for task in tasks
        ],
    }
    write_json(folder / "detection.json", result)
    table = detection_table(result)
    write_text(folder / "detection.md", f"# {table.title}\n\n{markdown_table(table)}\n\n{table.note}\n")
    return result


def write_detection_report(result: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``detection.html``: the table and the drawn boxes of what ``compare_detection`` returned."""
    path = check_reports(folder, "detection.html") / "detection.html"
    page = render_page(
        "report.html",
        base_model=result["base_model"],
        title=f"Detection with {Path(result['base_model']).name}",
        verdict="",
        bars={"methods": []},
        findings=[],
        tables=[detection_table(result)],
        plots=draw_detections(result["methods"], result["pictures"]),
        seeds=result["settings"]["seeds"],
        folds=[""],
        versions=", ".join(f"{name} {it}" for name, it in result["created_with"].items()),
        settings=json.dumps(result["settings"], indent=2, default=str),
    )
    write_text(path, page)
    return path


def detection_table(result: Mapping[str, Any]) -> Table:
    """Table 1's layout: one row per method, mAP50 and mAP75 of every task."""
    cells = {(cell["method"], cell["task"]): cell for cell in result["cells"]}
    columns, best = [Column("method")], set()
    rows = [[method] for method in result["methods"]]
    for task in result["tasks"]:
        for heading, key in (("mAP50", "map_50"), ("mAP75", "map_75")):
            columns.append(Column(heading, task))
            values = [cells[method, task][key] for method in result["methods"]]
            texts = [f"{value:.3f}" for value in values]
            best |= {(row, len(columns) - 1) for row in best_rows(dict(enumerate(values)), texts, max)}
            for row, text in zip(rows, texts, strict=True):
                row.append(text)
    images = ", ".join(f"{task} {count}" for task, count in result["images"].items())
    note = (
        f"COCO's average precision at an overlap of 0.5 and 0.75 on test images ({images}). {result['remark']}".strip()
    )
    title = f"Detection on {result['base_model']}"
    return Table(title, note, tuple(columns), tuple(map(tuple, rows)), frozenset(best))


def draw_detections(methods: Sequence[str], pictures: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Draw the boxes that every method (column) found on every picture (row), as in Figure 4."""
    with svg_settings():
        from matplotlib.figure import Figure
        from PIL import Image

        figure = Figure((1.8 * len(methods), 1.9 * len(pictures)), layout="constrained", facecolor="none")
        panels = figure.subplots(len(pictures), len(methods), squeeze=False)
        for row, shown in zip(panels, pictures, strict=True):
            image = Image.open(io.BytesIO(base64.b64decode(shown["jpeg"])), formats=("JPEG",))
            row[0].set_ylabel(shortened(shown["task"]), color=INK, fontsize=9)
            for axes, method in zip(row, methods, strict=True):
                axes.imshow(image)
                axes.set(xticks=[], yticks=[])
                for box in shown["truth"]:
                    rectangle(axes, box, image.size, COLOURS[2], "--")
                for one in shown["found"][method]:
                    words = f"{shortened(one['label'], 12)} {one['score']:.2f}"
                    rectangle(axes, one["box"], image.size, COLOURS[1], "-", words)
        for axes, method in zip(panels[0], methods, strict=True):
            axes.set_title(shortened(method), color=INK, fontsize=9)
        caption = "Boxes that each method found, with its certainty (solid), and those of the annotation (dashed)."
        return [render(figure, "Boxes", caption)]


def rectangle(axes, box: Sequence[float], size: tuple[int, int], colour: str, style: str, words: str = "") -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (share * length for share, length in zip(box, size * 2, strict=True))
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linestyle=style))
    if words:
        axes.text(left, top, words, fontsize=6, color=PAPER, va="bottom", bbox={"pad": 0.6, "color": colour})


def picture(task: str, example: ImageExample, found: Mapping[str, Sequence[Detection]]) -> dict[str, Any]:
    """A small copy of the image with all boxes, as JSON; boxes as shares of width and height."""
    image = example.open()
    width, height = image.size

    def shares(box: Sequence[float]) -> list[float]:
        return [round(value / length, 4) for value, length in zip(box, (width, height) * 2, strict=True)]

    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
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
