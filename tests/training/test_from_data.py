"""A generator trained on the tasks' own loss: without a zoo, or on from one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.from_data import TEXTS, CutOff, cut_off_after, make_tasks
from helpers.images import boxes_task, brightness_task, save_classifier
from tiny_models import tiny_florence, tiny_t5
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_factory.adapters.attach import AdapterSlot, adapters_in_batch, wrap_base
from lora_factory.arguments import CollectArguments, LoRAOptions, TrainArguments, from_record
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.trainer import LoRATrainer, TrainingTask, open_trainer
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.loading import load_base_model
from lora_factory.models.losses import query_loss
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.training import train as training
from lora_factory.training.train import train_generator
from lora_factory.utils import checkpoint
from lora_factory.zoo.store import AdapterZoo

SETTINGS = CollectArguments(steps=8, snapshots=2, batch_size=2, sequence_length=24, packing=False, learning_rate=3e-2)
WORDS = ["dog cat Locate the objects with category name in the image. Say it again: one two three"]


@pytest.fixture(scope="module")
def arguments(pico_encoder_folder: Path) -> TrainArguments:
    return TrainArguments(
        text_encoder=str(pico_encoder_folder),
        width=32,
        latent_size=8,
        rank=4,
        lora_alpha=8.0,
        base_steps=300,
        base_tasks=3,
        base_learning_rate=1e-2,
        basis_learning_rate=1e-2,
        sequence_length=24,
        packing=False,
    )


@pytest.fixture(scope="module")
def trained(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CVAELoRAGenerator, Path]:
    folder = tmp_path_factory.mktemp("from-data") / "generator"
    return train_generator(None, folder, arguments, tasks=make_tasks(), base_model=pico_model_folder), folder


def reader(generator: CVAELoRAGenerator, arguments: TrainArguments, base: Path, tasks: list) -> LoRATrainer:
    """The base model as the generator was trained through it."""
    given = {name: asdict(arguments)[name] for name in asdict(LoRAOptions())}
    settings = from_record(CollectArguments, given | {"rank": generator.layout.modules[0].rank})
    return open_trainer(base, settings, Accelerator(cpu=True), tasks, layout=generator.layout)


def losses(generator: CVAELoRAGenerator, trainer: LoRATrainer, tasks: list) -> dict[tuple[str, str], float]:
    """Validation loss of every task with the adapter of every task's first description, by (asked, task)."""
    found = {}
    for asked in tasks:
        adapter = generator.layout.flatten(generator.generate_state_dict(asked.descriptions[0]))[None]
        with torch.no_grad(), trainer.slot.disabled():
            for task in tasks:
                trainer.model.eval()
                found[asked.name, task.name] = float(query_loss(trainer, adapter, [trainer.validation(task)]))
    return found


def base_losses(trainer: LoRATrainer, tasks: list) -> dict[str, float]:
    nothing = torch.zeros(1, trainer.layout.size)
    with torch.no_grad(), trainer.slot.disabled():
        trainer.model.eval()
        return {task.name: float(query_loss(trainer, nothing, [trainer.validation(task)])) for task in tasks}


def test_the_loss_falls_and_the_text_steers(
    trained: tuple[CVAELoRAGenerator, Path], arguments: TrainArguments, pico_model_folder: Path
) -> None:
    (generator, folder), tasks = trained, make_tasks()
    assert not generator.training and {path.name for path in folder.parent.iterdir()} == {"generator"}
    record = json.loads((folder / "training.json").read_text())
    history = record["history"]
    assert [row["step"] for row in history] == list(range(30, 301, 30))
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert 300 * 3 * 2 * 4 < history[-1]["tokens"] <= 300 * 3 * 2 * 24
    assert (record["arguments"]["base_steps"], record["arguments"]["multitask_steps"]) == (300, 100)
    trainer = reader(generator, arguments, pico_model_folder, tasks)
    found, base = losses(generator, trainer, tasks), base_losses(trainer, tasks)
    for task in tasks:
        own = found[task.name, task.name]
        assert own < base[task.name] - 1
        assert own < min(found[other.name, task.name] for other in tasks if other is not task) - 0.03, found


