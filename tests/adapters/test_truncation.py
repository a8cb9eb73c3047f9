"""An adapter at a lower rank: the nearest one in every module's ΔW, and what it loses."""

from dataclasses import replace

import pytest
import torch
from helpers.layouts import CASES, randomise
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from lora_factory.adapters.attach import AdapterSlot
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.truncation import truncate


def updates(layout, state_dict):
    """ΔW (out, in) of every module, in float64."""
    wide = {key: tensor.double().flatten(1) for key, tensor in state_dict.items()}
    return {module.path: module.scaling * wide[module.key_b] @ wide[module.key_a] for module in layout.modules}


@pytest.fixture(params=CASES)
def adapter(request):
    make, config = CASES[request.param]
    model = get_peft_model(make(), replace(config))
    state_dict = randomise(get_peft_model_state_dict(model, save_embedding_layers=False))
    return state_dict, AdapterLayout.from_state_dict(state_dict, model.peft_config["default"], base_model="pico")


@pytest.mark.parametrize("rank", [1, 2])
def test_the_nearest_adapter_of_a_rank(adapter, rank):
    state_dict, layout = adapter
    lower, weights, lost = truncate(layout, state_dict, rank)
    lower.check(weights)
    assert {module.rank for module in lower.modules} == {rank}
    before, after, missed, total = updates(layout, state_dict), updates(lower, weights), 0.0, 0.0
    for path, update in before.items():
        values = torch.linalg.svdvals(update)
        error = (update - after[path]).norm()
        torch.testing.assert_close(error, values[rank:].norm(), atol=1e-4, rtol=1e-4)
        missed, total = missed + float(error.square()), total + float(update.square().sum())
    assert lost == pytest.approx(missed / total, abs=1e-6)


def test_nothing_is_lost_at_a_rank_that_holds_all(adapter):
    state_dict, layout = adapter
    rank = max(module.rank for module in layout.modules) + 1
    higher, weights, lost = truncate(layout, state_dict, rank)
    assert lost == 0 and {module.rank for module in higher.modules} == {rank}
    before, after = updates(layout, state_dict), updates(higher, weights)
    for path, update in before.items():
        torch.testing.assert_close(after[path], update, atol=1e-4, rtol=1e-4)


def test_peft_runs_the_adapter_of_the_lower_rank(adapter, request):
    state_dict, layout = adapter
    lower, weights, _ = truncate(layout, state_dict, 1)
    make, _ = CASES[request.node.callspec.params["adapter"]]
    model = get_peft_model(make(), lower.training_config())
    AdapterSlot(model, lower).load(weights)
    live = dict(model.base_model.model.named_modules())
    for path, update in updates(lower, weights).items():
        delta = live[path].get_delta_weight("default").detach().double()
        stored_as_in_out = getattr(live[path], "fan_in_fan_out", False) or isinstance(
            live[path].base_layer, nn.Embedding
        )
        delta = delta.mT if stored_as_in_out else delta
        torch.testing.assert_close(delta.flatten(1), update, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_zeros_loses_nothing(adapter):
    state_dict, layout = adapter
    zeros = {key: torch.zeros_like(value) for key, value in state_dict.items()}
    lower, weights, lost = truncate(layout, zeros, 1)
    assert lost == 0 and not any(tensor.any() for tensor in weights.values())
    lower.check(weights)
