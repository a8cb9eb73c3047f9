"""The shared basis: its cores are adapters, adapters become its cores, and a base model runs with many at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from helpers.layouts import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from lora_factory.adapters.attach import AdapterSlot, adapters_in_batch
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.generator import basis as basis_module
from lora_factory.generator.basis import CoreBasis


class Convolutional(nn.Module):
    """Embedding, 2-D convolution and a linear layer: every kind of module that carries LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 9)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 5)
        self.config = type("Config", (), {"model_type": "none", "to_dict": dict})()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.embed(ids)[:, None]).mean((2, 3)))


KINDS = CASES | {
    "every kind": (Convolutional, LoraConfig(r=2, lora_alpha=6, target_modules=["embed", "conv", "head"]))
}
READING = ["all-linear", "embeddings", "Conv1D", "mixed ranks", "rsLoRA", "every kind"]  # these have a forward pass


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> tuple[nn.Module, AdapterLayout]:
    build, config = KINDS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        wrapped = get_peft_model(copy.deepcopy(model), replace(config))
    state_dict = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return model.eval(), AdapterLayout.from_state_dict(state_dict, wrapped.peft_config["default"], base_model="none")


LAYOUTS = {name: make(name)[1] for name in KINDS}


def deltas(layout: AdapterLayout, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """ΔW of every module, formed: ``(n, out, in)``."""
    weights = layout.unflatten(vectors.double())
    return {m.path: m.scaling * weights[m.key_b].flatten(2) @ weights[m.key_a].flatten(2) for m in layout.modules}


def squares(changes: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([change.square().sum((1, 2)) for change in changes.values()]).sum(0)


def other_factors(layout: AdapterLayout, vectors: torch.Tensor) -> torch.Tensor:
    """The same ΔW from other factors: B G and G⁻¹ A."""
    weights, changed = layout.unflatten(vectors), {}
    for number, m in enumerate(layout.modules):
        turn = torch.linalg.qr(normal(m.rank, m.rank, seed=number)).Q * torch.linspace(0.5, 2, m.rank)
        a, b = weights[m.key_a].flatten(2), weights[m.key_b].flatten(2)
        changed[m.key_a] = (torch.linalg.inv(turn) @ a).reshape(len(vectors), *m.shape_a)
        changed[m.key_b] = (b @ turn).reshape(len(vectors), *m.shape_b)
    return layout.flatten(changed)


def random_basis(layout: AdapterLayout, *, diagonal: bool = False) -> CoreBasis:
    basis = CoreBasis(layout, diagonal=diagonal)
    with torch.no_grad():
        basis.factors.copy_(0.3 * normal(layout.size))
    return basis


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> AdapterLayout:
    return LAYOUTS[request.param]


@pytest.mark.parametrize("diagonal", [False, True])
def test_an_adapter_is_its_core_between_the_factors(layout: AdapterLayout, diagonal: bool) -> None:
    basis = random_basis(layout, diagonal=diagonal)
    sizes = [m.rank if diagonal else m.rank**2 for m in layout.modules]
    assert basis.sizes == sizes
    cores, factors = normal(3, sum(basis.sizes), seed=1), layout.unflatten(basis.factors.detach().double())
    found = deltas(layout, basis.adapters(cores).detach())
    for module, part in zip(layout.modules, cores.double().split(sizes, dim=1), strict=True):
        core = part.diag_embed() if diagonal else part.reshape(3, module.rank, module.rank)
        expected = module.scaling * factors[module.key_b].flatten(1) @ core @ factors[module.key_a].flatten(1)
        torch.testing.assert_close(found[module.path], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(basis.adapters(basis.identity()[None])[0], basis.factors)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_nearest_core_of_factors_that_are_not_orthonormal(
    layout: AdapterLayout, diagonal: bool, lost: int
) -> None:
    basis = random_basis(layout, diagonal=diagonal)
    if lost:  # directions that float32 tells apart by its rounding alone
        with torch.no_grad():
            weights = layout.unflatten(basis.factors)
            for module in layout.modules:
                a = weights[module.key_a]
                a[-1] = a[0] * (1 + 1e-7)
            basis.factors.copy_(layout.flatten(weights))
    adapters = normal(2, layout.size, seed=1)
    cores, errors = basis.project(layout, adapters)
    factors, residual = layout.unflatten(basis.factors.detach().double()), 0.0
    wanted, found = deltas(layout, adapters), deltas(layout, basis.adapters(cores).detach())
    for module in layout.modules:
        a, b = factors[module.key_a].flatten(1), factors[module.key_b].flatten(1)
        spanned = torch.einsum("or,si->rsoi", b, a).flatten(2)
        spanned = (spanned.diagonal().mT if diagonal else spanned.flatten(0, 1)).mT
        change = wanted[module.path].flatten(1).mT
        nearest = spanned @ (torch.linalg.pinv(spanned, rtol=1e-6) @ change)
        torch.testing.assert_close(found[module.path].flatten(1).mT, nearest, rtol=1e-3, atol=1e-3)
        residual = residual + (change - nearest).square().sum(0)
    torch.testing.assert_close(errors.double(), residual / squares(wanted), rtol=1e-3, atol=1e-4)


def test_adapters_whose_ranks_fit_into_the_basis_are_kept_exactly(layout: AdapterLayout) -> None:
    adapters = normal(3, layout.size)
    basis = CoreBasis(layout.with_rank(3 * max(m.rank for m in layout.modules)))
    basis.fit([(layout, adapters)])
    cores, errors = basis.project(layout, adapters)
    assert cores.shape == (3, sum(basis.sizes)) and errors.max() < 1e-5
    found, expected = deltas(basis.layout, basis.adapters(cores).detach()), deltas(layout, adapters)
    for path, change in expected.items():
        torch.testing.assert_close(found[path], change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spare", [0, 4])
def test_the_factors_of_the_adapters_are_of_no_effect(layout: AdapterLayout, spare: int) -> None:
    adapters, wide = normal(3, layout.size), layout.with_rank(max(m.rank for m in layout.modules) + spare)
    found, projectors, errors = [], [], []
    for vectors in (adapters, other_factors(layout, adapters)):
        basis = CoreBasis(wide)
        basis.fit([(layout, vectors)])
        cores, error = basis.project(layout, vectors)
        found.append(deltas(wide, basis.adapters(cores).detach()))
        factors = wide.unflatten(basis.factors.detach())
        rows = [factors[m.key_a].flatten(1) for m in wide.modules]
        rows += [factors[m.key_b].flatten(1).mT for m in wide.modules]
        projectors.append([part.mT @ part for part in rows])
        errors.append(error)
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-4)
    for path, change in found[0].items():
        torch.testing.assert_close(found[1][path], change, rtol=1e-3, atol=1e-2)
    for left, right in zip(*projectors, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-3)


def test_the_error_is_the_share_of_what_is_lost_and_no_core_is_nearer(layout: AdapterLayout) -> None:
    adapters = normal(4, layout.size)
    for diagonal in (False, True):
        basis = CoreBasis(layout.with_rank(max(m.rank for m in layout.modules)), diagonal=diagonal)
        basis.fit([(layout, adapters)])
        cores, errors = basis.project(layout, adapters)
        wanted = deltas(layout, adapters)

        def lost(cores: torch.Tensor, basis: CoreBasis = basis, wanted: dict = wanted) -> torch.Tensor:
            found = deltas(basis.layout, basis.adapters(cores).detach())
            return squares({path: found[path] - change for path, change in wanted.items()})

        assert errors.min() > 0.05 or layout.modules[0].rank * 4 > min(wanted[layout.modules[0].path].shape[1:])
        torch.testing.assert_close(errors.double(), lost(cores) / squares(wanted), rtol=1e-3, atol=1e-4)
        for seed in range(3):
            assert (lost(cores + 0.05 * normal(*cores.shape, seed=seed)) > lost(cores)).all()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 6), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_larger_basis_loses_no_more(rank: int, count: int, more: int, seed: int) -> None:
    layout = LAYOUTS["q/v only"].with_rank(rank)
    adapters, errors = normal(count, layout.size, seed=seed), []
    for size in (rank, rank + more):
        basis = CoreBasis(layout.with_rank(size))
        basis.fit([(layout, adapters)])
        errors.append(float(basis.project(layout, adapters)[1].mean()))
        assert 0 <= errors[-1] <= 1
        if size >= rank * count:
            assert errors[-1] < 1e-5
    assert errors[1] <= errors[0] + 1e-5


def test_layouts_of_other_ranks_and_without_a_module_count_too() -> None:
    full = LAYOUTS["all-linear"]
    few = LAYOUTS["q/v only"]
    mixed = LAYOUTS["mixed ranks"]
    groups = [(full, normal(2, full.size)), (few, normal(1, few.size, seed=1)), (mixed, normal(1, mixed.size, seed=2))]
    basis = CoreBasis(AdapterLayout.union([full, few, mixed], rank=2 * 3 + 2 + 5))
    basis.fit(groups)
    for layout, adapters in groups:
        cores, errors = basis.project(layout, adapters)
        assert errors.max() < 1e-5
        found, wanted = deltas(basis.layout, basis.adapters(cores).detach()), deltas(layout, adapters)
        for path, change in found.items():
            torch.testing.assert_close(
                change, wanted.get(path, torch.zeros_like(change)), rtol=1e-3, atol=1e-3, msg=path
            )


def test_an_adapter_that_changes_nothing_has_no_error() -> None:
    layout = LAYOUTS["q/v only"]
    basis = CoreBasis(layout)
    basis.fit([(layout, torch.zeros(2, layout.size))])
    cores, errors = basis.project(layout, torch.zeros(1, layout.size))
    assert not cores.any() and not errors.any()
    assert basis.factors.isfinite().all()


def test_randomised_directions_are_those_of_the_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["all-linear"]
    strong, weak = normal(2, layout.size), 0.1 * normal(12, layout.size, seed=1)
    groups = [(layout, strong), (layout, weak)]
    bases = [CoreBasis(layout.with_rank(6)) for _ in range(2)]
    bases[0].fit(groups)
    monkeypatch.setattr(basis_module, "EXACT_COLUMNS", 4)
    state = torch.random.get_rng_state()
    bases[1].fit(groups)
    assert torch.equal(torch.random.get_rng_state(), state)
    exact, random = (basis.project(layout, strong)[1] for basis in bases)
    assert random.max() < 1.1 * exact.max() + 1e-4
    again = CoreBasis(layout.with_rank(6))
    again.fit(groups)
    assert torch.equal(again.factors, bases[1].factors)


def with_cores(model: nn.Module, basis: CoreBasis, cores: torch.Tensor) -> AbstractContextManager[None]:
    return basis.in_batch(model, cores)


def with_adapters(model: nn.Module, basis: CoreBasis, cores: torch.Tensor) -> AbstractContextManager[None]:
    return adapters_in_batch(model, basis.layout, basis.adapters(cores))


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("way", [with_cores, with_adapters])
@pytest.mark.parametrize("name", READING)
def test_a_batch_runs_as_with_each_adapter_attached(name: str, way: Callable) -> None:
    model, layout = make(name)
    basis, ids = random_basis(layout), torch.randint(48, (6, 7), generator=torch.Generator().manual_seed(0))
    cores = 0.7 * normal(3, sum(basis.sizes), seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        plain = logits(model, ids)
        with way(model, basis, cores):
            together = logits(model, ids)
        assert torch.equal(logits(model, ids), plain)
        assert not torch.allclose(together, plain, atol=1e-3)
        slot = AdapterSlot(get_peft_model(copy.deepcopy(model), layout.peft_config()), layout)
        with slot.disabled(), way(slot.model, basis, cores):
            torch.testing.assert_close(logits(slot.model, ids), together, atol=1e-5, rtol=1e-4)
        for index, adapter in enumerate(basis.adapters(cores)):
            slot.load(adapter)
            part = slice(2 * index, 2 * index + 2)
            torch.testing.assert_close(together[part], logits(slot.model.eval(), ids[part]), atol=1e-4, rtol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", READING)
def test_gradients_reach_factors_and_cores(name: str, diagonal: bool) -> None:
    model, layout = make(name)
    model.requires_grad_(False)
    ids, gradients = torch.randint(48, (4, 7), generator=torch.Generator().manual_seed(0)), []
    for way in (with_cores, with_adapters):
        basis = random_basis(layout, diagonal=diagonal)
        cores = normal(2, sum(basis.sizes), seed=1).requires_grad_()
        with way(model, basis, cores):
            logits(model, ids).square().mean().backward()
        assert cores.grad is not None and basis.factors.grad is not None
        assert all(part.any() for part in cores.grad.split(basis.sizes, dim=1))
        gradients.append((cores.grad, basis.factors.grad))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()) + 1e-7)


def test_a_base_in_half_precision_stays_in_it() -> None:
    model, layout = make("all-linear")
    ids, basis = torch.randint(48, (4, 7), generator=torch.Generator().manual_seed(0)), random_basis(layout)
    cores = normal(2, sum(basis.sizes), seed=1)
    with torch.no_grad():
        with basis.in_batch(model, cores):
            expected = logits(model, ids)
        with basis.in_batch(model.bfloat16(), cores):
            found = logits(model, ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_a_batch_that_cannot_be_shared_and_a_foreign_base_are_refused() -> None:
    model, layout = make("q/v only")
    basis, (foreign, _) = random_basis(layout), make("every kind")
    cores = normal(2, sum(basis.sizes))
    with basis.in_batch(model, cores), pytest.raises(LoraFactoryError, match="gets 3 rows for 2 adapters"):
        model(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(LoraFactoryError, match="has no module"), basis.in_batch(foreign, cores):
        pass
    for one in (model, foreign):
        assert not any(module._forward_hooks for module in one.modules())
    assert math.isfinite(float(logits(model, torch.ones(3, 4, dtype=torch.long)).detach().sum()))