def test_examples_steer_too(
    trained: tuple[CVAELoRAGenerator, Path], arguments: TrainArguments, pico_model_folder: Path
) -> None:
    (generator, _), tasks = trained, make_tasks()
    assert generator.config.modalities == {"text": 32, "hidden": 96 + 24 * 24}
    trainer = reader(generator, arguments, pico_model_folder, tasks)
    found = {}
    for asked in tasks:
        condition = generator.encode_examples(list(asked.examples("train")), pico_model_folder)
        adapter = generator.layout.flatten(generator.generate_state_dict(conditions=condition))[None]
        with torch.no_grad(), trainer.slot.disabled():
            for task in tasks:
                found[asked.name, task.name] = float(query_loss(trainer, adapter, [trainer.validation(task)]))
    for task in tasks:
        assert found[task.name, task.name] == min(found[other.name, task.name] for other in tasks), found


def test_what_is_saved_is_what_is_returned(trained: tuple[CVAELoRAGenerator, Path], pico_model_folder: Path) -> None:
    generator, folder = trained
    loaded = CVAELoRAGenerator.from_pretrained(folder)
    ours, theirs = generator.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    config = loaded.config
    assert (config.zoo_fingerprint, config.decoder, config.chat_template) == (None, "core", False)
    assert [task["name"] for task in config.tasks] == ["prose", "code", "law"]
    assert {module.rank for module in loaded.layout.modules} == {4} and loaded.layout.modules[0].scaling == 2
    assert len(loaded.layout.modules) == 14 and loaded.layout.base_model == str(pico_model_folder.resolve())
    moved = (loaded.center - loaded.basis.identity()).norm() / loaded.basis.identity().norm()
    assert 0 < moved < 0.5, "the core that all tasks share is trained from the identity on"
    low = loaded.generate_state_dict("The quick brown fox jumps over the lazy dog", rank=2)
    loaded.layout.with_rank(2).check(low)


def test_samples_spread_as_the_wordings_do(trained: tuple[CVAELoRAGenerator, Path]) -> None:
    generator, _ = trained
    variance = generator.network.prior_log_variance.exp()
    assert variance.min() < 0.9 and not torch.equal(variance, torch.ones_like(variance))
    vectors = {"text": generator.text_encoder.encode(["The quick brown fox jumps over the lazy dog"])}
    with torch.no_grad():
        cold = generator.made(vectors, 1)
        warm = torch.cat([generator.made(vectors, 1, seed=seed, temperature=1.0) for seed in range(8)])
    apart = (warm - cold).norm(dim=1)
    assert apart.min() > 0 and apart.mean() < cold.norm()
    assert torch.equal(generator.made(vectors, 1, seed=1), generator.made(vectors, 1, seed=2))


