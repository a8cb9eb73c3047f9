"""A lower rank: the nearest one in ΔW, with what it loses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.layouts import CASES, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.truncation import truncate
from lora_factory.errors import LoraFactoryError


def adapter(name: str) -> tuple[AdapterLayout, dict[str, torch.Tensor]]:
    build, config = CASES[name]
    model = get_peft_model(build(), replace(config))
    state_dict = randomise(get_peft_model_state_dict(model, save_embedding_layers=False))
    return AdapterLayout.from_state_dict(state_dict, model.peft_config["default"], base_model="pico"), state_dict


ADAPTERS = {name: adapter(name) for name in CASES}


def deltas(layout: AdapterLayout, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [
        m.scaling * weights[m.key_b].double().flatten(1) @ weights[m.key_a].double().flatten(1) for m in layout.modules
    ]


@pytest.mark.parametrize("rank", [1, 2, 7])
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_the_best_approximation_of_its_rank(name: str, rank: int) -> None:
    layout, weights = ADAPTERS[name]
    low, found, error = truncate(layout, weights, rank)
    assert {module.rank for module in low.modules} == {rank} and low.lora_config["r"] == rank
    low.check(found)
    assert all(value.dtype == torch.float32 for value in found.values())
    lost = total = 0.0
    for change, whole in zip(deltas(low, found), deltas(layout, weights), strict=True):
        u, values, v = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(change, (u[:, :rank] * values[:rank]) @ v[:rank], rtol=1e-4, atol=1e-4)
        lost, total = lost + float(values[rank:].square().sum()), total + float(values.square().sum())
    assert error == pytest.approx(lost / total, abs=1e-9)
    assert (error > 1e-3) == (rank < max(module.rank for module in layout.modules))


@given(st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_in_two_steps_as_in_one(rank: int, more: int) -> None:
    layout, weights = ADAPTERS["mixed ranks"]
    low, direct, error = truncate(layout, weights, rank)
    middle, halfway, first = truncate(layout, weights, rank + more)
    _, found, _ = truncate(middle, halfway, rank)
    assert first <= error + 1e-9
    for left, right in zip(deltas(low, found), deltas(low, direct), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_changes_nothing_loses_nothing() -> None:
    layout, weights = ADAPTERS["Conv2d"]
    nothing = weights | {module.key_b: torch.zeros(module.shape_b) for module in layout.modules}
    low, found, error = truncate(layout, nothing, 1)
    assert error == 0 and not any(change.any() for change in deltas(low, found))
    with pytest.raises(LoraFactoryError, match="rank=0"):
        truncate(layout, weights, 0)
