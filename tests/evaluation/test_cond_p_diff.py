from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.cond_p_diff import CondPDiff, train_cond_p_diff

SIZE, WIDTH, TASKS = 2500, 16, 4  # the size is no multiple of the chunk


def synthetic_zoo(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Well separated clusters of weights (spread a tenth of their distance), one direction of task vectors each."""
    source = torch.Generator().manual_seed(seed)
    shared, directions = (
        torch.randn(SIZE, generator=source),
        torch.linalg.qr(torch.randn(WIDTH, TASKS, generator=source))[0].T,
    )
    weights, features = {}, {}
    for task in range(TASKS):
        center = 0.05 * shared + 0.02 * torch.randn(SIZE, generator=source)
        weights[f"task-{task}"] = center + 0.002 * torch.randn(6, SIZE, generator=source)
        features[f"task-{task}"] = directions[task] + 0.02 * torch.randn(3, WIDTH, generator=source)
    return weights, features


@pytest.fixture(scope="module")
def zoo() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    return synthetic_zoo()


@pytest.fixture(scope="module")
def trained(zoo) -> CondPDiff:
    return train_cond_p_diff(
        *zoo, autoencoder_steps=100, diffusion_steps=250, batch_size=12, autoencoder_learning_rate=1e-2
    )


def relative_error(generated: Tensor, task: str, weights: dict[str, Tensor]) -> float:
    """Squared distance to the task's mean in units of the zoo mean's: 0 is perfect, 1 is the uniform soup."""
    target = weights[task].mean(0)
    soup = torch.stack([rows.mean(0) for rows in weights.values()]).mean(0)
    return ((generated - target).square().sum() / (soup - target).square().sum()).item()


def test_autoencoder_reconstructs_the_zoo(trained, zoo) -> None:
    weights, _ = zoo
    with torch.no_grad():
        for task, rows in weights.items():
            decoded = trained.weights(trained.decode(trained.encode(trained.standardise(rows))))
            assert relative_error(decoded.mean(0), task, weights) < 0.02


@pytest.mark.parametrize("steps", [None, 50])
def test_samples_land_on_the_task_that_the_condition_names(trained, zoo, steps) -> None:
    weights, features = zoo
    for task, rows in features.items():
        generated = trained.generate(rows.mean(0), seed=1, steps=steps)
        errors = {name: relative_error(generated, name, weights) for name in weights}
        assert generated.shape == (SIZE,) and generated.dtype == torch.float32
        assert min(errors, key=errors.__getitem__) == task
        assert errors[task] < 0.05


def test_samples_return_from_the_standardised_latents(trained, zoo) -> None:
    model = copy.deepcopy(trained)
    model.latent_mean += 0.5
    model.denoiser.forward = lambda latents, times, conditions: torch.full_like(latents, 2.0)
    with torch.no_grad():
        expected = model.weights(model.decode((model.latent_mean + 2 * model.latent_scale)[None]))[0]
    generated = model.generate(zoo[1]["task-0"][0], steps=10)
    torch.testing.assert_close(generated, expected)


def test_seeds_decide_the_sample(trained, zoo) -> None:
    vector = zoo[1]["task-0"][0]
    state = torch.get_rng_state()
    first, again, other = (trained.generate(vector, seed=seed, steps=10) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state), "sampling must leave the global generator alone"


def test_training_repeats_and_leaves_the_global_generator_alone(zoo) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        train_cond_p_diff(*zoo, seed=seed, autoencoder_steps=2, diffusion_steps=2).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["reduce"], other["reduce"])


def test_standardising_inverts_and_has_unit_scale(trained, zoo) -> None:
    rows = torch.cat(list(zoo[0].values()))
    chunks = trained.standardise(rows)
    torch.testing.assert_close(trained.weights(chunks), rows)
    whole = chunks[:, : SIZE // trained.sizes["chunk"]]
    torch.testing.assert_close(whole.square().mean((0, 2)).sqrt(), torch.ones(2), atol=1e-3, rtol=0)
    tail = chunks[:, -1, : SIZE % trained.sizes["chunk"]]
    torch.testing.assert_close(tail.square().mean().sqrt(), torch.ones(()), atol=1e-3, rtol=0)


def test_tasks_with_more_snapshots_do_not_count_more() -> None:
    pytest.importorskip("diffusers")
    weights, features = synthetic_zoo()
    weights["task-0"] = weights["task-0"].repeat(9, 1)
    model = train_cond_p_diff(weights, features, autoencoder_steps=1, diffusion_steps=1)
    torch.testing.assert_close(model.mean, torch.stack([rows.mean(0) for rows in weights.values()]).mean(0))


def test_parameters_grow_linearly() -> None:
    with torch.device("meta"):
        small, large = (sum(p.numel() for p in CondPDiff(size, 32).parameters()) for size in (200_000, 2_000_000))
    assert large < 10.5 * small and large < 40 * 2_000_000


def test_saving_and_loading_keep_every_sample(trained, zoo, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    loaded = CondPDiff.load(tmp_path / "model")
    vector = zoo[1]["task-2"][0]
    assert torch.equal(loaded.generate(vector, seed=3, steps=5), trained.generate(vector, seed=3, steps=5))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["cond_p_diff.json", "model.safetensors"]
    with pytest.raises(LoraFactoryError, match="overwrite=True"):
        trained.save(tmp_path / "model")


@pytest.mark.parametrize("damage", ["truncated", "missing", "sizes", "unknown", "version", "nan"])
def test_damaged_folders_are_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    model = CondPDiff(100, 4)
    if damage == "nan":
        model.mean[3] = torch.nan
    model.save(folder)
    weights, config = folder / "model.safetensors", folder / "cond_p_diff.json"
    sizes = json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "missing":
        weights.unlink()
    elif damage != "nan":
        sizes |= {"sizes": {"size": 90}, "unknown": {"colour": 1}, "version": {"format_version": 99}}[damage]
        config.write_text(json.dumps(sizes))
    with pytest.raises(LoraFactoryError, match=r"CondPDiff\.save"):
        CondPDiff.load(folder)


def test_wrong_inputs_are_named(trained, zoo) -> None:
    weights, features = zoo
    with pytest.raises(LoraFactoryError, match="task-3"):
        train_cond_p_diff(weights, {name: rows for name, rows in features.items() if name != "task-3"})
    with pytest.raises(LoraFactoryError, match=r"weights of task 'task-1'.*\(n, 2500\)"):
        train_cond_p_diff({**weights, "task-1": weights["task-1"][:, 1:]}, features)
    with pytest.raises(LoraFactoryError, match="features of task 'task-1'"):
        train_cond_p_diff(weights, {**features, "task-1": features["task-1"] * torch.nan})
    with pytest.raises(LoraFactoryError, match=r"expected \(16,\)"):
        trained.generate(torch.zeros(17))


def test_a_loss_that_is_not_finite_is_named(zoo) -> None:
    with pytest.raises(LoraFactoryError, match=r"denoiser: the loss is nan at step 1; lower its learning rate"):
        train_cond_p_diff(*zoo, autoencoder_steps=1, diffusion_steps=1, condition_noise=float("nan"))


def test_missing_diffusers_is_named_before_any_work(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LoraFactoryError, match=r"diffusers; run: pip install 'lora-factory\[baselines\]'"):
        train_cond_p_diff(*zoo, autoencoder_steps=10**9)