def test_the_same_seed_gives_the_same_generator(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.rand(3)  # what others draw from the global generator is of no effect
        short, state = replace(arguments, base_steps=6, seed=seed), torch.random.get_rng_state()
        made = train_generator(
            None, tmp_path / "generator", short, tasks=make_tasks(), base_model=pico_model_folder, overwrite=True
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        states.append(made.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["basis.factors"], states[2]["basis.factors"])


def test_the_network_waits_until_the_basis_has_begun(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    short = replace(arguments, base_steps=5, multitask_steps=5)
    made = train_generator(None, tmp_path / "a", short, tasks=make_tasks(), base_model=pico_model_folder)
    assert not made.network.prior_mean.weight.any()
    one, other = (
        made.generate_state_dict(text)
        for text in ("The quick brown fox jumps over the lazy dog", "Permission is hereby granted, free of charge")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items()), "one adapter for all tasks"
    later = replace(arguments, base_steps=8, multitask_steps=5)
    made = train_generator(None, tmp_path / "b", later, tasks=make_tasks(), base_model=pico_model_folder)
    assert made.network.prior_mean.weight.any()


def test_diagonal_cores_learn(arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path) -> None:
    tasks, settings = make_tasks(), replace(arguments, core="diagonal", base_steps=40)
    made = train_generator(None, tmp_path / "generator", settings, tasks=tasks, base_model=pico_model_folder)
    assert made.center.shape == (14 * 4,)
    found = losses(made, (trainer := reader(made, settings, pico_model_folder, tasks)), tasks)
    assert all(found[name, name] < loss - 0.5 for name, loss in base_losses(trainer, tasks).items())


def echo_task(word: str) -> Task:
    rows = [Example(f"Say it again: {number}", f"{word} {word}") for number in range(8)]
    return Task.from_examples(word, TEXTS["prose" if word == "one" else "law"], rows, rows[:2], rows[2:4])


@pytest.mark.parametrize("kind", ["encoder-decoder", "images", "classifier", "bfloat16"])
def test_every_kind_of_base_model_learns(
    kind: str, arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"base_steps": 60, "sequence_length": 32}
    tasks: list[TrainingTask]
    if kind == "encoder-decoder":
        base, tasks = tiny_t5(tmp_path / "base", WORDS), [echo_task("one"), echo_task("two")]
    elif kind == "images":
        base, tasks = tiny_florence(tmp_path / "base", WORDS), [boxes_task("dog"), boxes_task("cat")]
        changes["base_steps"] = 20
    elif kind == "classifier":
        base = save_classifier(tmp_path / "base")
        tasks = [brightness_task("bright", wanted=True), brightness_task("dark", wanted=False)]
        changes |= {"base_steps": 400, "basis_learning_rate": 3e-3}  # with 1e-2 one of 18 seeds learns nothing
    else:
        base, tasks = pico_model_folder, list(make_tasks())
        changes |= {"dtype": "bfloat16", "base_steps": 100}
    settings = replace(arguments, **changes)
    generator = train_generator(None, tmp_path / "generator", settings, tasks=tasks, base_model=base)
    history = generator.training_record["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert generator.basis.factors.dtype == torch.float32
    assert set(generator.config.modalities) == {"text", "image" if kind == "classifier" else "hidden"}
    trainer = reader(generator, settings, base, tasks)
    assert trainer.model.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    found, before = losses(generator, trainer, tasks), base_losses(trainer, tasks)
    for task in tasks:
        assert found[task.name, task.name] < before[task.name] - 0.1, (found, before)
    if kind != "images":  # all answer the same questions otherwise
        for task in tasks:
            assert found[task.name, task.name] == min(found[other.name, task.name] for other in tasks), found


def test_the_step_that_is_best_on_held_out_tasks_is_kept(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    settings = replace(arguments, base_steps=30, multitask_steps=0)
    tasks, held_out = make_tasks("prose", "code"), make_tasks("law")
    made = train_generator(
        None, tmp_path / "a", settings, tasks=tasks, held_out=held_out, base_model=pico_model_folder
    )
    history = made.training_record["history"]
    best = min(history, key=lambda row: row["validation"])
    assert [task["name"] for task in made.config.tasks] == ["prose", "code"]
    assert 0 < best["step"] < 30, "the tasks that are trained on say nothing about law, so that it gets worse"
    found = losses(made, reader(made, settings, pico_model_folder, held_out), held_out)
    assert found["law", "law"] == pytest.approx(best["validation"], abs=2e-3)
    plain = train_generator(None, tmp_path / "b", settings, tasks=tasks, base_model=pico_model_folder)
    assert "validation" not in plain.training_record["history"][-1]
    assert plain.training_record["history"][-1]["loss"] == history[-1]["loss"], "scoring changes no draw"
    assert not torch.equal(plain.basis.factors, made.basis.factors)


def test_a_training_that_was_cut_off_starts_over_when_what_it_learns_from_has_changed(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, tasks = replace(arguments, base_steps=6, multitask_steps=2), make_tasks("prose", "code", "law")
    other = AutoModelForCausalLM.from_pretrained(pico_model_folder)
    other.lm_head.weight.data[-1] += 1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(pico_model_folder).save_pretrained(tmp_path / "other")
    whole = {"tasks": tasks, "base_model": pico_model_folder, "base_model_name": "me/base"}
    fewer = {**whole, "tasks": tasks[:2], "held_out": tasks[2:]}
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_SECONDS", 0)
    for number, changed in enumerate((fewer, {**whole, "base_model": tmp_path / "other"})):
        with monkeypatch.context() as patch:
            cut_off_after(patch, 4)
            with pytest.raises(CutOff):
                train_generator(None, tmp_path / f"generator-{number}", settings, **whole)
        made = train_generator(None, tmp_path / f"generator-{number}", settings, **changed)
        alone = train_generator(None, tmp_path / f"alone-{number}", settings, **changed)
        ours, theirs = made.state_dict(), alone.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(arguments, base_steps=12)
    options = {"tasks": make_tasks("prose", "code"), "base_model": pico_model_folder, "held_out": make_tasks("law")}
    whole = train_generator(None, tmp_path / "whole", settings, **options)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_SECONDS", 0)
    with monkeypatch.context() as patch:
        cut_off_after(patch, 9)
        with pytest.raises(CutOff):
            train_generator(None, tmp_path / "generator", settings, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "generator.training"}
    with monkeypatch.context() as patch:
        calls = cut_off_after(patch, 0)
        resumed = train_generator(None, tmp_path / "generator", settings, **options)
        assert 0 < len(calls) < 6
    assert resumed.training_record["history"] == whole.training_record["history"]
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "generator"}


def test_the_state_of_another_training_is_not_taken_up(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, tasks = replace(arguments, base_steps=4), make_tasks()
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_SECONDS", 0)
    parts = [{split: task.examples(split) for split in ("train", "validation", "test")} for task in tasks]
    renamed = [
        Task.from_examples(t.name, [f"{t.name}, reworded."], **part) for t, part in zip(tasks, parts, strict=True)
    ]
    assert [task.fingerprint() for task in renamed] == [task.fingerprint() for task in tasks]
    for changed, others in ((replace(settings, seed=3), tasks), (settings, renamed)):
        with monkeypatch.context() as patch:
            cut_off_after(patch, 3)
            with pytest.raises(CutOff):
                train_generator(None, tmp_path / "generator", settings, tasks=tasks, base_model=pico_model_folder)
            calls = cut_off_after(patch, 0)
            train_generator(
                None, tmp_path / "generator", changed, tasks=others, base_model=pico_model_folder, overwrite=True
            )
        assert len(calls) == 4
        for path in (tmp_path / "generator").iterdir():
            path.unlink()
        (tmp_path / "generator").rmdir()


def test_a_loss_that_is_not_finite_stops_and_leaves_an_earlier_generator(
    arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    options = {"tasks": make_tasks(), "base_model": pico_model_folder}
    train_generator(None, tmp_path / "generator", replace(arguments, base_steps=1), **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "generator").iterdir()}
    wild = replace(arguments, base_steps=9, basis_learning_rate=1e30)
    with pytest.raises(
        LoraFactoryError, match=r"train through the base: the loss is .* lower basis_learning_rate \(now 1e\+30"
    ):
        train_generator(None, tmp_path / "generator", wild, overwrite=True, **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "generator").iterdir()} == before


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    kind: str, arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "causal":
        base, tasks, first = pico_model_folder, make_tasks(), "model.layers.0.mlp"
    else:
        base, tasks = tiny_t5(tmp_path / "base", WORDS), [echo_task("one"), echo_task("two")]
        first = "decoder.block.0.layer.1"
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.3}))
    made, passes = [], []
    for checkpointing in (False, True):
        count, opened = [0], training.open_trainer

        def opening(*words: Any, count: list[int] = count, opened: Any = opened, **options: Any) -> LoRATrainer:
            trainer = opened(*words, **options)
            module = trainer.model.get_base_model().get_submodule(first)
            module.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + torch.is_grad_enabled()))
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(training, "open_trainer", opening)
            settings = replace(arguments, base_steps=5, multitask_steps=2, gradient_checkpointing=checkpointing)
            folder = tmp_path / str(checkpointing)
            made.append(train_generator(None, folder, settings, tasks=tasks, base_model=base))
        passes.append(count[0])
    assert passes == [5, 10]
    torch.testing.assert_close(made[0].basis.factors, made[1].basis.factors, rtol=0, atol=1e-5)
    torch.testing.assert_close(made[0].network.decoder, made[1].network.decoder, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"tasks": None}, r"without a zoo, a generator is trained on examples; pass tasks= and base_model="),
        ({}, {"base_model": None}, r"pass tasks= and base_model="),
        ({"decoder": "conv1d"}, {}, "decoder='conv1d' learns from a zoo's weights; collect a zoo"),
        ({}, {"tasks": make_tasks("law")}, r"1 task\(s\): a generator needs at least two to tell apart"),
        ({}, {"output_dir": None}, "output_dir is not given"),
        ({}, {"held_out": make_tasks("law")}, "several tasks are named 'law'; give each a name of its own"),
        ({}, {"tasks": make_tasks("law", "law")}, "several tasks are named 'law'"),
    ],
)
def test_without_a_zoo_what_cannot_work_is_refused(
    arguments: TrainArguments, tmp_path: Path, changes: dict, options: dict, message: str
) -> None:
    given: dict = {"output_dir": tmp_path / "generator", "tasks": make_tasks(), "base_model": tmp_path / "base"}
    with pytest.raises(LoraFactoryError, match=message):
        train_generator(None, arguments=replace(arguments, **changes), **given | options)
    assert list(tmp_path.iterdir()) == []


