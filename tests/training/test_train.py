"""Training a generator on a small synthetic zoo: random adapters, one cluster a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.images import save_classifier
from helpers.models import attach
from helpers.training import DESCRIPTIONS, make_zoo, save_word_encoder
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TrainArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.hidden_states import HiddenStateEncoder, task_vector
from lora_factory.models.loading import load_base_model
from lora_factory.tasks.task import Task
from lora_factory.training import train as train_module
from lora_factory.training.from_zoo import fit
from lora_factory.training.train import build_generator, train_generator, training_history
from lora_factory.zoo import checkpoints
from lora_factory.zoo.store import AdapterZoo
from lora_factory.zoo.tools import prune


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]


@pytest.fixture(scope="module")
def zoo(layout: AdapterLayout, tmp_path_factory: pytest.TempPathFactory) -> AdapterZoo:
    return make_zoo(tmp_path_factory.mktemp("zoos") / "zoo", layout)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> TrainArguments:
    encoder = save_word_encoder(tmp_path_factory.mktemp("encoder") / "words")
    return TrainArguments(steps=300, width=64, learning_rate=5e-3, text_encoder=str(encoder))


@pytest.fixture(scope="module")
def trained(
    zoo: AdapterZoo, arguments: TrainArguments, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CVAELoRAGenerator, Path]:
    folder = tmp_path_factory.mktemp("generators") / "generator"
    return train_generator(zoo, folder, arguments), folder


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [Task.from_examples(name, texts, [*texts, *texts], texts, texts) for name, texts in DESCRIPTIONS.items()]


def deltas(layout: AdapterLayout, vectors: torch.Tensor) -> torch.Tensor:
    """ΔW of all modules in a row: ``(n, entries)``."""
    weights = layout.unflatten(vectors.double())
    return torch.cat([(m.scaling * weights[m.key_b] @ weights[m.key_a]).flatten(1) for m in layout.modules], 1)


def mean_delta(zoo: AdapterZoo, task: str) -> torch.Tensor:
    """The mean over a task's runs of their mean adapter's ΔW."""
    means = [zoo.snapshots(task, run).mean(0) for run in zoo.runs(task)]
    return deltas(zoo.layout, torch.stack(means)).mean(0)


def error(generator: CVAELoRAGenerator, zoo: AdapterZoo, task: str, **conditions: object) -> float:
    """Distance in ΔW of a generated adapter to its task's mean, relative to the mean."""
    vector = generator.layout.flatten(generator.generate_state_dict(**conditions))
    mean = mean_delta(zoo, task)
    return float((deltas(generator.layout, vector[None])[0] - mean).norm() / mean.norm())


def test_every_task_is_reconstructed_from_its_descriptions(
    trained: tuple[CVAELoRAGenerator, Path], zoo: AdapterZoo
) -> None:
    generator, _ = trained
    for task, texts in DESCRIPTIONS.items():
        for text in texts:
            assert error(generator, zoo, task, text=text) < 0.3


def test_tasks_whose_texts_never_overlap_are_exact(zoo: AdapterZoo, arguments: TrainArguments) -> None:
    source = torch.Generator().manual_seed(0)
    rows = {
        task: torch.eye(4, 128)[[n] * 20] + 0.01 * torch.randn(20, 128, generator=source)
        for n, task in enumerate(zoo.tasks)
    }
    tasks = [{"name": task, "descriptions": list(texts)} for task, texts in DESCRIPTIONS.items()]
    generator = build_generator(zoo, arguments, {"text": 128}, zoo.layout.with_rank(8), tasks)
    generator.fit_conditions({"text": rows})
    fit(generator, zoo, {"text": rows}, replace(arguments, steps=600), Accelerator(cpu=True))
    for task in zoo.tasks:
        assert error(generator.eval(), zoo, task, conditions={"text": rows[task].mean(0)}) < 0.1


def test_a_saved_generator_is_the_one_returned(
    trained: tuple[CVAELoRAGenerator, Path], zoo: AdapterZoo, arguments: TrainArguments
) -> None:
    generator, folder = trained
    assert not generator.training
    assert {path.name for path in folder.parent.iterdir()} == {"generator"}
    loaded = CVAELoRAGenerator.from_pretrained(folder)
    ours, theirs = generator.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    config = loaded.config
    assert config.zoo_fingerprint == zoo.fingerprint()
    assert config.modalities == {"text": 128}
    assert config.text_encoder == arguments.text_encoder
    assert [(task["name"], tuple(task["descriptions"])) for task in config.tasks] == list(DESCRIPTIONS.items())
    assert [task["license"] for task in config.tasks] == [None, "MIT", None, None]
    assert loaded.layout == zoo.layout.with_rank(8)  # four adapters of rank 2
    assert (config.decoder, config.latent_size, config.format_version) == ("core", 3, 4)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert training["arguments"]["steps"] == 300
    assert [record["step"] for record in training["history"]] == [0, 50, 100, 150, 200, 250, 299]
    assert training["errors"] == dict.fromkeys(DESCRIPTIONS, 0.0)


