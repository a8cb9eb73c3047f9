"""The paper's first experiment: detection adapters for Florence-2 on categories of COCO, generated from descriptions.

    python benchmarks/paper_detection.py                      # from the Hub, on a GPU
    python benchmarks/paper_detection.py --images train2017 --annotations instances_train2017.json
    python benchmarks/paper_detection.py --smoke              # the same code offline, on random tiny models

From the paper: rank 2, 150 epochs with the last 50 kept, the 12-layer 1-D CNN with its loss (KL weight 0.005),
2,000 epochs of the generator, CLIP's text encoder, five categories (COCO's couch and motorcycle are its sofa and
motorbike). The adapted modules follow from its Table 4: 241,241 weights a rank are those of q, k, v, fc2 and the
output layer of Florence-2-base. Not in the paper, and chosen here: learning rate, batch size, alpha, number of images.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from detection_report import compare_detection, detection_table, write_detection_report
from paper_recipe import GENERATOR_EPOCHS, SMOKE_REMARK, TEXT_ENCODER, paper_generator, paper_methods
from PIL import Image, ImageDraw
from tiny_models import tiny_florence, tiny_text_encoder

from lora_factory import CollectArguments, collect_adapters, train_generator
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.models.inputs import model_inputs
from lora_factory.models.loading import load_base_model, load_processor
from lora_factory.reporting.report import markdown_table
from lora_factory.tasks.coco_tasks import DESCRIPTIONS, detection_tasks
from lora_factory.tasks.image_sources import ImageRows
from lora_factory.tasks.task import Task

BASE_MODEL = "florence-community/Florence-2-base"
DATA_SET = "detection-datasets/coco"  # its boxes are x1, y1, x2, y2
CATEGORIES = ("dog", "bicycle", "cat", "couch", "motorcycle")
COLLECT = CollectArguments(
    rank=2,
    lora_alpha=4.0,
    target_modules="q_proj,k_proj,v_proj,fc2,lm_head",
    epochs=150,
    snapshots=50,
    batch_size=8,
    sequence_length=256,
    packing=False,
    learning_rate=1e-4,
    dtype="float32",
)
SMOKE = replace(
    COLLECT,
    target_modules=f"{COLLECT.target_modules},conv",
    epochs=80,  # of one step; after 50 one of the two LoRAs does not write its box yet
    snapshots=2,
    batch_size=8,
    sequence_length=32,
    learning_rate=1e-2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("detection-output"), help="folder of all results")
    parser.add_argument("--images", type=Path, help="folder of COCO's images (default: the Hub's)")
    parser.add_argument("--annotations", type=Path, help="COCO's annotation file, with --images")
    parser.add_argument("--categories", default=",".join(CATEGORIES), help="comma-separated names")
    parser.add_argument("--images-per-category", type=int, default=200, help="training images per category")
    parser.add_argument("--smoke", action="store_true", help="seconds, offline: random tiny models, drawn images")
    options = parser.parse_args()
    base, text_encoder, collect, epochs = BASE_MODEL, TEXT_ENCODER, COLLECT, GENERATOR_EPOCHS
    categories = options.categories.split(",")
    if options.smoke:
        collect, epochs, categories = SMOKE, 3, ["disc", "square"]
        base = str(tiny_florence(options.output / "models" / "florence", [" ".join(DESCRIPTIONS), *categories]))
        text_encoder = str(tiny_text_encoder(options.output / "models" / "text-encoder", DESCRIPTIONS))
        options.images, options.annotations = draw_data_set(options.output / "data", categories)
    if options.images:
        tasks = detection_tasks(options.images, options.annotations, categories)
    else:
        tasks = [hub_task(category) for category in categories]
    tasks = [shortened(task, options.images_per_category) for task in tasks]

    zoo = collect_adapters(tasks, base, options.output / "zoo", collect, base_model_name=BASE_MODEL)
    train = paper_generator(zoo, epochs, text_encoder)
    generator = train_generator(zoo, options.output / "generator", train, overwrite=True)

    accelerator = Accelerator()
    model, tokenizer = load_base_model(base, dtype=collect.dtype, device=accelerator.device)
    inputs = model_inputs(model, load_processor(base))
    trainer = LoRATrainer.attach(model, tokenizer, collect, BASE_MODEL, accelerator, inputs)
    methods = paper_methods(zoo, generator, tasks, accelerator.device, options.smoke)
    result = compare_detection(
        trainer,
        methods,
        tasks,
        options.output,
        max_new_tokens=collect.sequence_length,
        settings={"seeds": "0", "collect": vars(collect), "train": vars(train)},
        remark=SMOKE_REMARK if options.smoke else "",
    )
    table = detection_table(result)
    print(f"{markdown_table(table)}\n\n{table.note}\n")
    print(json.dumps(result["created_with"]))
    print(f"wrote {write_detection_report(result, options.output)}")


def hub_task(category: str) -> Task:
    """A category of the Hub's COCO: learned on its training images, tested on its validation images."""
    source = ImageRows(DATA_SET, splits={"train": "train", "test": "val"}, category=category, box_format="xyxy")
    return Task(category.replace(" ", "_"), tuple(text.format(category) for text in DESCRIPTIONS), source)


def shortened(task: Task, images: int) -> Task:
    """The same task with fewer images, the test split whole."""
    train, validation = task.examples("train")[:images], task.examples("validation")[:images]
    return Task.from_examples(task.name, task.descriptions, train, validation, task.examples("test"))


def draw_data_set(folder: Path, categories: list[str]) -> tuple[Path, Path]:
    """A disc in one place or a square in another, as a folder of images and a COCO annotation file."""
    images, annotations, places = [], [], [(6, 8, 16), (36, 20, 20)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(10 * len(categories)):
        picture, kind = Image.new("L", (64, 48), 4 * number).convert("RGB"), number % len(categories)
        x, y, side = places[kind]
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if kind == 0 else draw.rectangle)((x, y, x + side, y + side), fill="orange")
        picture.save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
        annotations.append({"image_id": number, "category_id": kind, "bbox": [x, y, side, side]})
    names = [{"id": number, "name": name} for number, name in enumerate(categories)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": names}), encoding="utf-8")
    return folder / "images", path


if __name__ == "__main__":
    main()
