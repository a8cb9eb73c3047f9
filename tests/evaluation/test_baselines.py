from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_factory.arguments import CollectArguments
from lora_factory.collection.multitask import mixed_batches, train_multitask
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.baselines import (
    PcaRidge,
    Retrieval,
    SimilarityMixture,
    gibberish,
    greedy_soup,
    other_task,
    uniform_soup,
)
from lora_factory.models.inputs import TokenSequence
from lora_factory.tasks.task import Task


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_uniform_soup_counts_every_task_once() -> None:
    weights = {"many": torch.ones(9, 3), "one": torch.full((1, 3), 3.0, dtype=torch.bfloat16)}
    assert torch.equal(uniform_soup(weights), torch.full((3,), 2.0))
    snapshots = normal(5, 3)
    torch.testing.assert_close(uniform_soup({"own": snapshots}), snapshots.mean(0))
    with pytest.raises(LoraFactoryError, match="empty-task"):
        uniform_soup({"empty-task": torch.zeros(0, 3)})
    with pytest.raises(LoraFactoryError, match="any task"):
        uniform_soup({})


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_greedy_soup_is_never_worse_than_the_best_single_one(count: int, seed: int) -> None:
    candidates, target, curvature = normal(count, 6, seed=seed), normal(6, seed=seed + 1), normal(6, seed=seed + 2)

    def loss(adapter: Tensor) -> float:  # not convex, so that averages can be worse than their members
        return ((adapter - target).square() * curvature + (3 * adapter).cos()).sum().item()

    assert loss(greedy_soup(candidates, loss)) <= min(map(loss, candidates))


def test_greedy_soup_averages_what_helps_and_leaves_out_what_does_not() -> None:
    candidates = torch.tensor([[50.0, 0.0], [0.0, 1.0], [0.0, -1.2], [0.3, 0.1]])
    soup = greedy_soup(candidates, lambda adapter: adapter.square().sum().item())
    # from the best: [.3, .1] stays; with [0, 1] it gets worse; with [0, -1.2] as well
    torch.testing.assert_close(soup, candidates[3])
    soup = greedy_soup(candidates[:3], lambda adapter: adapter.square().sum().item())
    torch.testing.assert_close(soup, torch.tensor([0.0, -0.1]))


def test_greedy_soup_takes_ties_and_passes_over_diverged_candidates() -> None:
    candidates = torch.tensor([[1.0], [torch.nan], [3.0]])
    assert greedy_soup(candidates, lambda adapter: 0.0 if adapter.isfinite() else float("nan")).item() == 2.0
    with pytest.raises(LoraFactoryError, match="none of 1 candidates"):
        greedy_soup(candidates[1:2], lambda adapter: float("nan"))


def test_retrieval_picks_the_nearest_after_centring() -> None:
    # All vectors share a large component, beside which raw cosines could not tell them apart.
    directions = torch.eye(4)
    vectors = directions * torch.tensor([1.0, 5.0, 1.0, 1.0])[:, None] + 100.0
    weights = normal(4, 7)
    retrieval = Retrieval.fit(vectors, weights)
    for task in range(4):
        asked = vectors[task] + 0.1 * directions[(task + 1) % 4]
        assert torch.equal(retrieval.generate(asked), weights[task])
        assert retrieval.similarities(asked).argmax() == task
    retrieval.generate(vectors[0]).zero_()
    assert torch.equal(retrieval.generate(vectors[0]), weights[0]), "what is returned must be a copy"


def test_mixture_is_nearly_hard_where_neighbours_predict_and_uniform_where_nothing_does() -> None:
    groups = torch.arange(12) % 3
    vectors = torch.eye(3)[groups] + 0.01 * normal(12, 3)
    structured = normal(3, 50, seed=1)[groups] + 0.01 * normal(12, 50, seed=2)
    mixture = SimilarityMixture.fit(vectors, structured)
    assert mixture.temperature < 0.2
    for group in range(3):
        expected = structured[groups == group].mean(0)
        torch.testing.assert_close(mixture.generate(vectors[group]), expected, atol=0.05, rtol=0)
    unrelated = SimilarityMixture.fit(vectors, normal(12, 500, seed=3))
    assert unrelated.temperature > 1