def test_nearest_task_is_the_described_one(trained: tuple[CVAELoRAGenerator, Path]) -> None:
    generator, _ = trained
    for task, texts in DESCRIPTIONS.items():
        nearest = generator.nearest_tasks(generator.conditions(texts[0]))
        assert nearest[0]["task"] == task
        assert len(nearest) == 3


@pytest.mark.parametrize("decoder", ["core", "conv1d"])
def test_same_seed_same_weights(zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path, decoder: str) -> None:
    short = replace(arguments, steps=2, batch_size=4, decoder=decoder)
    states = []
    for seed in (0, 0, 1):
        torch.rand(3)  # what others draw from the global generator is of no effect
        state = torch.random.get_rng_state()
        again = train_generator(zoo, tmp_path / "generator", replace(short, seed=seed), overwrite=True)
        states.append(again.state_dict())
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def adds_a_task(zoo: AdapterZoo) -> None:
    record = replace(zoo.record("code", "seed-0"), task="late")
    zoo.add_run(record, 100 * torch.randn(5, zoo.layout.size))


def adds_a_run(zoo: AdapterZoo) -> None:
    record = replace(zoo.record("code", "seed-0"), run="seed-1")
    zoo.add_run(record, 100 * torch.randn(5, zoo.layout.size))


def removes_a_task(zoo: AdapterZoo) -> None:
    prune(zoo, tasks=["code"])


def shortens_runs(zoo: AdapterZoo) -> None:
    prune(zoo, keep_last=1)


