"""A pico image classifier and pictures made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lora_factory.tasks.images import ImageTask, LabelledImage


def save_classifier(folder: Path, *, channels: int = 3) -> Path:
    """A ViT of two layers of width 16 for images of 8 x 8 pixels, with the classes no and yes."""
    config = ViTConfig(
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
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
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
