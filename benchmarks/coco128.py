"""Average precision and box tokens on 128 real COCO images: equal to pycocotools, and exact to half a bin.

    LORA_FACTORY_SHARED=../shared python benchmarks/coco128.py

Predictions are the annotated boxes, moved and resized at random, some dropped, some under another name, some of
nothing. Ours go through ``mean_average_precision``, theirs through pycocotools on the annotation file itself.
"""

import contextlib
import io
import json
import os
import random
from importlib.metadata import version
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lora_factory.evaluation.detection import Detection, mean_average_precision
from lora_factory.tasks.boxes import BINS, Box, boxes_to_text, text_to_boxes
from lora_factory.tasks.coco_tasks import detection_tasks
from lora_factory.tasks.image_sources import read_coco
from lora_factory.tasks.text import SPLITS


def main() -> None:
    folder = Path(os.environ.get("LORA_FACTORY_SHARED", "../shared")) / "data" / "coco128"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing; set LORA_FACTORY_SHARED to the folder of the shared data")
    annotations = folder / "annotations.json"
    coco = read_coco(annotations)
    truth = {number: [] for number in coco.images}
    for label, images in coco.boxes.items():
        for number, boxes in images.items():
            truth[number] += [(label, box) for box in boxes]
    worst = max(
        bins_off(box, back_and_forth(label, box, coco.images[number][1]), coco.images[number][1])
        for number, pairs in truth.items()
        for label, box in pairs
    )
    print(
        f"{sum(map(len, truth.values()))} boxes on {len(truth)} images; box -> token -> box: {worst:.4f} bins at worst"
    )
    assert worst <= 0.5 + 1e-9
    for seed in range(3):
        found = perturbed(truth, list(coco.boxes), seed)
        ours = mean_average_precision(list(found.values()), list(truth.values()))
        theirs = with_pycocotools(annotations, found)
        difference = max(abs(ours[name] - theirs[name]) for name in theirs)
        figures = ", ".join(f"{name} {ours[name]:.6f}" for name in ("map", "map_50", "map_75"))
        print(f"seed {seed}: {figures}; furthest from pycocotools over {len(theirs)} figures: {difference:.1e}")
        assert difference < 1e-6
    tasks = detection_tasks(folder / "images", annotations)
    sizes = {
        task.name: sum(len(task.examples(split)) for split in SPLITS) for task in tasks if enough(coco, task.name)
    }
    print(f"{len(tasks)} categories with images, {len(sizes)} of them with 10 or more: {sizes}")
    names = ("lora-factory", "torchmetrics", "faster-coco-eval", "pycocotools")
    print(json.dumps({name: version(name) for name in names}))


def enough(coco, name: str) -> bool:
    return len(coco.boxes.get(name, coco.boxes.get(name.replace("_", " "), ()))) >= 10


def back_and_forth(label: str, box: Box, size: tuple[int, int]) -> Box:
    return text_to_boxes(boxes_to_text(label, [box], size), size)[0].box


def bins_off(old: Box, new: Box, size: tuple[int, int]) -> float:
    return max(abs(a - b) / length * BINS for a, b, length in zip(old, new, size * 2, strict=True))


def perturbed(truth: dict, labels: list[str], seed: int) -> dict[int, list[Detection]]:
    source = random.Random(seed)
    found = {}
    for number, pairs in truth.items():
        rows = [Detection(source.choice(labels), Box(10, 10, 90, 60), source.random())]
        for label, box in pairs:
            if source.random() < 0.9:
                width, height = box.x2 - box.x1, box.y2 - box.y1
                x, y = box.x1 + source.gauss(0, 0.08) * width, box.y1 + source.gauss(0, 0.08) * height
                wide, high = width * source.uniform(0.8, 1.25), height * source.uniform(0.8, 1.25)
                kind = source.choice(labels) if source.random() < 0.1 else label
                rows.append(Detection(kind, Box(x, y, x + wide, y + high), source.random()))
        found[number] = rows
    return found


def with_pycocotools(annotations: Path, found: dict[int, list[Detection]]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(annotations)
        number = {category["name"]: category["id"] for category in reference.loadCats(reference.getCatIds())}
        results = [
            {
                "image_id": image,
                "category_id": number[one.label],
                "bbox": [one.box.x1, one.box.y1, one.box.x2 - one.box.x1, one.box.y2 - one.box.y1],
                "score": one.score,
            }
            for image, rows in found.items()
            for one in rows
        ]
        judge = COCOeval(reference, reference.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    figures = dict(zip(("map", "map_50", "map_75"), judge.stats.tolist(), strict=False))
    names = {value: key for key, value in number.items()}
    for index, category in enumerate(judge.params.catIds):
        precision = judge.eval["precision"][:, :, index, 0, -1]
        if precision.min() >= 0:  # -1: no such box is annotated
            figures |= {f"map/{names[category]}": precision.mean(), f"map_50/{names[category]}": precision[0].mean()}
            figures[f"map_75/{names[category]}"] = precision[5].mean()
    return figures


if __name__ == "__main__":
    main()