@pytest.mark.parametrize("when", ["_features", "build_generator"])
@pytest.mark.parametrize("change", [adds_a_task, adds_a_run, removes_a_task, shortens_runs])
def test_a_zoo_that_another_process_changes_meanwhile_is_learned_as_it_was_or_refused(
    layout: AdapterLayout,
    arguments: TrainArguments,
    tmp_path: Path,
    change: Callable[[AdapterZoo], None],
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zoo, short = make_zoo(tmp_path / "zoo", layout), replace(arguments, steps=5)
    expected = train_generator(zoo, tmp_path / "expected", short).state_dict()
    step = getattr(train_module, when)

    def followed(*words: Any, **options: Any) -> Any:
        result = step(*words, **options)
        change(AdapterZoo(zoo.folder))
        return result

    monkeypatch.setattr(train_module, when, followed)
    if change in (removes_a_task, shortens_runs):
        with pytest.raises(LoraFactoryError, match=r"was changed while it was read: .* train again"):
            train_generator(zoo, tmp_path / "generator", short)
        return
    found = train_generator(zoo, tmp_path / "generator", short).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_convolutional_decoder_lowers_its_loss(zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path) -> None:
    settings = replace(arguments, decoder="conv1d", steps=30, batch_size=8)
    generator = train_generator(zoo, tmp_path / "generator", settings)
    assert (generator.config.latent_size, generator.config.kl_weight) == (256, 0.005)
    assert len(generator.config.channels) == 12 and generator.layout == zoo.layout and generator.basis is None
    record = json.loads((tmp_path / "generator" / "training.json").read_text(encoding="utf-8"))
    assert record["history"][-1]["loss"] < 0.9 * record["history"][0]["loss"] and record["errors"] == {}
    last = record["history"][-1]  # the published loss: squared error, and 0.005 times the divergence
    assert last["loss"] == pytest.approx(last["reconstruction"] + 0.005 * last["kl"], rel=1e-4)
    assert error(generator, zoo, "code", text=DESCRIPTIONS["code"][0]) < 2
    states = zoo_of(zoo)
    torch.testing.assert_close(generator.center, states.mean(1).mean(0), rtol=1e-4, atol=1e-6)


def zoo_of(zoo: AdapterZoo) -> torch.Tensor:
    return torch.stack([zoo.snapshots(task) for task in zoo.tasks])


def test_without_a_condition_the_mean_of_the_tasks_is_written(
    trained: tuple[CVAELoRAGenerator, Path], zoo: AdapterZoo
) -> None:
    generator, _ = trained
    found = generator.layout.flatten(generator.generate_state_dict({"def add(left, right)": 0.0}))
    mean = torch.stack([mean_delta(zoo, task) for task in zoo.tasks]).mean(0)
    assert (deltas(generator.layout, found[None])[0] - mean).norm() < 1e-3 * mean.norm()


def test_samples_spread_about_as_the_checkpoints(trained: tuple[CVAELoRAGenerator, Path], zoo: AdapterZoo) -> None:
    generator, _ = trained
    for task, texts in DESCRIPTIONS.items():
        snapshots, mean = deltas(zoo.layout, zoo.snapshots(task)), mean_delta(zoo, task)
        spread = float((snapshots - mean).norm(dim=1).mean() / mean.norm())
        cold = generator.layout.flatten(generator.generate_state_dict(texts[0]))
        drawn = [generator.generate_state_dict(texts[0], temperature=1.0, seed=seed) for seed in range(4)]
        warm = deltas(generator.layout, torch.stack([generator.layout.flatten(one) for one in drawn]))
        apart = (warm - deltas(generator.layout, cold[None])).norm(dim=1).mean() / mean.norm()
        assert 0.4 * spread < float(apart) < 2.5 * spread
        again = generator.generate_state_dict(texts[0], seed=9)
        assert torch.equal(generator.layout.flatten(again), cold)


def test_training_lowers_the_bound(trained: tuple[CVAELoRAGenerator, Path]) -> None:
    history = trained[0].training_record["history"]
    assert history[0]["reconstruction"] == pytest.approx(1, abs=0.3)  # no condition is listened to yet
    assert history[-1]["reconstruction"] < 0.2 and history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert all(row["kl"] >= 0 and 0 <= row["active_latents"] <= 3 for row in history)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_tasks_of_several_runs_are_their_mean(
    layout: AdapterLayout, arguments: TrainArguments, tmp_path: Path, core: str
) -> None:
    zoo = make_zoo(tmp_path / "zoo", layout, ("code", "law"), runs=2)
    generator = train_generator(zoo, tmp_path / "generator", replace(arguments, core=core))
    assert generator.layout.modules[0].rank == 8
    for task in zoo.tasks:
        found = error(generator, zoo, task, text=DESCRIPTIONS[task][0])
        lost = generator.training_record["errors"][task]
        assert (found < 0.5 and lost < 1e-4) if core == "full" else (0.3 < found < 1 and lost > 0.2)


def test_a_rank_that_does_not_hold_the_zoo_is_said(
    zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = {}
    for rank in (2, 8, 12):
        caplog.clear()
        generator = train_generator(zoo, tmp_path / str(rank), replace(arguments, rank=rank, steps=2))
        made[rank] = max(generator.training_record["errors"].values())
        assert {module.rank for module in generator.layout.modules} == {rank}
        assert ("outside the basis of rank 2" in caplog.text) == (rank == 2)
    assert made[2] > 0.2 and made[8] == made[12] == 0


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_an_adapter_that_drowns_the_others_is_said(
    layout: AdapterLayout, arguments: TrainArguments, tmp_path: Path, caplog: pytest.LogCaptureFixture, size: float
) -> None:
    zoo = make_zoo(tmp_path / "zoo", layout, sizes={"law": size})
    train_generator(zoo, tmp_path / "generator", arguments)
    said = caplog.text
    assert ("the generator misses more than 20 %" in said) == (size > 1)
    assert size == 1 or ("that of law has" in said and "steps= (--steps; now 300)" in said)


def test_a_rank_that_no_module_can_have_is_refused(zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path) -> None:
    with pytest.raises(LoraFactoryError, match=r"rank=100000 is above what any module's weight can have, \d+; give"):
        train_generator(zoo, tmp_path / "generator", replace(arguments, rank=100_000))


def test_two_tasks_of_one_description_are_warned_of(
    zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_generator(zoo, tmp_path / "a", replace(arguments, steps=2))
    assert "same description" not in caplog.text
    twins = AdapterZoo.create(tmp_path / "twins", zoo.layout)
    first = zoo.record(zoo.tasks[0], zoo.runs(zoo.tasks[0])[0])
    for task in zoo.tasks[:2]:
        record = replace(zoo.record(task, zoo.runs(task)[0]), descriptions=first.descriptions, sha256={})
        twins.add_run(record, zoo.snapshots(task, record.run))
    train_generator(twins, tmp_path / "b", replace(arguments, steps=2))
    assert f"the tasks {zoo.tasks[0]} and {zoo.tasks[1]} have the same description" in caplog.text


def test_checkpoints_on_disk_train_the_same_generator(
    zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(checkpoints, "HELD_BYTES", limit)
        states.append(train_generator(zoo, tmp_path / str(limit), replace(arguments, steps=3)).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_hidden_states_and_texts_each_suffice(
    zoo: AdapterZoo, arguments: TrainArguments, tasks: list[Task], pico_model_folder: Path, tmp_path: Path
) -> None:
    train_generator(zoo, tmp_path / "generator", arguments, tasks=tasks, base_model=pico_model_folder)
    generator = CVAELoRAGenerator.from_pretrained(tmp_path / "generator")
    assert generator.config.modalities == {"text": 128, "hidden": 96 + 24 * 24}
    assert generator.config.directions == {"hidden": len(tasks) - 1}  # means of tasks differ in no more
    assert generator.standardiser.get_buffer("hidden_basis").shape == (len(tasks) - 1, 96 + 24 * 24)
    encoder = HiddenStateEncoder(*load_base_model(pico_model_folder))
    for task in tasks:
        hidden = {"hidden": task_vector(encoder.encode(task.examples("train")))}
        text = task.descriptions[0]
        assert error(generator, zoo, task.name, text=text) < 0.5
        assert error(generator, zoo, task.name, conditions=hidden) < 0.5
        assert error(generator, zoo, task.name, text=text, conditions=hidden) < 0.5


def test_images_and_examples_are_both_learned(
    zoo: AdapterZoo, arguments: TrainArguments, tasks: list[Task], pico_model_folder: Path, tmp_path: Path
) -> None:
    settings = replace(arguments, steps=5, image_encoder=str(save_classifier(tmp_path / "classifier")))
    given: Any = {"tasks": tasks, "base_model": pico_model_folder}
    colours = {task.name: [Image.new("RGB", (8, 8), (50 * number, 0, 0))] for number, task in enumerate(tasks)}
    made = train_generator(zoo, tmp_path / "generator", settings, images=colours, **given)
    assert set(made.config.modalities) == {"text", "image", "hidden"}
    named = rf"images\['{tasks[0].name}'\]"
    for wrong, words in (
        ([], rf"{named}=\[\] is empty; give one or more"),
        (tmp_path / "none.png", f"{named} is .* give a list"),
        ([tmp_path / "none.png"], "none.png"),
        ([tmp_path], "is a folder|Is a directory|no ordinary file"),
        (colours[tasks[0].name][0], "give a list"),
    ):
        with pytest.raises(LoraFactoryError, match=words):
            train_generator(zoo, tmp_path / "other", settings, images={**colours, tasks[0].name: wrong}, **given)


def test_a_zoo_of_one_task_is_refused(layout: AdapterLayout, arguments: TrainArguments, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", layout, ("code",))
    with pytest.raises(LoraFactoryError, match=r"holds 1 task\(s\), a generator needs at least two"):
        train_generator(zoo, tmp_path / "generator", arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def damage_checkpoints(folder: Path) -> None:
    file = folder / "code" / "seed-0" / "checkpoints.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def empty(folder: Path) -> None:
    (folder / "zoo.json").unlink()


@pytest.mark.parametrize(("damage", "message"), [(damage_checkpoints, "cut short"), (empty, "no zoo in")])
def test_a_damaged_zoo_is_refused(
    layout: AdapterLayout,
    arguments: TrainArguments,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    make_zoo(tmp_path / "zoo", layout, ("code", "law"))
    damage(tmp_path / "zoo")
    with pytest.raises(LoraFactoryError, match=message):
        train_generator(tmp_path / "zoo", tmp_path / "generator", arguments)
    assert not (tmp_path / "generator").exists()


def test_wrong_inputs_leave_an_earlier_generator_alone(
    zoo: AdapterZoo, arguments: TrainArguments, tasks: list[Task], tmp_path: Path
) -> None:
    folder = tmp_path / "generator"
    train_generator(zoo, folder, replace(arguments, steps=1))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(LoraFactoryError, match=r"train generator: the loss is .*lower learning_rate"):
        train_generator(zoo, folder, replace(arguments, steps=5, learning_rate=1e30), overwrite=True)
    with pytest.raises(LoraFactoryError, match=r"ended with weights up to .*, which half precision cannot hold"):
        train_generator(zoo, folder, replace(arguments, steps=2, learning_rate=1e30), overwrite=True)
    with pytest.raises(LoraFactoryError, match=r"no examples of the zoo's tasks \['sums'\]"):
        train_generator(zoo, folder, arguments, tasks=tasks[:3], overwrite=True)
    with pytest.raises(LoraFactoryError, match="cannot load the text encoder"):
        train_generator(zoo, folder, replace(arguments, text_encoder=str(tmp_path / "nowhere")), overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]


@pytest.mark.parametrize("options", [{"decoder": "transformer"}, {"steps": 0}, {"learning_rate": -1.0}])
def test_arguments_are_checked_at_birth(options: dict[str, object]) -> None:
    with pytest.raises(LoraFactoryError, match=next(iter(options))):
        TrainArguments(**options)


@pytest.fixture(scope="module")
def listening(
    zoo: AdapterZoo,
    arguments: TrainArguments,
    tasks: list[Task],
    pico_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> CVAELoRAGenerator:
    folder = tmp_path_factory.mktemp("listening") / "generator"
    return train_generator(zoo, folder, arguments, tasks=tasks, base_model=pico_model_folder)


def test_adapters_from_examples(
    listening: CVAELoRAGenerator, pico_model_folder: Path, pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    examples = ["def add(left, right):", "return left + right"]
    condition = listening.encode_examples(examples, pico_model_folder)
    assert condition["hidden"].shape == (listening.config.modalities["hidden"],)
    expected = listening.generate_state_dict(conditions=condition)
    model = listening.generate_adapter(base_model=pico_model_folder, examples=examples)
    live = LlamaForCausalLM.from_pretrained(pico_model_folder)
    again = listening.generate_adapter(base_model=live, examples=examples, tokenizer=pico_tokenizer)
    for made in (model, again):
        found = get_peft_model_state_dict(made, save_embedding_layers=False)
        assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)
    both = listening.generate_adapter("Add numbers.", pico_model_folder, examples=examples)
    found = get_peft_model_state_dict(both, save_embedding_layers=False)
    assert any(not torch.allclose(found[key], expected[key]) for key in expected)
    listening.save_adapter(None, tmp_path / "adapter", conditions=condition)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    with pytest.raises(LoraFactoryError, match="pass tokenizer="):
        listening.generate_adapter(base_model=LlamaForCausalLM.from_pretrained(pico_model_folder), examples=examples)
    with pytest.raises(LoraFactoryError, match="is empty"):
        listening.encode_examples(["text", ""], pico_model_folder)


def test_a_generator_in_training_mode_says_the_same_of_a_text_and_examples(
    listening: CVAELoRAGenerator, pico_model_folder: Path
) -> None:
    condition = listening.encode_examples(["def add(left, right):", "return left + right"], pico_model_folder)
    found, made = (
        ask("Add numbers.", conditions=condition) for ask in (listening.explain, listening.generate_state_dict)
    )
    listening.train()
    try:
        assert listening.explain("Add numbers.", conditions=condition) == found
        again = listening.generate_state_dict("Add numbers.", conditions=condition)
        assert listening.training
    finally:
        listening.eval()
    assert all(torch.equal(again[name], made[name]) for name in made)


def test_a_generator_of_texts_alone_says_so_when_given_examples(
    trained: tuple[CVAELoRAGenerator, Path], pico_model_folder: Path
) -> None:
    with pytest.raises(LoraFactoryError, match="listens to text and not to examples"):
        trained[0].encode_examples(["text"], pico_model_folder)


def test_a_generated_adapter_is_a_start_for_training(
    trained: tuple[CVAELoRAGenerator, Path], pico_model_folder: Path
) -> None:
    frozen = trained[0].generate_adapter("Add numbers.", pico_model_folder)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    model = trained[0].generate_adapter("Add numbers.", pico_model_folder, is_trainable=True)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert model.training and names and all("lora_" in name for name in names)
    ids = torch.arange(12)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_the_losses_of_a_training_stay_beside_it(trained: tuple[CVAELoRAGenerator, Path], tmp_path: Path) -> None:
    history = training_history(trained[1])
    assert history[0]["step"] == 0 and history[-1]["step"] == 299
    assert training_history(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"history": 3}', '{"history": [3]}'])
def test_a_damaged_training_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(LoraFactoryError, match=r"training\.json"):
        training_history(tmp_path)


def test_a_zoo_of_equal_adapters_makes_that_adapter(
    layout: AdapterLayout, arguments: TrainArguments, tmp_path: Path
) -> None:
    zoo = make_zoo(tmp_path / "spread", layout, ("code", "law", "prose"))
    row, equal = zoo.snapshots("code")[:1], AdapterZoo.create(tmp_path / "equal", layout)
    for task in zoo.tasks:
        equal.add_run(replace(zoo.record(task, "seed-0"), sha256={}), row.repeat(5, 1))
    generator = train_generator(equal, tmp_path / "generator", replace(arguments, steps=20))
    history = training_history(tmp_path / "generator")
    assert all(row["reconstruction"] < 1 for row in history), history
    assert error(generator, equal, "law", text=DESCRIPTIONS["law"][0]) < 1e-3
