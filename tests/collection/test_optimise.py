"""The loop of optimizer steps: what it stops at, and where it goes on."""

from __future__ import annotations

import math

import pytest
import torch

from lora_factory.collection.optimise import take_steps
from lora_factory.errors import LoraFactoryError


def quadratic(start: float = 4.0) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.tensor([start]))
    return parameter, torch.optim.SGD([parameter], lr=0.1)


def test_steps_follow_clipped_gradients_and_the_schedule() -> None:
    parameter, optimizer = quadratic()
    parameter.grad = torch.tensor([100.0])  # left by a run that failed
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def gradients(step: int) -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    found = []
    for step, loss, _ in take_steps(gradients, optimizer, 5, start=2, label="x", advice="y", schedule=schedule):
        found.append((step, loss, parameter.item()))
    expected, value = [], 4.0
    for count in range(3):
        loss, value = value**2, value - 0.1 / (1 + count) * min(1.0, 2 * value)
        expected.append((3 + count, loss, value))
    assert found == [tuple(pytest.approx(number) for number in row) for row in expected]


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("norm", [1.0, math.inf])
def test_what_is_not_finite_ends_the_training_before_its_step(loss: float, gradient: float, norm: float) -> None:
    parameter, optimizer = quadratic()

    def gradients(step: int) -> float:
        parameter.grad = torch.tensor([gradient if step == 2 else 1.0])
        return loss if step == 2 else 1.0

    steps = take_steps(gradients, optimizer, 4, label="the run", advice="lower the rate", max_grad_norm=norm)
    assert next(steps)[0] == 1
    before = parameter.item()
    with pytest.raises(LoraFactoryError, match=r"the run: the (loss is|gradients are) .* step 2; lower the rate"):
        next(steps)
    assert parameter.item() == before
