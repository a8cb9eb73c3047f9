"""Baselines (soups, retrieval, similarity mixture, PCA with ridge regression) and two control conditions.

Every baseline returns an adapter as a float32 vector of shape ``(D,)`` in the layout's order.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from lora_factory.errors import LoraFactoryError
from lora_factory.zoo.checkpoints import SnapshotRows, mean_checkpoint

TEMPERATURES = torch.logspace(-2, 1, 25, dtype=torch.float64)  # from the nearest task alone to almost equal shares
RIDGES = torch.logspace(-8, 4, 49, dtype=torch.float64)  # in units of the features' mean eigenvalue


class ConditionBaseline(Protocol):
    """A map from task vectors to adapters, fitted to a zoo in closed form."""

    @classmethod
    def fit(cls, task_vectors: Tensor, task_weights: Tensor) -> Self:
        """Fit to a zoo.

        Args:
            task_vectors: One vector per task, shape ``(tasks, width)``.
            task_weights: The mean of each task's checkpoints, in the order of ``task_vectors``, shape ``(tasks, D)``.

        Raises:
            LoraFactoryError: When the shapes do not fit, a value is not finite, or there are too few tasks.
        """
        ...

    def generate(self, vector: Tensor) -> Tensor:
        """An adapter, float32 of shape ``(D,)``, for a task vector of shape ``(width,)``."""
        ...


def uniform_soup(weights: Mapping[str, SnapshotRows]) -> Tensor:
    """The uniform model soup (Wortsman et al. 2022): the mean of the tasks' means, so that every task counts the same.

    Args:
        weights: Checkpoints of shape ``(n, D)`` by task; one entry gives the soup over that task's checkpoints.

    Raises:
        LoraFactoryError: When there is no checkpoint at all.
    """
    if not weights or any(len(snapshots) == 0 for snapshots in weights.values()):
        empty = [task for task, snapshots in weights.items() if len(snapshots) == 0]
        raise LoraFactoryError(f"a soup needs snapshots of every task; none given for {empty or 'any task'}")
    return torch.stack([mean_checkpoint(snapshots) for snapshots in weights.values()]).mean(0)


def greedy_soup(candidates: Tensor, validation_loss: Callable[[Tensor], float]) -> Tensor:
    """The greedy model soup (Wortsman et al. 2022): never worse on validation than the best single candidate.

    From the best candidate to the worst, each joins the average unless that makes the average worse. A candidate that
    diverged scores NaN or infinity and never joins.

    Args:
        candidates: Adapters of shape ``(n, D)``: one task's checkpoints, or those of the zoo.
        validation_loss: Loss of an adapter of shape ``(D,)``; called ``2 n - 1`` times at most.

    Raises:
        LoraFactoryError: When there is no candidate, or none has a finite loss.
    """
    candidates = candidates.float()
    losses = [validation_loss(candidate) for candidate in candidates]
    order = sorted((index for index, loss in enumerate(losses) if math.isfinite(loss)), key=losses.__getitem__)
    if not order:
        raise LoraFactoryError(f"none of {len(losses)} candidates has a finite validation loss; check the zoo's runs")
    soup, best, members = candidates[order[0]], losses[order[0]], 1
    for index in order[1:]:
        trial = soup + (candidates[index] - soup) / (members + 1)
        loss = validation_loss(trial)
        if loss <= best:
            soup, best, members = trial, loss, members + 1
    return soup


@dataclass(frozen=True, eq=False)
class Retrieval:
    """A baseline that returns the adapter of the most similar task, by cosine similarity of centred task vectors.

    Attributes:
        center: Mean task vector, shape ``(width,)``.
        directions: Centred task vectors of length 1, shape ``(tasks, width)``.
        weights: Adapters, shape ``(tasks, D)``.
    """

    center: Tensor
    directions: Tensor
    weights: Tensor

    @classmethod
    def fit(cls, task_vectors: Tensor, task_weights: Tensor) -> Self:
        """Keep the tasks; see `ConditionBaseline.fit`."""
        vectors, weights = _checked(task_vectors, task_weights, minimum=1)
        center = vectors.mean(0)
        return cls(center, functional.normalize(vectors - center, dim=-1), weights)

    def similarities(self, vector: Tensor) -> Tensor:
        """Cosine similarity to every task, shape ``(tasks,)``."""
        return self.directions @ functional.normalize(_fitting(vector, self.center) - self.center, dim=-1)

    def generate(self, vector: Tensor) -> Tensor:
        """The nearest task's adapter, shape ``(D,)``."""
        return self.weights[self.similarities(vector).argmax()].clone()


