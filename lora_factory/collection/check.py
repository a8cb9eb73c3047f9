"""Read all data of a collection before it starts, and measure what it will take."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_factory.adapters.live_models import base_of
from lora_factory.arguments import CollectArguments
from lora_factory.collection.progress import make_accelerator
from lora_factory.collection.trainer import LoRATrainer, TrainingTask, open_trainer
from lora_factory.errors import LoraFactoryError
from lora_factory.models.inputs import TokenSequence
from lora_factory.tasks.task_file import as_tasks, check_tasks

# Of which the first warms up. For the README's collection they foresee 40 s; its runs take 30 s on an idle machine.
MEASURED_STEPS = 4


@dataclass(frozen=True)
class TaskSize:
    """What one task gives a collection.

    Attributes:
        examples: Rows by split.
        sequences: Training sequences, as the model reads them.
        tokens: Tokens of these.
        steps: Optimizer steps of one run.
    """

    examples: dict[str, int]
    sequences: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class CollectionSize:
    """What a collection will take on this machine, by one process.

    Attributes:
        tasks: Sizes by the name of the task.
        runs: Runs in all: tasks times seeds.
        weights: D, the weights of one adapter.
        seconds: Of all runs: the measured seconds per step times the steps.
        memory: Bytes that the process, or its accelerator, held at most while it was measured.
        disk: Bytes of the finished zoo's weights.
    """

    tasks: dict[str, TaskSize]
    runs: int
    weights: int
    seconds: float
    memory: int
    disk: int


def check_collection(
    tasks: str | Path | Sequence[TrainingTask],
    base_model: str | Path,
    arguments: CollectArguments | None = None,
) -> CollectionSize:
    """Read and encode the data of all tasks, train a few steps, and say what `collect_adapters` would take.

    Nothing is written.

    Args:
        tasks: As in `collect_adapters`.
        base_model: As there.
        arguments: As there.

    Raises:
        LoraFactoryError: As `collect_adapters` raises it before the first run.
    """
    arguments, tasks = arguments or CollectArguments(), as_tasks(tasks)
    trainer = open_trainer(base_model, arguments, make_accelerator(arguments, Path()), tasks)
    sizes: dict[str, TaskSize] = {}
    longest: list[TokenSequence] = []

    def read(task: TrainingTask) -> None:
        nonlocal longest
        rows = trainer.encode(task.examples("train"))
        trainer.validation(task)
        examples = {split: len(task.examples(split)) for split in ("train", "validation", "test")}
        sizes[task.name] = TaskSize(examples, len(rows), _tokens(rows), trainer.schedule(len(rows))[0])
        longest = max(longest, rows, key=lambda some: _tokens(some) / max(1, len(some)))

    check_tasks(tasks)
    check_tasks(tasks, read)
    seconds = _seconds_per_step(trainer, longest) * sum(size.steps for size in sizes.values()) * len(arguments.seeds)
    runs, weights = len(tasks) * len(arguments.seeds), len(trainer.initial)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    rows = arguments.snapshots + 1  # the checkpoints, and the last one again as an adapter of its own
    return CollectionSize(sizes, runs, weights, seconds, memory, 4 * weights * rows * runs)


def _tokens(rows: Sequence[TokenSequence]) -> int:
    return sum(len(row.tokens) for row in rows)


def _seconds_per_step(trainer: LoRATrainer, rows: list[TokenSequence]) -> float:
    """The mean time of a step after the first, on some training sequences."""
    batches = trainer.batches(rows, seed=0)
    times: list[float] = []

    def note(*_: object) -> None:
        times.append(time.perf_counter())

    try:
        trainer.fit(batches, [rows[:1]], [MEASURED_STEPS], "measure", on_step=note)
    except LoraFactoryError:
        raise
    except Exception as error:  # the base model's own code or its processor's: whatever it raises, runs would fail so
        raise LoraFactoryError(
            f"this {type(base_of(trainer.model)).__name__} cannot learn such tasks: {type(error).__name__}: {error}; "
            "mend that, or give another base_model (--base-model)"
        ) from error
    return (times[-1] - times[0]) / (len(times) - 1)
