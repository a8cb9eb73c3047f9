"""How far a condition is to be believed: wholly near a task that training knew, not at all where it knew none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lora_factory.generator.networks import ConditionStandardiser

SUPPORT = 16  # examples whose mean is compared with the task vector of all the others
USUAL = 0.9  # share of the known tasks' own conditions that are believed wholly
REACH = 0.5  # of the way from there to where nothing is known; to believe a stranger costs more than to doubt a friend


@torch.no_grad()
def measure_reach(
    standardiser: ConditionStandardiser, features: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, list[float]]:
    """For every modality, how near a task a condition is believed wholly, and from where on not at all.

    Near is as a task's own conditions are to the task vector of its others: a description, or the mean of a few
    examples. Far is half-way from there to where the mean of all task vectors is from the task next to it: what is
    related to none of them has its coordinates there.

    Args:
        standardiser: Fitted to the same features.
        features: For every modality the rows ``(n, width)`` of every task.

    Returns:
        Two distances by modality, the smaller one first.
    """
    reach = {}
    for name, tasks in features.items():
        own, vectors = [], []
        for rows in tasks.values():
            vectors.append(rows.mean(0))
            pairs = leave_one_out(name, rows)
            own += [standardiser(name, torch.stack(pair)).diff(dim=0).norm() for pair in pairs]
        unrelated = float(standardiser(name, torch.stack(vectors)).norm(dim=1).min())
        near = min(float(torch.stack(own).quantile(USUAL)) if own else 0.0, 0.8 * unrelated)
        reach[name] = [round(near, 6), round(near + REACH * (unrelated - near), 6)]
    return reach


def leave_one_out(name: str, rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A task's own conditions: every description, or the mean of a few random examples, with the mean of all others.

    Args:
        name: Their modality.
        rows: Shape ``(n, width)``; there are no pairs where it is a single one.

    Returns:
        Pairs of vectors ``(width,)``.
    """
    if name != "text":  # neighbours may be of one document
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    groups = rows.split(1 if name == "text" else min(SUPPORT, max(1, len(rows) // 2)))
    return [
        (group.mean(0), torch.cat([*groups[:index], *groups[index + 1 :]]).mean(0))
        for index, group in enumerate(groups if len(groups) > 1 else ())
    ]


def familiarity(
    reach: Mapping[str, Sequence[float]],
    known: Mapping[str, torch.Tensor],
    conditions: Mapping[str, torch.Tensor],
    batch: int,
) -> torch.Tensor:
    """How far conditions are to be believed, from 0 to 1, shape ``(batch, 1)``; the mean over modalities.

    Args:
        reach: As :func:`measure_reach` returns it, or with more in front.
        known: Coordinates of the task vectors, shape ``(tasks, directions)`` by modality.
        conditions: Coordinates of the conditions, shape ``(batch, directions)`` by modality; none are not believed.
        batch: Their number.
    """
    if not conditions:
        return torch.zeros(batch, 1)
    shares = []
    for name, rows in conditions.items():
        near, far = reach[name][-2:]
        distance = torch.cdist(rows.float(), known[name].float()).min(1).values
        shares.append(((far - distance) / (far - near)).clamp(0, 1))
    return torch.stack(shares).mean(0)[:, None]
