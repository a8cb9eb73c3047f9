"""The checkpoints that a generator learns from: held in memory, or read row by row from a zoo that is larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_factory.zoo.store import AdapterZoo


HELD_BYTES = 1 << 30  # a zoo whose checkpoints take more than this in float32 stays on disk
_CHUNK_BYTES = 64 << 20  # of checkpoints that the statistics look at together
_BLOCK_BYTES = 4 << 20  # of these whose squares are taken at once


@dataclass(frozen=True)
class ZooStatistics:
    """Statistics of all checkpoints of a zoo; every tensor has the shape ``(D,)``.

    Attributes:
        mean: Mean over the tasks of their mean checkpoint.
        deviation: Mean square deviation of all checkpoints from ``mean``.
    """

    mean: Tensor
    deviation: Tensor


def open_checkpoints(zoo: AdapterZoo) -> dict[str, SnapshotRows]:
    """The checkpoints of all tasks of a zoo, in memory if they take `HELD_BYTES` at most, else on disk.

    What is trained on them is the same either way.
    """
    stored: dict[str, SnapshotRows] = {task: StoredRows(zoo, task) for task in zoo.tasks}
    if sum(map(len, stored.values())) * zoo.layout.size * 4 > HELD_BYTES:
        return stored
    return {task: rows[:] for task, rows in stored.items()}


class StoredRows:
    """The checkpoints of one task of a zoo, all runs in natural order; only what is asked for is read.

    A file's SHA-256 is checked before its first row is read, once in the zoo's lifetime.

    Args:
        zoo: The zoo.
        task: The task's name.
    """

    def __init__(self, zoo: AdapterZoo, task: str) -> None:
        """Read the records, but no weights."""
        self.zoo, self.task = zoo, task
        self.runs = [(run, len(zoo.record(task, run).snapshot_steps)) for run in zoo.runs(task)]

    def __len__(self) -> int:
        """The number of checkpoints."""
        return sum(count for _, count in self.runs)

    def __getitem__(self, index: int | slice) -> Tensor:
        """One checkpoint ``(D,)``, or consecutive ones ``(n, D)``."""
        wanted = range(len(self))[index]
        if isinstance(wanted, int):
            return self[wanted : wanted + 1][0]
        parts, start = [], 0
        for run, count in self.runs:
            rows = slice(max(wanted.start - start, 0), min(wanted.stop - start, count))
            if rows.start < rows.stop:
                parts.append(self.zoo.snapshots(self.task, run, rows=rows, verify=True))
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# The checkpoints of one task, `(n, D)` in float32 on the CPU: in memory, or on disk and read when they are asked for.
SnapshotRows = Tensor | StoredRows


def in_parts(rows: SnapshotRows) -> Iterator[Tensor]:
    """All checkpoints of a task in order, 64 MB of them together at most, each part of shape ``(n, D)``."""
    together = max(1, _CHUNK_BYTES // (4 * rows[0].numel()))
    for start in range(0, len(rows), together):
        yield rows[start : start + together]


def mean_checkpoint(rows: SnapshotRows) -> Tensor:
    """The mean of a task's checkpoints, one or more, of shape ``(D,)``; looks at 64 MB of them at a time."""
    total = torch.zeros_like(rows[0], dtype=torch.float64)
    for part in in_parts(rows):
        total += part.sum(0)
    return (total / len(rows)).float()


@torch.no_grad()
def zoo_statistics(weights: Mapping[str, SnapshotRows]) -> ZooStatistics:
    """Mean and spread of all checkpoints, in one pass that looks at 64 MB of them at a time.

    Args:
        weights: Checkpoints of every task, at least one.
    """
    size = next(iter(weights.values()))[0].numel()
    everything = _Moments.of(torch.zeros(0, size))
    mean = everything.squares.clone()
    for rows in weights.values():
        task = _Moments.of(torch.zeros(0, size))
        for part in in_parts(rows):
            task.add(_Moments.of(part))
        everything.add(task)
        mean += task.mean / len(weights)
    deviation = everything.squares / everything.count + (everything.mean - mean).square_()
    return ZooStatistics(mean=mean.float(), deviation=deviation.float())


@dataclass
class _Moments:
    """Number, mean and sum of squared deviations from it of rows that are no longer at hand; float64, ``(D,)``."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Moments:
        """The moments of ``(n, D)`` rows, added up in the rows' own precision, a few at a time in the cache."""
        mean = rows.sum(0).double() / max(1, len(rows))
        center = mean.to(rows.dtype)
        squares = torch.zeros_like(center)
        for block in rows.split(max(1, _BLOCK_BYTES // (4 * rows.shape[1]))):
            squares += (block - center).square_().sum(0)
        return cls(len(rows), mean, squares.double())

    def add(self, other: _Moments) -> None:
        """Count the other's rows as well (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        self.mean.add_(apart, alpha=other.count / count)
        self.squares.add_(other.squares).addcmul_(apart, apart, value=self.count * other.count / count)
        self.count = count