@dataclass(frozen=True, eq=False)
class SimilarityMixture:
    """A baseline that returns a mean of the tasks' adapters, weighted by a softmax over their cosine similarities.

    Attributes:
        tasks: The fitted task vectors and adapters.
        temperature: Temperature of the softmax with the least leave-one-task-out error of the adapters.
    """

    tasks: Retrieval
    temperature: float

    @classmethod
    def fit(cls, task_vectors: Tensor, task_weights: Tensor) -> Self:
        """Choose the temperature by leaving one task out; two tasks at least, see `ConditionBaseline.fit`."""
        vectors, weights = _checked(task_vectors, task_weights, minimum=2)
        centered = weights - weights.mean(0)
        gram = (centered @ centered.T).double()
        count, errors = len(vectors), torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        for task in range(count):
            others = [index for index in range(count) if index != task]
            similarities = Retrieval.fit(vectors[others], weights[others, :0]).similarities(vectors[task]).double()
            shares = torch.zeros(len(TEMPERATURES), count, dtype=torch.float64)
            shares[:, others] = (similarities / TEMPERATURES[:, None]).softmax(-1)
            shares[:, task] = -1  # the difference from the task's own adapter, as a combination of all adapters
            errors += ((shares @ gram) * shares).sum(-1)
        return cls(Retrieval.fit(vectors, weights), TEMPERATURES[errors.argmin()].item())

    def generate(self, vector: Tensor) -> Tensor:
        """The mixture for a task vector of shape ``(width,)``, shape ``(D,)``."""
        return (self.tasks.similarities(vector) / self.temperature).softmax(-1) @ self.tasks.weights


@dataclass(frozen=True, eq=False)
class PcaRidge:
    """A baseline that predicts the adapters' principal components by ridge regression from the task vector.

    After weights2weights (Dravid et al. 2024), with all components that the tasks span. They come from the
    ``(tasks, tasks)`` Gram matrix; nothing larger than ``(tasks, D)`` is ever made.

    Attributes:
        center: Mean task vector, shape ``(width,)``.
        scale: Standard deviation of every feature, shape ``(width,)``.
        map: Ridge solution, shape ``(width, components)``, float64.
        mean: Mean adapter, shape ``(D,)``.
        components: Orthonormal rows, shape ``(components, D)``.
        ridge: The chosen penalty in units of the features' mean eigenvalue.
    """

    center: Tensor
    scale: Tensor
    map: Tensor
    mean: Tensor
    components: Tensor
    ridge: float

    @classmethod
    def fit(cls, task_vectors: Tensor, task_weights: Tensor) -> Self:
        """Solve in closed form, penalty by leave-one-task-out error; two tasks at least."""
        vectors, weights = _checked(task_vectors, task_weights, minimum=2)
        mean = weights.mean(0)
        coefficients, components = _principal_components(weights - mean)
        center, scale = vectors.mean(0), vectors.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)  # a constant feature is left out
        inputs = ((vectors - center) / scale).double()
        values, basis = torch.linalg.eigh(inputs @ inputs.T)
        values = values.clamp_min(0)
        unit = values.mean().clamp_min(1e-12)  # all features constant: the mean adapter for every task vector
        rotated = basis.T @ coefficients
        errors = torch.stack([_leave_one_out(values, basis, coefficients, ridge * unit) for ridge in RIDGES])
        ridge = RIDGES[errors.argmin()].item()
        solution = inputs.T @ (basis @ (rotated / (values + ridge * unit)[:, None]))
        return cls(center, scale, solution, mean, components, ridge)

    def generate(self, vector: Tensor) -> Tensor:
        """The predicted adapter for a task vector of shape ``(width,)``, shape ``(D,)``."""
        inputs = ((_fitting(vector, self.center) - self.center) / self.scale).double()
        return self.mean + (inputs @ self.map).float() @ self.components


