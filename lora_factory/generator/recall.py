"""Which known task a condition means: the posterior over the zoo's tasks, and how far it is to be relied upon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from lora_factory.generator.familiarity import REACH, leave_one_out, measure_reach
from lora_factory.generator.networks import ConditionStandardiser

SHARPNESSES = torch.logspace(-2, 4, 61, dtype=torch.float64)  # from nearly no difference to the nearest task alone
TIE = 1e-3  # nats by which a sharper posterior must predict better to be preferred
RELIABLE = 0.1  # nats: a modality whose posterior predicts the task of its own conditions worse is left out
EDGE = 0.125  # of the way from near to where nothing is known: outside may be a new task beside a known one
HEDGE = 0.5  # of a known task's adapter, for a condition just outside that is a paraphrase of it or a new task
DENSE = 0.1  # quantile of the distances between a condition and the nearest other task: how close tasks lie
BETWEEN = 0.75  # of that distance: from here on, a condition may mean a task between those that are known


@torch.no_grad()
def measure_recall(
    standardiser: ConditionStandardiser, features: Mapping[str, Mapping[str, torch.Tensor]], strict: bool = False
) -> dict[str, list[float]]:
    """For every modality, how a condition is recognised as one of a known task.

    What is not recognised gets what the network writes. After stage 1 that is a mixture of the tasks' adapters, and a
    condition in doubt does best half-way between the two. After stage 2 it is an adapter for all tasks, which for a
    new task is better than any one's: then recognition has to be strict.

    Args:
        standardiser: Fitted to the same features.
        features: For every modality the rows ``(n, width)`` of every task, two tasks or more.
        strict: Whether only what is nearly as near as a task's own conditions is recognised; else, in part, whatever
            is nearer than what is related to no task.

    Returns:
        Three numbers by modality, for those that tell the tasks apart. How much a squared distance of 1 from a task
        speaks against it, in nats: what best predicts the task of its own conditions, each compared with the task
        vector of the others. And two distances from the next task, to which a condition is recognised wholly and from
        which on not at all, both made smaller where tasks lie close together.
    """
    recall = {}
    for name, (near, believed) in measure_reach(standardiser, features).items():
        unrelated = near + (believed - near) / REACH
        edge = near + EDGE * (unrelated - near)
        tasks = features[name]
        known = standardiser(name, torch.stack([rows.mean(0) for rows in tasks.values()])).double()
        squares, owners = [], []
        for index, rows in enumerate(tasks.values()):
            for own, others in leave_one_out(name, rows) or [(rows.mean(0), rows.mean(0))]:
                placed = known.clone()
                condition, placed[index] = standardiser(name, torch.stack([own, others])).double()
                squares.append((placed - condition).square().sum(-1))
                owners.append(index)
        table, task = torch.stack(squares), torch.tensor(owners)[:, None]
        losses = [-(-sharpness * table).log_softmax(-1).gather(1, task).mean() for sharpness in SHARPNESSES]
        loss = torch.stack(losses)
        if loss.min() > RELIABLE:
            continue
        sharpness = float(SHARPNESSES[(loss <= loss.min() + TIE).int().argmax()])
        apart = table.scatter(1, task, torch.inf).min(1).values.sqrt().quantile(DENSE)
        between = BETWEEN * float(apart)
        far = min(edge if strict else unrelated, between)
        recall[name] = [round(sharpness, 6), round(near * min(1.0, between / edge), 6), round(far, 6)]
    return recall


def task_posterior(
    recall: Mapping[str, Sequence[float]], known: Mapping[str, torch.Tensor], conditions: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """p(task | condition), shape ``(batch, tasks)``: a Gaussian around each task; modalities are independent evidence.

    Args:
        recall: As :func:`measure_recall` returns it.
        known: Coordinates of the task vectors, shape ``(tasks, directions)`` by modality.
        conditions: Coordinates of the conditions, shape ``(batch, directions)`` by modality, at least one.
    """
    distances = {name: torch.cdist(rows.float(), known[name].float()) for name, rows in conditions.items()}
    evidence = [recall[name][0] * distance.square() for name, distance in distances.items()]
    return (-torch.stack(evidence).sum(0)).softmax(-1)


def certainty(posterior: torch.Tensor) -> torch.Tensor:
    """From 1 for a single task to 0 for all alike, shape ``(batch, 1)``: what the entropy lacks of its maximum."""
    entropy = -torch.special.xlogy(posterior, posterior).sum(-1, keepdim=True)
    return 1 - entropy / math.log(posterior.shape[-1])


def hedged(nearness: torch.Tensor) -> torch.Tensor:
    """How far to rely on a known task whose alternative is a mixture of tasks: wholly, soon by half, then not at all.

    Args:
        nearness: From 1 within the first distance of :func:`measure_recall` to 0 from the second on.
    """
    return torch.maximum(1 - (1 - nearness) / EDGE, HEDGE * nearness)
