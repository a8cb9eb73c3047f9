"""Steps on a user's examples, and the choice between adapters by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.models import TRAINING_TEXT

from lora_factory.arguments import CollectArguments
from lora_factory.collection.trainer import AdapterFactory
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.refine import refine, refine_state_dict
from lora_factory.models.inputs import TokenSequence, encode_sequences
from lora_factory.models.loading import load_base_model
from lora_factory.tasks.examples import Example

SETTINGS = CollectArguments(sequence_length=24, target_modules="all-linear")


@pytest.fixture
def factory(pico_model_folder: Path) -> AdapterFactory:
    model, tokenizer = load_base_model(pico_model_folder)
    return AdapterFactory.attach(model, tokenizer, SETTINGS, "pico/llama", Accelerator(cpu=True))


@pytest.fixture
def sequences(factory: AdapterFactory) -> list[TokenSequence]:
    return encode_sequences(factory.tokenizer, [Example("", text) for text in TRAINING_TEXT], SETTINGS)


def loss(factory: AdapterFactory, adapter: torch.Tensor, sequences: list[TokenSequence]) -> float:
    factory.slot.load(adapter)
    return factory.loss(sequences)


def test_steps_lower_the_loss_and_none_change_nothing(factory: AdapterFactory, sequences: list[TokenSequence]) -> None:
    start, sequences = factory.initial, sequences[:3] * 4
    assert torch.equal(refine(factory, start, sequences, steps=0), start)
    losses = [loss(factory, refine(factory, start, sequences, steps=steps), sequences) for steps in (0, 5, 40)]
    assert losses[0] > losses[1] + 0.01 > losses[2] + 0.02, losses
    before = {name: value.clone() for name, value in factory.model.state_dict().items()}
    refine(factory, start, sequences, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in factory.model.state_dict().items())


def test_steps_that_do_not_help_elsewhere_are_not_taken(
    factory: AdapterFactory, sequences: list[TokenSequence]
) -> None:
    ours, foreign = sequences[:1], sequences[-4:]
    start = refine(factory, factory.initial, ours * 2, learning_rate=1e-2)
    assert loss(factory, start, ours) < loss(factory, factory.initial, ours) - 0.5
    ended = loss(factory, refine(factory, start, foreign, learning_rate=1e-2), foreign)
    assert ended <= loss(factory, start, foreign) + 1e-3
    assert torch.equal(refine(factory, start, ours, learning_rate=1e-2), start)  # a single one cannot be left out


def test_a_state_dict_is_refined_on_a_users_examples(factory: AdapterFactory) -> None:
    state_dict = factory.layout.unflatten(factory.initial)
    better = refine_state_dict(factory, state_dict, TRAINING_TEXT[:3] * 4, 30)
    assert better.keys() == state_dict.keys()
    sequences = encode_sequences(factory.tokenizer, [Example("", text) for text in TRAINING_TEXT[:3]], SETTINGS)
    assert loss(factory, factory.layout.flatten(better), sequences) < loss(factory, factory.initial, sequences) - 0.01


def test_a_loss_that_is_not_finite_stops(factory: AdapterFactory, sequences: list[TokenSequence]) -> None:
    with pytest.raises(LoraFactoryError, match="lower learning_rate"):
        refine(factory, torch.full_like(factory.initial, torch.inf), sequences, steps=1)