def gibberish(seed: int) -> str:
    """Make a control condition: a sentence of 8 to 12 words of random letters, fixed by the seed."""
    source = random.Random(seed)
    words = [
        "".join(source.choices(string.ascii_lowercase, k=source.randint(3, 9))) for _ in range(source.randint(8, 12))
    ]
    return f"{' '.join(words).capitalize()}."


def other_task(task: str, tasks: Sequence[str]) -> str:
    """Choose another task as a control condition; no two of ``tasks`` get the same one.

    Tasks are sorted and shifted by half their number: neighbours in the alphabet are often variants of one data set.

    Raises:
        LoraFactoryError: When ``task`` is not one of ``tasks``, or the only one.
    """
    names = sorted(set(tasks))
    if task not in names or len(names) < 2:
        raise LoraFactoryError(f"no other task than {task!r} in {names}; pass two tasks or more, this one among them")
    return names[(names.index(task) + len(names) // 2) % len(names)]


def _principal_components(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``(tasks, components)``, float64, and orthonormal components ``(components, D)``."""
    values, basis = torch.linalg.eigh((centered @ centered.T).double())
    kept = values > 1e-6 * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    lengths = values[kept].sqrt()
    return basis[:, kept] * lengths, (basis[:, kept] / lengths).T.float() @ centered


def _leave_one_out(values: Tensor, basis: Tensor, targets: Tensor, ridge: Tensor) -> Tensor:
    """Squared leave-one-out error of ridge regression with an intercept, from its residuals and hat matrix alone."""
    hat = (basis * (values / (values + ridge))) @ basis.T + 1 / len(targets)
    residuals = targets - hat @ targets
    return (residuals / (1 - hat.diagonal()).clamp_min(1e-12)[:, None]).square().sum()


def _checked(task_vectors: Tensor, task_weights: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    """Check both matrices and return them as float32 on the CPU."""
    shapes = f"task_vectors {tuple(task_vectors.shape)}, task_weights {tuple(task_weights.shape)}"
    if task_vectors.ndim != 2 or task_weights.ndim != 2 or len(task_vectors) != len(task_weights):
        raise LoraFactoryError(f"{shapes}: expected (tasks, width) and (tasks, D) with one row per task in each")
    if len(task_vectors) < minimum:
        raise LoraFactoryError(f"{shapes}: this baseline needs {minimum} tasks or more; collect more of them")
    for name, rows in (("task_vectors", task_vectors), ("task_weights", task_weights)):
        if not torch.isfinite(rows).all():
            raise LoraFactoryError(
                f"{name} hold NaN or infinite values; check the zoo with lora-factory zoo verify, or AdapterZoo.verify"
            )
    return task_vectors.detach().float().cpu(), task_weights.detach().float().cpu()


def _fitting(vector: Tensor, center: Tensor) -> Tensor:
    """Check that a task vector has the width of ``center`` and return it as float32 on the CPU."""
    if vector.shape != center.shape:
        raise LoraFactoryError(
            f"a task vector of shape {tuple(vector.shape)} does not fit; this baseline was fitted to "
            f"vectors of shape {tuple(center.shape)}"
        )
    return vector.detach().float().cpu()
