"""A pico image classifier and pictures made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ViTForImageClassification, ViTImageProcessor

from lora_factory.tasks.examples import ImageExample
from lora_factory.tasks.images import ImageTask, LabelledImage
from lora_factory.tasks.task import Task


def save_classifier(
    folder: Path, *, channels: int = 3, kind: type[PreTrainedModel] = ViTForImageClassification, **options: Any
) -> Path:
    """A ViT of two layers of width 16 for images of 8 x 8 pixels, with the classes no and yes; or one of its kind."""
    config = kind.config_class(
        image_size=8,
        patch_size=4,
        num_channels=channels,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )
    processor.save_pretrained(folder)
    return folder


def picture(number: int, mode: str = "RGB", size: int = 8) -> Image.Image:
    """Noise that is the same for the same number."""
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return Image.fromarray(pixels.numpy()).convert(mode)


def bright_or_dark(number: int, *, bright: bool) -> Image.Image:
    """Noise in the upper or the lower half of the range."""
    return picture(number).point(lambda value: value // 2 + (128 if bright else 0))


def brightness_task(name: str, *, wanted: bool, count: int = 24) -> ImageTask:
    """Is the image bright (or dark)? Half of the images are."""
    rows = [
        LabelledImage(bright_or_dark(number, bright=bright), "yes" if bright is wanted else "no")
        for number in range(count)
        for bright in (True, False)
    ]
    return ImageTask.from_examples(name, [f"Is the picture {name}?"], rows, shown=["yes"])


RED = (200, 30, 40)


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 20), **options: Any) -> Path:
    colour = {"RGB": RED, "RGBA": (*RED, 0), "L": 90, "LA": (90, 255), "P": 3, "1": 1, "CMYK": (0, 200, 200, 30)}
    image = Image.new(mode, size, colour[mode])
    image.save(path, **options)
    return path


def write_coco(folder: Path, boxes: dict[str, list[tuple[int, list[float]]]], images: int = 3, **extra: Any) -> Path:
    """Images of 40 x 20 pixels, and for every category (image number, box) pairs."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        write_image(folder / "photos" / f"{number}.png", size=(40, 20 + number))
    names = list(boxes)
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 40, "height": 20 + number}
            for number in range(images)
        ],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(names)],
        "annotations": [
            {"image_id": image, "category_id": names.index(name) + 1, "bbox": box, **extra}
            for name, pairs in boxes.items()
            for image, box in pairs
        ],
    }
    path = folder / "boxes.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def animals(folder: Path) -> Path:
    pairs = [(number, [4, 2, 10, 5]) for number in range(6)]
    return write_coco(folder, {"dog": [*pairs, (0, [0, 0, 40, 20])], "traffic light": pairs[:4], "yeti": []}, images=6)


def boxes_task(label: str) -> Task:
    """Eight black images with a yellow box each, to be found by its label."""
    rows = []
    for number in range(8):
        image, box = Image.new("RGB", (40, 30), "black"), (number, 2, number + 20, 22)
        image.paste((255, 255, 0), box)
        rows.append(ImageExample.of_boxes(image, label, [box]))
    return Task.from_examples(label, [f"Detect the {label}."], rows, rows[:2], rows[2:4])