def test_mixture_temperature_minimises_the_error_of_left_out_tasks() -> None:
    vectors, weights = normal(6, 4), normal(6, 9, seed=1)
    weights[3:] = weights[:3] + 0.1 * weights[3:]
    vectors[3:] = vectors[:3] + 0.5 * vectors[3:]

    def error(temperature: float) -> float:
        total = 0.0
        for task in range(6):
            others = [index for index in range(6) if index != task]
            mixture = SimilarityMixture(Retrieval.fit(vectors[others], weights[others]), temperature)
            total += (mixture.generate(vectors[task]) - weights[task]).square().sum().item()
        return total

    chosen = SimilarityMixture.fit(vectors, weights).temperature
    assert error(chosen) <= min(error(0.9 * chosen), error(1.1 * chosen), error(10.0), error(0.01)) * 1.01


@pytest.mark.parametrize("tasks", [12, 40])
def test_pca_ridge_is_exact_on_linear_data(tasks: int) -> None:
    vectors, matrix, mean = normal(tasks, 5), normal(5, 300, seed=1), 10 * normal(300, seed=2)
    model = PcaRidge.fit(vectors, mean + vectors @ matrix)
    assert len(model.components) == 5
    torch.testing.assert_close(model.components @ model.components.T, torch.eye(5), atol=1e-4, rtol=0)
    unseen = normal(5, seed=3)
    torch.testing.assert_close(model.generate(unseen), mean + unseen @ matrix, atol=1e-2, rtol=1e-3)


def test_pca_ridge_falls_back_to_the_mean_where_the_condition_says_nothing() -> None:
    vectors, weights = normal(10, 64), normal(10, 200, seed=1)
    model = PcaRidge.fit(vectors, weights)
    assert model.ridge > 1
    generated = model.generate(normal(64, seed=2))
    assert (generated - weights.mean(0)).norm() < 0.5 * (weights[0] - weights.mean(0)).norm()


def test_pca_ridge_penalty_minimises_the_explicit_leave_one_out_error() -> None:
    vectors = normal(9, 4)
    weights = vectors @ normal(4, 30, seed=1) + 1.5 * normal(9, 30, seed=2)
    inputs = ((vectors - vectors.mean(0)) / vectors.std(0, correction=0)).double()
    unit = torch.linalg.eigvalsh(inputs @ inputs.T).clamp_min(0).mean()

    def error(ridge: float) -> float:
        total = 0.0
        for task in range(9):
            others = [index for index in range(9) if index != task]
            x, y = inputs[others], weights[others].double()
            x_mean, y_mean = x.mean(0), y.mean(0)
            x, y = x - x_mean, y - y_mean
            solution = torch.linalg.solve(x.T @ x + ridge * unit * torch.eye(4, dtype=torch.float64), x.T @ y)
            total += (y_mean + (inputs[task] - x_mean) @ solution - weights[task]).square().sum().item()
        return total

    chosen = PcaRidge.fit(vectors, weights).ridge
    step = 10**0.25  # the grid's
    assert error(chosen) < min(error(chosen * step), error(chosen / step))


def test_pca_ridge_never_makes_a_square_of_the_weights() -> None:
    size = 300_000  # squared: 360 GB in float32
    weights = normal(3, size)
    model = PcaRidge.fit(torch.eye(3), weights)
    torch.testing.assert_close(model.generate(torch.eye(3)[1]).norm(), weights[1].norm(), rtol=0.5, atol=0)


def test_constant_features_and_equal_adapters_do_no_harm() -> None:
    vectors = torch.cat([normal(4, 3), torch.ones(4, 1)], dim=1)
    same = torch.ones(4, 6)
    for method in (Retrieval, SimilarityMixture, PcaRidge):
        torch.testing.assert_close(method.fit(vectors, same).generate(vectors[0] + 5), same[0])
    torch.testing.assert_close(
        PcaRidge.fit(torch.ones(4, 3), normal(4, 6)).generate(torch.zeros(3)), normal(4, 6).mean(0)
    )


@pytest.mark.parametrize("method", [Retrieval, SimilarityMixture, PcaRidge])
def test_wrong_shapes_are_named(method: type[Retrieval] | type[SimilarityMixture] | type[PcaRidge]) -> None:
    with pytest.raises(LoraFactoryError, match=r"\(3, 4\).*\(2, 5\)"):
        method.fit(normal(3, 4), normal(2, 5))
    with pytest.raises(LoraFactoryError, match=r"AdapterZoo\.verify"):
        method.fit(normal(3, 4), torch.full((3, 5), torch.nan))
    with pytest.raises(LoraFactoryError, match="tasks or more"):
        method.fit(normal(0, 4), normal(0, 5))
    fitted = method.fit(normal(3, 4), normal(3, 5))
    assert fitted.generate(normal(4)).shape == (5,) and fitted.generate(normal(4)).dtype == torch.float32
    with pytest.raises(LoraFactoryError, match=r"\(3,\) does not fit"):
        fitted.generate(normal(3))


