"""Training a generator on a small synthetic zoo: random adapters, one cluster a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.models import attach
from helpers.training import DESCRIPTIONS, make_zoo, prepared
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TrainArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.hidden_states import HiddenStateEncoder, task_vector
from lora_factory.models.loading import load_base_model
from lora_factory.tasks.task import Task
from lora_factory.training.from_zoo import calibrate_spread, fit, sample_episode, solve_heads
from lora_factory.training.train import train_generator, training_history
from lora_factory.zoo.store import AdapterZoo


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]


@pytest.fixture(scope="module")
def zoo(layout: AdapterLayout, tmp_path_factory: pytest.TempPathFactory) -> AdapterZoo:
    return make_zoo(tmp_path_factory.mktemp("zoos") / "zoo", layout)


@pytest.fixture(scope="module")
def arguments(pico_encoder_folder: Path) -> TrainArguments:
    return TrainArguments(steps=30, batch_size=8, text_encoder=str(pico_encoder_folder))


@pytest.fixture(scope="module")
def trained(
    zoo: AdapterZoo, arguments: TrainArguments, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CVAELoRAGenerator, Path]:
    folder = tmp_path_factory.mktemp("generators") / "generator"
    return train_generator(zoo, folder, replace(arguments, steps=50)), folder


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [Task.from_examples(name, texts, [*texts, *texts], texts, texts) for name, texts in DESCRIPTIONS.items()]


def error(generator: CVAELoRAGenerator, zoo: AdapterZoo, task: str, **conditions: object) -> float:
    """Distance of a generated adapter to its task's mean, relative to the mean."""
    mean = zoo.snapshots(task).mean(0)
    vector = generator.layout.flatten(generator.generate_state_dict(**conditions))
    return float((vector - mean).norm() / mean.norm())


def test_every_task_is_reconstructed_from_its_descriptions(
    trained: tuple[CVAELoRAGenerator, Path], zoo: AdapterZoo
) -> None:
    generator, _ = trained
    for task, texts in DESCRIPTIONS.items():
        for text in texts:
            assert error(generator, zoo, task, text=text) < 0.2


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
    assert config.modalities == {"text": 32}
    assert config.text_encoder == arguments.text_encoder
    assert [(task["name"], tuple(task["descriptions"])) for task in config.tasks] == list(DESCRIPTIONS.items())
    assert [task["license"] for task in config.tasks] == [None, "MIT", None, None]
    assert loaded.layout == zoo.layout
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert training["arguments"]["steps"] == 50
    assert [record["step"] for record in training["history"]] == [0, 49]


def test_nearest_task_is_the_described_one(trained: tuple[CVAELoRAGenerator, Path]) -> None:
    generator, _ = trained
    for task, texts in DESCRIPTIONS.items():
        nearest = generator.nearest_tasks(generator.conditions(texts[0]))
        assert nearest[0]["task"] == task
        assert len(nearest) == 3


@pytest.mark.parametrize("decoder", ["token", "conv1d"])
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


def test_convolutional_decoder_lowers_its_loss(zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path) -> None:
    generator = train_generator(zoo, tmp_path / "generator", replace(arguments, decoder="conv1d"))
    assert (generator.config.latent_size, generator.config.kl_weight) == (256, 0.005)
    assert len(generator.config.channels) == 12
    history = json.loads((tmp_path / "generator" / "training.json").read_text(encoding="utf-8"))["history"]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert error(generator, zoo, "code", text=DESCRIPTIONS["code"][0]) < 2


def test_training_fits_mean_and_spread(zoo: AdapterZoo, arguments: TrainArguments) -> None:
    wide, weights, rows = prepared(zoo, arguments)
    generator = CVAELoRAGenerator(CVAELoRAConfig(**(wide.config.to_dict() | {"width": 48, "latent_size": 4})))
    statistics = generator.fit_statistics(weights, rows)
    history = fit(generator, weights, rows, replace(arguments, steps=200), Accelerator(cpu=True))
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["reconstruction"] < 0.1
    assert all(record["kl"] >= 0 for record in history)
    generator.eval()
    calibrate_spread(generator, statistics.within, rows)
    for task, texts in DESCRIPTIONS.items():
        snapshots = zoo.snapshots(task)
        mean = snapshots.mean(0)
        spread = float((snapshots - mean).norm(dim=1).mean() / mean.norm())
        cold = error(generator, zoo, task, text=texts[0])
        warm = [error(generator, zoo, task, text=texts[0], temperature=1.0, seed=seed) for seed in range(3)]
        assert cold < min(warm)
        assert 0.5 * spread < sum(warm) / 3 < 4.5 * spread