def test_steps_of_the_basis_alone_are_among_all_steps() -> None:
    with pytest.raises(LoraFactoryError, match=r"multitask_steps=9 are the first of base_steps=8; give as many"):
        TrainArguments(base_steps=8, multitask_steps=9)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, pico_model_folder: Path) -> AdapterZoo:
    return collect_adapters(make_tasks(), pico_model_folder, tmp_path_factory.mktemp("zoo") / "zoo", SETTINGS)


@pytest.fixture
def trainer(pico_model_folder: Path, zoo: AdapterZoo) -> LoRATrainer:
    model, tokenizer = load_base_model(pico_model_folder)
    return LoRATrainer.attach(model, tokenizer, SETTINGS, zoo.layout.base_model, Accelerator(cpu=True))


@pytest.fixture
def on_zoo(arguments: TrainArguments) -> TrainArguments:
    """The options that a zoo leaves open."""
    defaults = asdict(LoRAOptions())
    own = {name: value for name, value in asdict(TrainArguments()).items() if name in defaults}
    return replace(arguments, **own | {"rank": 0, "steps": 100})


def test_training_goes_on_from_a_zoo(
    zoo: AdapterZoo, on_zoo: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    tasks, found, made = make_tasks(), [], []
    for steps in (0, 60):
        settings = replace(on_zoo, base_steps=steps)
        folder = tmp_path / str(steps)
        made.append(train_generator(zoo, folder, settings, tasks=tasks, base_model=pico_model_folder))
        trainer = reader(made[-1], replace(settings, sequence_length=24, packing=False), pico_model_folder, tasks)
        found.append(losses(made[-1], trainer, tasks))
    assert {module.rank for module in made[0].layout.modules} == {6}
    for task in tasks:
        own = found[1][task.name, task.name]
        assert own < found[0][task.name, task.name] - 0.3
        assert own == min(found[1][other.name, task.name] for other in tasks), found
    record = made[1].training_record
    assert record["history"][-1]["step"] == 60 and set(record["errors"]) == {"prose", "code", "law"}
    assert max(record["errors"].values()) < 1e-4
    assert set(made[1].config.modalities) == {"text", "hidden"}
    assert made[1].network.decoder.any(1).all(), "every latent takes part"
    sampled = [
        made[1].generate_state_dict("The quick brown fox jumps over the lazy dog", temperature=1.0, seed=seed)
        for seed in (0, 1)
    ]
    assert any(not torch.equal(sampled[0][key], sampled[1][key]) for key in sampled[0])


def test_what_a_zoo_decides_or_lacks_is_said(
    zoo: AdapterZoo, on_zoo: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"base_steps": 4}, "base_steps=4 needs the tasks' examples; pass tasks="),
        ({"lora_alpha": 3.0}, "lora_alpha=3.0 is decided by the zoo .*; leave it out"),
        ({"sequence_length": 7}, "sequence_length=7 is decided by the zoo"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' is decided by the zoo"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is decided by the zoo"),
        ({"rank": 1}, "rank=1 is below that of the zoo's adapters, 2; give 2 or more, or 0"),
    ):
        with pytest.raises(LoraFactoryError, match=message):
            train_generator(zoo, tmp_path / "generator", replace(on_zoo, **({"base_steps": 0} | changes)))
    options = {"tasks": make_tasks(), "base_model": pico_model_folder}
    with pytest.raises(LoraFactoryError, match="base_steps=4 trains a shared basis, which decoder='conv1d' has not"):
        train_generator(zoo, tmp_path / "generator", replace(on_zoo, base_steps=4, decoder="conv1d"), **options)
    assert list(tmp_path.iterdir()) == []


