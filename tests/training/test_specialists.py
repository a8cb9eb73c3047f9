"""The end of stage 2: every task's specialist, and a network that writes the difference as far as it is believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.stage_2 import CutOff, make_tasks

from lora_factory.arguments import CollectArguments, TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.losses import query_loss
from lora_factory.training import specialists
from lora_factory.training.train import train_generator, training_history, zoo_factory
from lora_factory.zoo.store import AdapterZoo

SETTINGS = CollectArguments(
    steps=8, snapshots=2, batch_size=4, sequence_length=24, learning_rate=3e-2, target_modules="all-linear"
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, pico_model_folder: Path) -> AdapterZoo:
    return collect_adapters(make_tasks(), pico_model_folder, tmp_path_factory.mktemp("specialists") / "zoo", SETTINGS)


@pytest.fixture(scope="module")
def arguments(pico_encoder_folder: Path) -> TrainArguments:
    return TrainArguments(
        text_encoder=str(pico_encoder_folder),
        width=256,
        depth=1,
        steps=5,
        multitask_steps=30,
        multitask_learning_rate=2e-2,
        specialist_steps=40,
        specialist_learning_rate=1e-2,
    )


@pytest.fixture(scope="module")
def folder(
    zoo: AdapterZoo, arguments: TrainArguments, pico_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("specialists") / "generator"
    train_generator(zoo, output, arguments, tasks=make_tasks(), base_model=pico_model_folder)
    return output


def losses(zoo: AdapterZoo, base: Path, adapters: dict[str, torch.Tensor]) -> dict[str, float]:
    trainer = zoo_factory(zoo, base, Accelerator(cpu=True), zoo.layout)
    with torch.no_grad(), trainer.slot.disabled():
        return {
            task.name: float(query_loss(trainer, adapters[task.name][None], [trainer.encode(task.examples("train"))]))
            for task in make_tasks()
        }


def test_every_task_gets_more_from_its_own_text_than_from_another(
    zoo: AdapterZoo, folder: Path, pico_model_folder: Path
) -> None:
    generator = CVAELoRAGenerator.from_pretrained(folder)
    written = {
        task.name: zoo.layout.flatten(generator.generate_state_dict(task.descriptions[0])) for task in make_tasks()
    }
    names = list(written)
    own = losses(zoo, pico_model_folder, written)
    everyone = losses(zoo, pico_model_folder, dict.fromkeys(names, generator.bias.detach()))
    another = losses(zoo, pico_model_folder, {name: written[names[index - 1]] for index, name in enumerate(names)})
    assert sum(own.values()) < sum(everyone.values()) - 0.05 < sum(another.values()) - 0.1


def test_a_condition_in_doubt_gets_the_adapter_for_all_rather_than_a_known_tasks(folder: Path) -> None:
    config = CVAELoRAGenerator.from_pretrained(folder).config
    assert config.recall
    for name, (_, near, far) in config.recall.items():
        assert near < far <= config.reach[name][0] + (config.reach[name][1] - config.reach[name][0]) / 4 + 1e-5


def test_a_condition_related_to_no_task_gets_the_adapter_for_all(folder: Path) -> None:
    generator = CVAELoRAGenerator.from_pretrained(folder)
    average = {name: generator.get_buffer(f"{name}_task_vectors").mean(0) for name in generator.config.modalities}
    for name, vector in average.items():
        written = generator.generate_vector({name: vector[None]})[0]
        torch.testing.assert_close(written, generator.bias, rtol=0, atol=1e-4)
    assert torch.equal(generator.bias + generator.standard_vector({}, 1)[0], generator.bias)


def test_a_known_task_gets_its_whole_specialist_from_text_and_examples_alike(folder: Path) -> None:
    generator = CVAELoRAGenerator.from_pretrained(folder)
    assert training_history(folder)[-1]["share"] == 1
    known = generator.get_buffer("known_adapters") * generator.weight_scale
    for name in generator.config.recall:
        written = generator.generate_vector({name: generator.get_buffer(f"{name}_task_vectors")})
        torch.testing.assert_close(written - generator.bias, known, rtol=0, atol=0.02 * float(known.abs().max()))


def test_the_history_counts_the_specialists_tokens(folder: Path, arguments: TrainArguments) -> None:
    (last,) = training_history(folder)
    assert last["share"] > 0
    read = (arguments.multitask_steps + len(make_tasks()) * arguments.specialist_steps) * 4 * 24
    assert 0.5 * read < last["tokens"] <= read


def test_specialists_that_help_no_task_are_not_listened_to(
    zoo: AdapterZoo,
    arguments: TrainArguments,
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = specialists.train_specialists

    def spoilt(generator, *rest):
        weights, loss, tokens = trained(generator, *rest)
        return {name: rows + torch.randn(rows.shape) for name, rows in weights.items()}, loss, tokens

    monkeypatch.setattr(specialists, "train_specialists", spoilt)
    few = replace(arguments, specialist_steps=2, multitask_steps=10)
    generator = train_generator(zoo, tmp_path / "generator", few, tasks=make_tasks(), base_model=pico_model_folder)
    assert training_history(tmp_path / "generator")[-1]["share"] == 0
    state_dict = generator.generate_state_dict(make_tasks()[0].descriptions[0])
    torch.testing.assert_close(zoo.layout.flatten(state_dict), generator.bias.detach())


def test_a_training_that_was_cut_off_goes_on_after_its_last_specialist(
    zoo: AdapterZoo,
    arguments: TrainArguments,
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = replace(arguments, specialist_steps=4, multitask_steps=2)
    trained, labels = LoRATrainer.fit, []

    def cut_off(self, batches, validation, kept, label, **options):
        labels.append(label)
        if len(labels) == interrupted_at:
            raise CutOff
        return trained(self, batches, validation, kept, label, **options)

    def train(name: str) -> dict[str, torch.Tensor]:
        output = tmp_path / name / "generator"
        generator = train_generator(zoo, output, short, tasks=make_tasks(), base_model=pico_model_folder)
        assert [path.name for path in output.parent.iterdir()] == ["generator"]
        return generator.state_dict()

    monkeypatch.setattr(LoRATrainer, "fit", cut_off)
    interrupted_at = 0
    whole, expected = train("whole"), list(labels)
    labels.clear()
    interrupted_at = len(expected)
    with pytest.raises(CutOff):
        train("resumed")
    labels.clear()
    interrupted_at = 0
    resumed = train("resumed")
    specialists_of = [label for label in expected if label.endswith("specialist")]
    assert [label for label in labels if label.endswith("specialist")] == specialists_of[-1:]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_specialists_need_the_tasks_examples(zoo: AdapterZoo, arguments: TrainArguments, tmp_path: Path) -> None:
    with pytest.raises(LoraFactoryError, match="specialist_steps=40 needs the tasks' examples; pass tasks="):
        train_generator(zoo, tmp_path / "generator", arguments)
    with pytest.raises(LoraFactoryError, match="specialist_steps=-1 must not be below 0"):
        replace(arguments, specialist_steps=-1)


def test_a_run_can_start_from_given_weights(zoo: AdapterZoo, pico_model_folder: Path) -> None:
    trainer = zoo_factory(zoo, pico_model_folder, Accelerator(cpu=True), zoo.layout)
    start = zoo.final("code", "seed-0")
    trainer.arguments = replace(trainer.arguments, learning_rate=1e-9)
    sequences = trainer.encode(make_tasks()[0].examples("train"))
    snapshots, _, _ = trainer.fit(iter([sequences[:4]] * 2), [sequences[:4]], [2], "prose", start=start)
    torch.testing.assert_close(snapshots[0], start, rtol=0, atol=1e-6)
