"""What both experiments of the paper share: its generator, and the methods of its Tables 1 and 2."""

import math
from collections.abc import Sequence

import torch

from lora_factory import AdapterZoo, CVAELoRAGenerator, Task, TrainArguments
from lora_factory.evaluation.baselines import uniform_soup
from lora_factory.evaluation.cond_p_diff import train_cond_p_diff

GENERATOR_EPOCHS, GENERATOR_BATCH = 2000, 50
SMOKE_REMARK = (
    "This is a smoke run, on random tiny models and made-up data: it proves only that the code runs. Its figures say "
    "nothing about any method."
)
TEXT_ENCODER = "open_clip:ViT-B-32:openai"  # the paper says CLIP, not which one


def paper_generator(zoo: AdapterZoo, epochs: int, text_encoder: str) -> TrainArguments:
    """The 12-layer 1-D CNN and its loss (KL weight 0.005), for as many passes over all checkpoints."""
    checkpoints = sum(len(zoo.record(task, run).snapshot_steps) for task in zoo.tasks for run in zoo.runs(task))
    batch = min(checkpoints, GENERATOR_BATCH)
    steps = epochs * math.ceil(checkpoints / batch)
    return TrainArguments(decoder="conv1d", steps=steps, batch_size=batch, text_encoder=text_encoder)


def paper_methods(
    zoo: AdapterZoo, generator: CVAELoRAGenerator, tasks: Sequence[Task], device: torch.device, smoke: bool
) -> dict[str, dict[str, torch.Tensor | None]]:
    """For every method of the tables and every task weights of the generator's layout; None for the base alone."""
    weights = {task.name: zoo.snapshots(task.name) for task in tasks}
    vectors = {task.name: generator.text_encoder.encode(list(task.descriptions)) for task in tasks}
    steps = {"autoencoder_steps": 3, "diffusion_steps": 3} if smoke else {}
    diffusion = train_cond_p_diff(weights, vectors, device=device, **steps)
    generated = {task.name: generator.generate_state_dict(task.descriptions[0]) for task in tasks}
    found = {
        "Original LoRA": {name: rows[-1] for name, rows in weights.items()},
        "Model Soup": dict.fromkeys(weights, uniform_soup(weights)),
        "COND P-DIFF": {name: diffusion.generate(rows.mean(0), 0) for name, rows in vectors.items()},
    }
    widened = {
        method: {name: zoo.layout.widen(row[None], generator.layout)[0] for name, row in rows.items()}
        for method, rows in found.items()
    }
    written = {name: generator.layout.flatten(state_dict) for name, state_dict in generated.items()}
    original = {"Original LoRA": widened.pop("Original LoRA"), "Original model": dict.fromkeys(weights)}
    return original | widened | {"ICM-LoRA": written}