def test_mixed_batches_take_tasks_evenly_and_read_all_before_repeating() -> None:
    sizes = (4, 6, 8)
    sequences = [[TokenSequence([task, row], [task, row]) for row in range(size)] for task, size in enumerate(sizes)]
    batches = list(islice(mixed_batches(sequences, 3, seed=0), 24))
    assert all(sorted(sequence.tokens[0] for sequence in batch) == [0, 1, 2] for batch in batches)
    read = Counter(tuple(sequence.tokens) for batch in batches for sequence in batch)
    assert read == {(task, row): 24 // size for task, size in enumerate(sizes) for row in range(size)}
    assert batches == list(islice(mixed_batches(sequences, 3, seed=0), 24))
    assert batches != list(islice(mixed_batches(sequences, 3, seed=1), 24))


@pytest.fixture
def trainer(pico_model, pico_tokenizer, pico_model_folder: Path) -> LoRATrainer:
    arguments = CollectArguments(
        rank=2, steps=20, snapshots=2, batch_size=4, sequence_length=16, learning_rate=2e-2, validation_sequences=4
    )
    pico_model.config._commit_hash = None
    return LoRATrainer.attach(pico_model, pico_tokenizer, arguments, str(pico_model_folder), Accelerator(cpu=True))


def test_multitask_lora_learns_every_task_with_the_budget_of_all(trainer: LoRATrainer) -> None:
    texts = {"fox": "The quick brown fox jumps. ", "code": "def add(left, right): return left + right\n"}
    tasks = [Task.from_examples(name, [name], [text * 40], [text * 8], [text * 8]) for name, text in texts.items()]
    seen = []
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    adapter = train_multitask(trainer, tasks, seed=0)
    hook.remove()
    assert len(seen) == 2 * trainer.arguments.steps, "as many steps as the tasks' own LoRAs together"
    assert adapter.shape == (trainer.layout.size,) and adapter.dtype == torch.float32
    for task in tasks:
        losses = []
        for weights in (trainer.initial, adapter):
            trainer.slot.load(weights)
            losses.append(_loss(trainer, task))
        assert losses[1] < losses[0] - 0.5
    assert torch.equal(train_multitask(trainer, tasks, seed=0), adapter)
    with pytest.raises(LoraFactoryError, match="needs tasks"):
        train_multitask(trainer, [], seed=0)


def test_multitask_lora_keeps_its_best_snapshot(trainer: LoRATrainer, monkeypatch) -> None:
    losses = iter([3.0, 1.0, 2.0])
    taken = []
    weights = LoRATrainer._weights
    monkeypatch.setattr(LoRATrainer, "loss", lambda self, sequences: next(losses))
    monkeypatch.setattr(LoRATrainer, "_weights", lambda self: taken.append(weights(self)) or taken[-1])
    task = Task.from_examples("fox", ["fox"], ["The quick brown fox. " * 20], ["The fox. " * 9], ["The fox. " * 9])
    assert torch.equal(train_multitask(trainer, [task], seed=0, steps=3), taken[1])
    assert len(taken) == 3


def test_gibberish_is_a_repeatable_sentence_of_no_meaning() -> None:
    sentences = {gibberish(seed) for seed in range(50)}
    assert len(sentences) == 50 and gibberish(7) == gibberish(7)
    for sentence in sentences:
        assert sentence[0].isupper() and sentence.endswith(".")
        assert 8 <= len(sentence.split()) <= 12


@given(st.sets(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=12))
def test_other_task_is_a_derangement(tasks: set[str]) -> None:
    images = [other_task(task, sorted(tasks)) for task in tasks]
    assert set(images) == tasks
    assert all(task != image for task, image in zip(tasks, images, strict=True))
    assert images == [other_task(task, sorted(tasks, reverse=True)) for task in tasks], "whatever the order"


def test_other_task_needs_another_task() -> None:
    for tasks in (["only"], ["some", "else"]):
        with pytest.raises(LoraFactoryError, match="no other task than 'only'"):
            other_task("only", tasks)


def _loss(trainer: LoRATrainer, task: Task) -> float:
    from lora_factory.evaluation.perplexity import score_examples

    return score_examples(trainer.model, trainer.tokenizer, task.examples("test"), window=64, stride=32).loss
