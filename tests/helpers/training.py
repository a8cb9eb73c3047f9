"""A zoo and a generator trained on it."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TrainArguments
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.text_encoders import TextEncoder
from lora_factory.training.train import build_generator
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import AdapterZoo

DESCRIPTIONS = {
    "code": ("def add(left, right): return left + right", "print(index) for index in range(10)"),
    "law": ("Permission is hereby granted, free of charge", "any person obtaining a copy of this software"),
    "prose": ("The quick brown fox jumps over the lazy dog", "the old man reads a letter by the window"),
    "sums": ("1 + 2 = 3, 40 + 2 = 42, 12 + 13 = 25", "7 * 8 = 56; 9 * 9 = 81; 100 - 1 = 99"),
}


def make_zoo(folder: Path, layout: AdapterLayout, names: tuple[str, ...] = tuple(DESCRIPTIONS)) -> AdapterZoo:
    """Five snapshots a task around a random adapter of its own, with a spread of a tenth of the adapters' distance."""
    zoo = AdapterZoo.create(folder, layout)
    source = torch.Generator().manual_seed(0)
    for name in names:
        center = 0.1 * torch.randn(layout.size, generator=source)
        record = RunRecord(
            task=name,
            run="seed-0",
            descriptions=DESCRIPTIONS[name],
            seed=0,
            base_model=layout.base_model,
            base_revision=None,
            steps=5,
            snapshot_steps=(1, 2, 3, 4, 5),
            validation_losses=(),
            train_tokens=10,
            data_fingerprint="0" * 64,
            versions={},
            license="MIT" if name == "law" else None,
        )
        zoo.add_run(record, center + 0.01 * torch.randn(5, layout.size, generator=source))
    return zoo


def features(zoo: AdapterZoo, encoder: str) -> dict[str, dict[str, torch.Tensor]]:
    text_encoder = TextEncoder(encoder)
    return {"text": {task: text_encoder.encode(zoo.descriptions(task)) for task in zoo.tasks}}


def prepared(
    zoo: AdapterZoo, arguments: TrainArguments
) -> tuple[CVAELoRAGenerator, dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """An untrained generator with fitted statistics, and what it is trained on."""
    weights, rows = {task: zoo.snapshots(task) for task in zoo.tasks}, features(zoo, arguments.text_encoder)
    generator = build_generator(zoo, arguments, {"text": 32})
    generator.fit_statistics(weights, rows)
    return generator, weights, rows
