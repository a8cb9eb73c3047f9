"""Table 1's layout on a detection set that fits a CPU: scikit-learn's digits on canvases, a small Florence-2.

    python benchmarks/digit_detection.py --output digit-detection-output

The base model is trained from scratch to find all digits of a canvas but nines, of which it never sees one, as the
paper's base knows neither sofas nor motorbikes. Then one LoRA per digit (rank 2, the paper's modules), a generator on
all ten, and the methods of Table 1 on canvases of digits that were in no training.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from detection_report import compare_detection, detection_table, write_detection_report
from paper_recipe import paper_methods
from PIL import Image
from sklearn.datasets import load_digits
from tiny_models import tiny_florence
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from lora_factory import CollectArguments, Task, TrainArguments, collect_adapters, train_generator
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.models.inputs import ImageInputs, model_inputs
from lora_factory.models.loading import load_base_model, load_processor
from lora_factory.reporting.report import markdown_table
from lora_factory.tasks.boxes import Box, boxes_to_text
from lora_factory.tasks.examples import DETECTION_PROMPT, ImageExample
from lora_factory.utils.files import atomic_folder

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEVER_SEEN = 9
DESCRIPTIONS = (
    "Detect the digit {} in the picture.",
    "Find every handwritten {} in the image and draw a box around it.",
    "Locate each {} on the canvas.",
)
SIDE, DIGITS = 48, 3  # pixels of a canvas, digits on it
BASE_NAME = "pico/florence-2-digits"
COLLECT = CollectArguments(
    rank=2,
    lora_alpha=4.0,
    target_modules="q_proj,k_proj,v_proj,fc2,lm_head",
    epochs=30,
    snapshots=10,
    batch_size=16,
    sequence_length=32,
    packing=False,
    learning_rate=1e-2,
    dtype="float32",
)
TRAIN = TrainArguments()
CANVASES = {"train": 128, "validation": 16, "test": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("digit-detection-output"), help="folder of all results")
    parser.add_argument("--base-steps", type=int, default=6000, help="steps of the base model, 32 canvases each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    base = options.output / "base"
    if not base.is_dir():
        train_base(base, options.base_steps, options.seed)
    tasks = [digit_task(digit) for digit in range(10)]
    collect = replace(COLLECT, seeds=(options.seed,))
    zoo = collect_adapters(tasks, base, options.output / "zoo", collect, base_model_name=BASE_NAME)
    generator = train_generator(zoo, options.output / "generator", replace(TRAIN, seed=options.seed), overwrite=True)
    model, tokenizer = load_base_model(base)
    inputs = model_inputs(model, load_processor(base))
    trainer = LoRATrainer.attach(model, tokenizer, collect, BASE_NAME, Accelerator(), inputs, generator.layout)
    methods = paper_methods(zoo, generator, tasks, torch.device("cpu"), False)
    settings = {"seeds": str(options.seed), "base steps": options.base_steps, "threads": torch.get_num_threads()}
    result = compare_detection(trainer, methods, tasks, options.output, max_new_tokens=32, settings=settings)
    print(markdown_table(detection_table(result)))
    found = {(cell["method"], cell["task"]): cell["map_50"] for cell in result["cells"]}
    gaps = {name: found["ICM-LoRA", name] - found["Original LoRA", name] for name in NAMES}
    print(f"generated less original LoRA, mAP50: {min(gaps.values()):+.3f} at worst ({min(gaps, key=gaps.get)})")
    print(json.dumps(settings | {"weights of an adapter": zoo.layout.size, **result["created_with"]}))
    print(f"{time.perf_counter() - started:.0f} s; wrote {write_detection_report(result, options.output)}")


def train_base(folder: Path, steps: int, seed: int, canvases: int = 12000, batch: int = 32) -> None:
    """Train a small Florence-2 from scratch to write every digit of a canvas with its box, nines aside."""
    words = [" ".join((*NAMES, "Locate the objects with category name in the image."))] * 3
    with atomic_folder(folder) as temporary:
        tiny_florence(temporary, words, side=SIDE, width=96, embed_dim=(48, 96), spread=0.1, seed=seed)
        model, _ = load_base_model(temporary)
        inputs = ImageInputs(load_processor(temporary), True)
        source, known = random.Random(seed), [digit for digit in range(10) if digit != NEVER_SEEN]
        pools = digit_pools("train")
        rows = []
        for _ in tqdm(range(canvases), desc="canvases"):
            image, boxes = canvas([source.choice(known) for _ in range(source.randint(1, DIGITS))], pools, source)
            answer = "".join(boxes_to_text(NAMES[d], boxes[d], image.size) for d in sorted(boxes))
            rows.append(ImageExample(image, DETECTION_PROMPT, answer))
        read = inputs.collate(inputs.encode(rows, COLLECT.tokens), torch.device("cpu"))
        fit(model.requires_grad_(True), read, steps, batch, seed)
        model.save_pretrained(temporary)


def fit(model, read: dict, steps: int, batch: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    bar = tqdm(range(steps), desc="base model")
    for step in bar:
        drawn = torch.randint(len(read["labels"]), (batch,), generator=generator)
        loss = model(**{name: tensor[drawn] for name, tensor in read.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def digit_task(digit: int) -> Task:
    """Canvases that show the digit once or twice among others; its boxes alone are to be written."""
    splits = {}
    for split, count in CANVASES.items():
        source, pools = random.Random(f"{split} {digit}"), digit_pools(split)
        others = [other for other in range(10) if other not in (digit, NEVER_SEEN)]
        splits[split] = []
        for _ in range(count):
            shown = [digit] * source.choice((1, 1, 2))
            shown += [source.choice(others) for _ in range(DIGITS - len(shown))]
            image, boxes = canvas(shown, pools, source)
            splits[split].append(ImageExample.of_boxes(image, NAMES[digit], boxes[digit]))
    return Task.from_examples(
        NAMES[digit], tuple(text.format(NAMES[digit]) for text in DESCRIPTIONS), *splits.values()
    )


def digit_pools(split: str) -> dict[int, list[np.ndarray]]:
    """The split's digits by class; no digit is in two splits."""
    data = load_digits()
    low, high = {"train": (0.0, 0.6), "validation": (0.6, 0.7), "test": (0.7, 1.0)}[split]
    part = slice(int(low * len(data.target)), int(high * len(data.target)))
    images, labels = data.images[part], data.target[part]
    return {digit: [image * (255 / 16) for image in images[labels == digit]] for digit in range(10)}


def canvas(digits: list[int], pools: dict, source: random.Random) -> tuple[Image.Image, dict[int, list[Box]]]:
    """The digits in different places and sizes on dim noise, with the boxes of each class from left to right."""
    noise = np.random.default_rng(source.getrandbits(32)).integers(0, 60, (SIDE, SIDE), dtype=np.uint8)
    picture, taken = Image.fromarray(noise), []
    for digit in digits:
        ink = Image.fromarray(source.choice(pools[digit]).astype(np.uint8))
        while True:
            side = source.randint(12, 20)
            x, y = source.randint(0, SIDE - side), source.randint(0, SIDE - side)
            if all(x + side <= a.x1 or a.x2 <= x or y + side <= a.y1 or a.y2 <= y for _, a in taken):
                break
        drawn = ink.resize((side, side), Image.Resampling.BILINEAR)
        picture.paste(255, (x, y), drawn)
        taken.append((digit, Box(x, y, x + side, y + side)))
    taken.sort(key=lambda pair: pair[1])
    boxes: dict[int, list[Box]] = {}
    for digit, box in taken:
        boxes.setdefault(digit, []).append(box)
    return picture.convert("RGB"), boxes


if __name__ == "__main__":
    main()
