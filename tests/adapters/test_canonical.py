"""Canonical weights: any factorisation of the same update has the same form, and does what it did."""

from __future__ import annotations

import pytest
import torch
from helpers.layouts import CASES, llama, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from lora_factory.adapters.attach import AdapterSlot, attach_adapter
from lora_factory.adapters.canonical import canonical_layout, canonicalise
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError


def layout_of(model: torch.nn.Module, config: LoraConfig) -> AdapterLayout:
    state_dict = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    return AdapterLayout.from_state_dict(state_dict, config, base_model="someone/pico")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", params=["q/v only", "all-linear", "embeddings", "Conv2d", "mixed ranks"])
def layout(request: pytest.FixtureRequest) -> AdapterLayout:
    build, config = CASES[request.param]
    return layout_of(build(), config)


def products(layout: AdapterLayout, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every module's update, ``scaling * B A``."""
    weights = layout.unflatten(vector)
    return {
        module.path: module.scaling * weights[module.key_b].flatten(1) @ weights[module.key_a].flatten(1)
        for module in layout.modules
    }


def regauged(layout: AdapterLayout, vector: torch.Tensor, seed: int) -> torch.Tensor:
    """The same adapter with every module's factors multiplied by an invertible matrix and its inverse."""
    weights = layout.unflatten(vector)
    for number, module in enumerate(layout.modules):
        gauge = torch.eye(module.rank, dtype=vector.dtype) + 0.3 * normal(module.rank, module.rank, seed=seed + number)
        a, b = weights[module.key_a], weights[module.key_b]
        weights[module.key_a] = (torch.linalg.inv(gauge) @ a.flatten(1)).reshape(a.shape)
        weights[module.key_b] = (b.flatten(1) @ gauge).reshape(b.shape)
    return layout.flatten(weights)


def test_the_update_stays_the_same(layout: AdapterLayout) -> None:
    vector, target = normal(layout.size), canonical_layout(layout)
    before, after = products(layout, vector), products(target, canonicalise(layout, vector))
    for path in before:
        torch.testing.assert_close(after[path], before[path])
    assert {module.scaling for module in target.modules} == {1.0}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_any_gauge_gives_the_same_form(seed: int, gauge_seed: int) -> None:
    layout = layout_of(llama(1), LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    vector = normal(layout.size, seed=seed)
    other = regauged(layout, vector, gauge_seed)
    assert not torch.allclose(other, vector)
    torch.testing.assert_close(canonicalise(layout, other), canonicalise(layout, vector), rtol=1e-5, atol=1e-7)


def test_the_form_is_balanced_sorted_and_its_own(layout: AdapterLayout) -> None:
    target = canonical_layout(layout)
    once = canonicalise(layout, normal(layout.size))
    torch.testing.assert_close(canonicalise(target, once), once)
    for module in target.modules:
        weights = target.unflatten(once)
        lengths = weights[module.key_a].flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, weights[module.key_b].flatten(1).norm(dim=0))
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_snapshots_at_once_and_one_by_one(layout: AdapterLayout) -> None:
    vectors = normal(2, 3, layout.size)
    together = canonicalise(layout, vectors)
    torch.testing.assert_close(together[1, 2], canonicalise(layout, vectors[1, 2]))


def test_a_higher_rank_leaves_room(layout: AdapterLayout) -> None:
    target = canonical_layout(layout, 9)
    vector = normal(layout.size)
    after = products(target, canonicalise(layout, vector, target))
    for path, before in products(layout, vector).items():
        torch.testing.assert_close(after[path], before)
    with pytest.raises(LoraFactoryError, match="weights would be lost"):
        canonical_layout(layout, 1)


@pytest.mark.parametrize("rslora", [False, True])
def test_with_rank_keeps_what_adapters_do(rslora: bool) -> None:
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    torch.manual_seed(0)
    base = llama().eval()
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config)
    state_dict = randomise(get_peft_model_state_dict(model, save_embedding_layers=False))
    layout = AdapterLayout.from_state_dict(state_dict, config, base_model="someone/pico")
    AdapterSlot(model, layout).load(state_dict)
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    wider = layout.with_rank(8)
    assert [module.rank for module in wider.modules] == [8] * len(layout.modules)
    vector = layout.flatten(state_dict)
    padded = layout.widen(vector, wider)
    assert torch.equal(layout.widen(vector, layout.with_rank(3)), vector)
    fresh = llama().eval()
    fresh.load_state_dict(plain)
    torch.testing.assert_close(attach_adapter(fresh, wider, wider.unflatten(padded))(ids).logits, expected)
    with pytest.raises(LoraFactoryError, match="below the layout's rank"):
        layout.with_rank(2)


def test_with_rank_refuses_ranks_of_their_own() -> None:
    build, config = CASES["mixed ranks"]
    with pytest.raises(LoraFactoryError, match="rank_pattern"):
        layout_of(build(), config).with_rank(8)
