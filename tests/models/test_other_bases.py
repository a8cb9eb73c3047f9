"""Training through the base, examples as conditions, and refinement, on encoder-decoders and models with images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.image_bases import WORDS, git, save
from helpers.images import boxes_task
from tiny_models import tiny_florence, tiny_t5

from lora_factory.arguments import CollectArguments, TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.trainer import LoRATrainer, open_trainer
from lora_factory.models.hidden_states import example_states
from lora_factory.models.losses import query_loss
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.training.train import train_generator

SETTINGS = CollectArguments(
    steps=4,
    snapshots=2,
    snapshot_every=2,
    batch_size=2,
    sequence_length=32,
    packing=False,
    learning_rate=1e-2,
    target_modules="all-linear",
    dtype="float32",
)
TRAIN = TrainArguments(width=32, steps=20, base_steps=15)


def echo_task(word: str) -> Task:
    rows = [Example(f"Say it again: {word} {number}", f"{word} {word}") for number in range(8)]
    return Task.from_examples(word, [f"Say {word}."], rows, rows[:2], rows[2:4])


@pytest.fixture(scope="module", params=["encoder-decoder", "images", "images first"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Task]]:
    folder = tmp_path_factory.mktemp("models") / "pico"
    if request.param != "encoder-decoder":
        saved = tiny_florence(folder, WORDS) if request.param == "images" else save(git(), folder)
        return saved, [boxes_task(name) for name in ("dog", "cat")]
    return tiny_t5(folder, WORDS), [echo_task(name) for name in ("one", "two")]


@pytest.fixture
def trainer(case: tuple[Path, list[Task]]) -> LoRATrainer:
    folder, tasks = case
    return open_trainer(folder, SETTINGS, Accelerator(cpu=True), tasks)


@torch.no_grad()
def test_query_loss_is_the_models_own(case: tuple[Path, list[Task]], trainer: LoRATrainer) -> None:
    trainer.model.eval()
    rows = [trainer.validation(task) for task in case[1]]
    source = torch.Generator().manual_seed(0)
    adapters = trainer.initial + 0.05 * torch.randn(2, trainer.layout.size, generator=source)
    with trainer.slot.disabled():
        found = float(query_loss(trainer, adapters, rows))
    expected = []
    for adapter, sequences in zip(adapters, rows, strict=True):
        trainer.slot.load(adapter)
        expected.append(float(trainer.model(**trainer.inputs.collate(sequences, torch.device("cpu"))).loss))
    assert found == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_states_are_of_the_base_alone_and_one_row_an_example(
    case: tuple[Path, list[Task]], trainer: LoRATrainer
) -> None:
    examples = case[1][0].examples("train")
    states = example_states(trainer, examples[:3])
    assert states.shape == (3, 3 * 32 + 24 * 24)
    assert torch.isfinite(states).all()
    trainer.slot.load(trainer.initial + 0.3)
    assert torch.allclose(example_states(trainer, examples[:3]), states, atol=1e-6)
    assert torch.allclose(example_states(trainer, examples[1:2])[0], states[1], atol=1e-4), "padding has no effect"


def test_training_through_the_base_learns_and_adapters_come_from_examples(
    case: tuple[Path, list[Task]], pico_encoder_folder: Path, tmp_path: Path
) -> None:
    folder, tasks = case
    zoo = collect_adapters(tasks, folder, tmp_path / "zoo", SETTINGS)
    settings = replace(TRAIN, text_encoder=str(pico_encoder_folder))
    generator = train_generator(zoo, tmp_path / "generator", settings, tasks=tasks, base_model=folder)
    trainer = open_trainer(folder, SETTINGS, Accelerator(cpu=True), tasks)
    examples = tasks[0].examples("train")[:4]
    with torch.no_grad(), trainer.slot.disabled():
        rows = [trainer.validation(tasks[0])]
        base = float(query_loss(trainer, torch.zeros(1, trainer.layout.size), rows))
        condition = {"hidden": example_states(trainer, examples).mean(0, keepdim=True)}
        cores = generator.cores(condition, 1)
        generated = float(query_loss(trainer, lambda _: generator.basis.in_batch(trainer.model, cores), rows))
    assert generated < base - 0.1
    model = generator.generate_adapter(base_model=folder, examples=examples, refine_steps=3)
    assert model.active_adapters == ["default"]
