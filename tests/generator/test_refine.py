"""Steps on a user's examples, and the choice between adapters by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.models import TRAINING_TEXT

from lora_factory.arguments import CollectArguments
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.refine import refine, refine_state_dict
from lora_factory.models.inputs import TokenSequence, encode_sequences
from lora_factory.models.loading import load_base_model
from lora_factory.tasks.examples import Example

SETTINGS = CollectArguments(sequence_length=24, target_modules="all-linear")


@pytest.fixture
def trainer(pico_model_folder: Path) -> LoRATrainer:
    model, tokenizer = load_base_model(pico_model_folder)
    return LoRATrainer.attach(model, tokenizer, SETTINGS, "pico/llama", Accelerator(cpu=True))


@pytest.fixture
def sequences(trainer: LoRATrainer) -> list[TokenSequence]:
    return encode_sequences(trainer.tokenizer, [Example("", text) for text in TRAINING_TEXT], SETTINGS)


def loss(trainer: LoRATrainer, adapter: torch.Tensor, sequences: list[TokenSequence]) -> float:
    trainer.slot.load(adapter)
    return trainer.loss(sequences)


def test_steps_lower_the_loss_and_none_change_nothing(trainer: LoRATrainer, sequences: list[TokenSequence]) -> None:
    start, sequences = trainer.initial, sequences[:3] * 4
    assert torch.equal(refine(trainer, start, sequences, steps=0), start)
    losses = [loss(trainer, refine(trainer, start, sequences, steps=steps), sequences) for steps in (0, 5, 40)]
    assert losses[0] > losses[1] + 0.01 > losses[2] + 0.02, losses
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    refine(trainer, start, sequences, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_steps_that_do_not_help_elsewhere_are_not_taken(trainer: LoRATrainer, sequences: list[TokenSequence]) -> None:
    ours, foreign = sequences[:1], sequences[-4:]
    start = refine(trainer, trainer.initial, ours * 2, learning_rate=1e-2)
    assert loss(trainer, start, ours) < loss(trainer, trainer.initial, ours) - 0.5
    ended = loss(trainer, refine(trainer, start, foreign, learning_rate=1e-2), foreign)
    assert ended <= loss(trainer, start, foreign) + 1e-3
    assert torch.equal(refine(trainer, start, ours, learning_rate=1e-2), start)  # a single one cannot be left out


def test_a_state_dict_is_refined_on_a_users_examples(trainer: LoRATrainer) -> None:
    state_dict = trainer.layout.unflatten(trainer.initial)
    better = refine_state_dict(trainer, state_dict, TRAINING_TEXT[:3] * 4, 30)
    assert better.keys() == state_dict.keys()
    sequences = encode_sequences(trainer.tokenizer, [Example("", text) for text in TRAINING_TEXT[:3]], SETTINGS)
    assert loss(trainer, trainer.layout.flatten(better), sequences) < loss(trainer, trainer.initial, sequences) - 0.01


def test_a_loss_that_is_not_finite_stops(trainer: LoRATrainer, sequences: list[TokenSequence]) -> None:
    with pytest.raises(LoraFactoryError, match="lower learning_rate"):
        refine(trainer, torch.full_like(trainer.initial, torch.inf), sequences, steps=1)