def test_a_latent_that_moves_adapters_too_far_is_made_narrower(zoo: AdapterZoo, arguments: TrainArguments) -> None:
    generator, weights, rows = prepared(zoo, arguments)
    statistics = generator.fit_statistics(weights, rows)
    network = generator.network.eval()
    with torch.no_grad():
        network.latent.weight.normal_(std=9, generator=torch.Generator().manual_seed(0))
    vectors = {"text": rows["text"]["code"].mean(0, keepdim=True)}
    with torch.no_grad():
        cold = generator.generate_vector(vectors)
        loud = generator.generate_vector(vectors, temperature=1.0) - cold
    calibrate_spread(generator, statistics.within, rows)
    with torch.no_grad():
        assert torch.equal(generator.generate_vector(vectors), cold)
        samples = [generator.generate_vector(vectors, temperature=1.0, seed=seed) - cold for seed in range(8)]
    spread, wanted = torch.stack(samples).norm(dim=-1).mean(), statistics.within.sum().sqrt()
    assert loud.norm() > 3 * wanted
    assert 0.5 * wanted < spread < 2 * wanted


def test_solved_heads_lower_the_reconstruction_error(zoo: AdapterZoo, arguments: TrainArguments) -> None:
    generator, weights, rows = prepared(zoo, arguments)
    episode = sample_episode(generator, weights, rows, 16, torch.Generator().manual_seed(9))

    def reconstruction() -> float:
        with torch.no_grad():
            return generator(*episode, generator=torch.Generator().manual_seed(0)).reconstruction.item()

    before = reconstruction()
    solve_heads(generator, weights, rows, 8, torch.Generator().manual_seed(0))
    assert reconstruction() < 0.8 * before


def test_episodes_pair_adapters_with_their_own_descriptions(zoo: AdapterZoo, arguments: TrainArguments) -> None:
    generator, weights, rows = prepared(zoo, arguments)
    generator.get_buffer("standardiser.text_scale").zero_()  # no noise on the conditions
    adapters, conditions = sample_episode(generator, weights, rows, 6, torch.Generator().manual_seed(0))
    assert adapters.shape == (6, zoo.layout.size) and conditions["text"].shape == (6, 32)
    drawn = [
        next(task for task in zoo.tasks if any(torch.equal(adapter, row) for row in weights[task]))
        for adapter in adapters
    ]
    assert set(drawn[:4]) == set(zoo.tasks)
    for task, condition in zip(drawn, conditions["text"], strict=True):
        assert any(torch.allclose(condition, row) for row in rows["text"][task])


def test_hidden_states_and_texts_each_suffice(
    zoo: AdapterZoo, arguments: TrainArguments, tasks: list[Task], pico_model_folder: Path, tmp_path: Path
) -> None:
    train_generator(zoo, tmp_path / "generator", arguments, tasks=tasks, base_model=pico_model_folder)
    generator = CVAELoRAGenerator.from_pretrained(tmp_path / "generator")
    assert generator.config.modalities == {"text": 32, "hidden": 96}
    encoder = HiddenStateEncoder(*load_base_model(pico_model_folder))
    for task in tasks:
        hidden = {"hidden": task_vector(encoder.encode(task.examples("train")))}
        text = task.descriptions[0]
        assert error(generator, zoo, task.name, text=text) < 0.6
        assert error(generator, zoo, task.name, conditions=hidden) < 0.6
        assert error(generator, zoo, task.name, text=text, conditions=hidden) < 0.6


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
    with pytest.raises(LoraFactoryError, match=r"the generator's loss is .*lower learning_rate"):
        train_generator(zoo, folder, replace(arguments, steps=5, learning_rate=1e30), overwrite=True)
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
    assert history[0]["step"] == 0 and history[-1]["step"] == 49
    assert training_history(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"history": 3}', '{"history": [3]}'])
def test_a_damaged_training_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(LoraFactoryError, match=r"training\.json"):
        training_history(tmp_path)
