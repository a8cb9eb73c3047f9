"""How far a condition is believed, by its distance from the tasks that training knew."""

from __future__ import annotations

import pytest
import torch
from helpers.conditions import TASKS, WIDTH, normal
from lora_factory.generator.familiarity import familiarity, measure_reach

from lora_factory.generator.networks import ConditionStandardiser


@pytest.fixture
def features() -> dict[str, dict[str, torch.Tensor]]:
    centres = 3 * normal(TASKS, WIDTH)
    return {
        "text": {f"task {n}": centres[n] + 0.3 * normal(4, WIDTH, seed=n + 1) for n in range(TASKS)},
        "hidden": {f"task {n}": centres[n] + normal(64, WIDTH, seed=n + 9) for n in range(TASKS)},
    }


@pytest.fixture
def standardiser(features: dict[str, dict[str, torch.Tensor]]) -> ConditionStandardiser:
    fitted = ConditionStandardiser({"hidden": WIDTH, "text": WIDTH}, {"text": TASKS})
    fitted.fit({name: torch.stack([rows.mean(0) for rows in tasks.values()]) for name, tasks in features.items()})
    return fitted


def believed(standardiser: ConditionStandardiser, features: dict, **conditions: torch.Tensor) -> list[float]:
    known = {
        name: standardiser(name, torch.stack([rows.mean(0) for rows in tasks.values()]))
        for name, tasks in features.items()
    }
    batch = len(next(iter(conditions.values()))) if conditions else 1
    reach = measure_reach(standardiser, features)
    return familiarity(reach, known, standardiser.all(conditions), batch)[:, 0].tolist()


def test_known_tasks_are_believed_and_unrelated_conditions_are_not(
    standardiser: ConditionStandardiser, features: dict
) -> None:
    descriptions = torch.stack([rows[1] for rows in features["text"].values()])
    assert believed(standardiser, features, text=descriptions) == [1.0] * TASKS
    few = torch.stack([rows[:16].mean(0) for rows in features["hidden"].values()])
    assert believed(standardiser, features, hidden=few) == [1.0] * TASKS
    centres = torch.stack([rows.mean(0) for rows in features["text"].values()])
    unrelated = centres.mean(0) + 3 * normal(1, WIDTH, seed=99)
    span = (centres - centres.mean(0)).T
    unrelated -= (span @ torch.linalg.lstsq(span, (unrelated - centres.mean(0)).T).solution).T
    (share,) = believed(standardiser, features, text=unrelated)
    assert share == pytest.approx(0, abs=1e-3)


def test_belief_falls_with_the_distance_and_is_a_mean_over_modalities(
    standardiser: ConditionStandardiser, features: dict
) -> None:
    centres = torch.stack([rows.mean(0) for rows in features["text"].values()])
    towards = centres.mean(0) + torch.linspace(1, 0, 9)[:, None] * (centres[0] - centres.mean(0))
    shares = believed(standardiser, features, text=towards)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert len(set(shares)) > 3
    hidden = torch.stack([rows.mean(0) for rows in features["hidden"].values()]).mean(0, keepdim=True)
    (alone,), (both,) = (
        believed(standardiser, features, hidden=hidden),
        believed(standardiser, features, hidden=hidden, text=centres[:1]),
    )
    assert both == pytest.approx((alone + 1) / 2)


def test_without_a_condition_nothing_is_believed(standardiser: ConditionStandardiser, features: dict) -> None:
    assert believed(standardiser, features) == [0.0]


def test_a_single_description_a_task_is_enough(standardiser: ConditionStandardiser, features: dict) -> None:
    single = {"text": {name: rows[:1] for name, rows in features["text"].items()}}
    near, far = measure_reach(standardiser, single)["text"]
    assert near == 0 < far
