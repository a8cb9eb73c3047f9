"""Tasks and settings for training through the base model."""

from __future__ import annotations

import torch

from helpers.models import TRAINING_TEXT
from lora_factory.arguments import CollectArguments, TrainArguments
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.hidden_states import example_features
from lora_factory.tasks.task import Task
from lora_factory.training.from_data import TaskData, start_from
from lora_factory.training.train import build_generator
from lora_factory.zoo.store import AdapterZoo

SETTINGS = CollectArguments(
    steps=8, snapshots=2, batch_size=2, sequence_length=24, learning_rate=3e-2, target_modules="all-linear"
)
NAMES = ("prose", "code", "law")


def make_tasks() -> list[Task]:
    texts = zip(NAMES, TRAINING_TEXT, strict=True)
    return [
        Task.from_examples(name, [f"Write {name}.", f"{name.title()} text."], [f"{n} {text}" for n in range(6)])
        for name, text in texts
    ]


def prepared(zoo: AdapterZoo, trainer: LoRATrainer, arguments: TrainArguments) -> tuple[CVAELoRAGenerator, dict]:
    tasks = make_tasks()
    hidden = example_features(trainer, tasks)
    source = torch.Generator().manual_seed(0)
    texts = {task.name: torch.randn(2, 8, generator=source) for task in tasks}
    widths = {"text": 8, "hidden": next(iter(hidden.values())).shape[1]}
    generator = build_generator(zoo, arguments, widths)
    weights = {name: zoo.snapshots(name) for name in zoo.tasks}
    generator.fit_statistics(weights, {"text": texts, "hidden": hidden})
    start_from(generator, trainer.initial)
    data = {task.name: TaskData.read(task, trainer, texts[task.name], hidden[task.name]) for task in tasks}
    return generator, data


class CutOff(Exception):
    """What ends the training in the middle."""
