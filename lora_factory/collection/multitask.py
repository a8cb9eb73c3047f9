"""One LoRA trained on all tasks at once: the baseline of every comparison and the start of training from data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch import Tensor

from lora_factory.collection.trainer import LoRATrainer, TrainingTask
from lora_factory.errors import LoraFactoryError
from lora_factory.models.inputs import TokenSequence


def train_multitask(
    trainer: LoRATrainer,
    tasks: Sequence[TrainingTask],
    *,
    seed: int,
    steps: int | None = None,
    learning_rate: float | None = None,
) -> Tensor:
    """One LoRA trained on all tasks at once, from the shared initialisation: the control that matters most.

    Every batch takes its sequences from the tasks in turn, in a new random order each turn.

    Args:
        trainer: Base model, LoRA slot and the settings that the tasks' own LoRAs were trained with.
        tasks: The tasks of the zoo.
        seed: Order of tasks and sequences.
        steps: Optimizer steps; by default as many as the tasks' own LoRAs take together: the same token budget.
        learning_rate: Its peak; default: that of the tasks' own LoRAs.

    Returns:
        The checkpoint with the lowest validation loss (mean over tasks), shape ``(D,)``.

    Raises:
        LoraFactoryError: When there is no task, or a loss is not finite.
    """
    if not tasks:
        raise LoraFactoryError("a multi-task LoRA needs tasks to train on; pass the zoo's tasks")
    arguments = trainer.arguments
    train = [trainer.encode(task.examples("train")) for task in tasks]
    total = steps if steps is not None else sum(trainer.schedule(len(sequences))[0] for sequences in train)
    kept = list(range(total, 0, -max(1, total // 20)))[::-1]
    batches = mixed_batches(train, arguments.batch_size, seed)
    validation = [trainer.validation(task) for task in tasks]
    snapshots, losses, _ = trainer.fit(batches, validation, kept, "multi-task LoRA", learning_rate=learning_rate)
    return snapshots[min(range(len(losses)), key=losses.__getitem__)]


def mixed_batches(
    sequences: Sequence[Sequence[TokenSequence]], batch_size: int, seed: int
) -> Iterator[list[TokenSequence]]:
    """Endless batches that take from every task in turn; a task's sequences repeat only after all of them were read.

    Args:
        sequences: The training sequences of every task.
        batch_size: Sequences a batch.
        seed: Order of the tasks in every turn, and of their sequences.
    """
    source = random.Random(seed)
    streams = [_shuffled(rows, source) for rows in sequences]
    turn: list[int] = []
    while True:
        batch = []
        for _ in range(batch_size):
            turn = turn or source.sample(range(len(streams)), len(streams))
            batch.append(next(streams[turn.pop()]))
        yield batch


def _shuffled(rows: Sequence[TokenSequence], source: random.Random) -> Iterator[TokenSequence]:
    while True:
        yield from source.sample(rows, len(rows))