def test_held_out_tasks_choose_a_step_on_a_zoo_too_and_need_one(
    zoo: AdapterZoo, on_zoo: TrainArguments, pico_model_folder: Path, tmp_path: Path
) -> None:
    foreign = [Task.from_examples("sums", ["Add numbers."], [f"{n} + 1 = {n + 1}" for n in range(20)])]
    options = {"tasks": make_tasks(), "held_out": foreign, "base_model": pico_model_folder}
    short = replace(on_zoo, base_steps=6, steps=5)
    made = train_generator(zoo, tmp_path / "generator", short, **options)
    assert all("validation" in row for row in made.training_record["history"])
    with pytest.raises(
        LoraFactoryError, match=r"held_out= \(--held-out-tasks\) chooses a step of base_steps, which is 0"
    ):
        train_generator(zoo, tmp_path / "other", replace(short, base_steps=0), **options)


def test_adapters_in_a_batch_give_what_the_slot_gives(zoo: AdapterZoo, trainer: LoRATrainer) -> None:
    adapters = torch.stack([zoo.final(name, "seed-0") for name in zoo.tasks])
    ids = torch.randint(3, 300, (6, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with trainer.slot.disabled(), adapters_in_batch(trainer.model, trainer.layout, adapters):
            together = trainer.model(ids).logits
        for index, adapter in enumerate(adapters):
            trainer.slot.load(adapter)
            alone = trainer.model(ids[2 * index : 2 * index + 2]).logits
            torch.testing.assert_close(together[2 * index : 2 * index + 2], alone, atol=1e-4, rtol=1e-4)
        with trainer.slot.disabled():
            assert not torch.allclose(trainer.model(ids).logits, together)  # and the hooks are gone


def test_query_loss_is_the_models_own_and_reaches_the_adapter(zoo: AdapterZoo, trainer: LoRATrainer) -> None:
    sequences = trainer.validation(make_tasks()[0])
    adapter = zoo.final(zoo.tasks[0], "seed-0").requires_grad_(True)
    with trainer.slot.disabled():
        loss = query_loss(trainer, adapter[None], [sequences])
    loss.backward()
    assert adapter.grad is not None and torch.isfinite(adapter.grad).all() and adapter.grad.abs().max() > 0
    trainer.slot.load(adapter.detach())
    assert float(loss.detach()) == pytest.approx(trainer.loss(sequences), rel=1e-4)
    assert all(parameter.grad is None for parameter in trainer.model.get_base_model().parameters())


def test_the_base_model_may_have_no_slot(zoo: AdapterZoo, pico_model_folder: Path) -> None:
    model, _ = load_base_model(pico_model_folder)
    ids = torch.ones(2, 5, dtype=torch.long)
    adapter = zoo.final(zoo.tasks[0], "seed-0")
    with torch.no_grad():
        with adapters_in_batch(model, zoo.layout, adapter[None]):
            plain = model(ids).logits
        wrapped = wrap_base(model, zoo.layout.peft_config())
        AdapterSlot(wrapped, zoo.layout).load(adapter)
        torch.testing.assert_close(plain, wrapped(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_run_can_start_from_given_weights(zoo: AdapterZoo, pico_model_folder: Path) -> None:
    trainer = training.zoo_factory(zoo, pico_model_folder, Accelerator(cpu=True), zoo.layout)
    start = zoo.final("code", "seed-0")
    trainer.arguments = replace(trainer.arguments, learning_rate=1e-9)
    sequences = trainer.encode(make_tasks()[0].examples("train"))
    snapshots, _, _ = trainer.fit(iter([sequences[:4]] * 2), [sequences[:4]], [2], "prose", start=start)
    torch.testing.assert_close(snapshots[0], start, rtol=0, atol=1e-6)


TWO_PROCESSES = """
import json, sys, torch
from lora_factory.arguments import TrainArguments
from lora_factory.training.train import train_generator
from helpers.from_data import make_tasks

arguments = TrainArguments(**json.loads(sys.argv[1]))
made = train_generator(None, sys.argv[2], arguments, tasks=make_tasks(), base_model=sys.argv[3])
weights = torch.cat([value.flatten() for value in made.state_dict().values()])
both = [torch.empty_like(weights) for _ in range(2)]
torch.distributed.all_gather(both, weights)
assert torch.equal(both[0], both[1])
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_one_generator(arguments: TrainArguments, pico_model_folder: Path, tmp_path: Path) -> None:
    script, settings = tmp_path / "train.py", replace(arguments, base_steps=5, multitask_steps=2)
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [json.dumps(asdict(settings)), str(tmp_path / "generator"), str(pico_model_folder)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-9000:]
    alone = train_generator(None, tmp_path / "alone", settings, tasks=make_tasks(), base_model=pico_model_folder)
    tokens = alone.training_record["history"][-1]["tokens"]
    both = json.loads((tmp_path / "generator" / "training.json").read_text())["history"][-1]["tokens"]
    assert both > 1.5 * tokens
