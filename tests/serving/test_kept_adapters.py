"""A bounded number of adapters in one base model, which is never copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import TRAINING_TEXT
from peft import PeftModel

from lora_factory import CVAELoRAGenerator
from lora_factory.adapters.attach import adapter_parameters
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.generation import Order
from lora_factory.models.loading import load_base_model
from lora_factory.serving.kept_adapters import KeptAdapters, identifier_of
from lora_factory.serving.metrics import Metrics


@pytest.fixture
def kept(generator_folder: Path, base_folder: Path) -> KeptAdapters:
    model, tokenizer = load_base_model(base_folder)
    return KeptAdapters(CVAELoRAGenerator.from_pretrained(generator_folder), model, tokenizer, 2, Metrics())


def is_there(kept: KeptAdapters, order: Order) -> bool:
    return kept.slot(identifier_of(order), None) is not None


def weights_of(kept: KeptAdapters, order: Order) -> dict[str, torch.Tensor]:
    """The weights in the slot of an order's adapter, which must be there."""
    name = kept.slot(identifier_of(order), None)
    assert name is not None and isinstance(kept.model, PeftModel)
    return adapter_parameters(kept.model, name)


def test_the_base_model_is_not_copied_even_if_it_reads_examples_first(kept: KeptAdapters) -> None:
    base = kept.model
    order = Order("Letters", TRAINING_TEXT)
    kept.write(identifier_of(order), order)
    assert isinstance(kept.model, PeftModel) and kept.model.get_base_model() is base


def test_slots_hold_what_the_generator_writes_and_the_oldest_makes_room(kept: KeptAdapters) -> None:
    orders = [Order(text) for text in ("one", "two and three", "def add(left)")]
    for order in orders[:2]:
        kept.slot(identifier_of(order), order)
    kept.slot(identifier_of(orders[0]), orders[0])  # used again
    kept.slot(identifier_of(orders[2]), orders[2])
    assert [is_there(kept, order) for order in orders] == [True, False, True]
    assert len(kept) == 2 and len(kept.model.peft_config) == 2
    for order in (orders[0], orders[2]):
        expected = kept.generator.generate_state_dict(order.text)
        assert all(torch.equal(weights, expected[key]) for key, weights in weights_of(kept, order).items())


def test_an_order_that_fails_leaves_the_others(kept: KeptAdapters) -> None:
    orders = [Order("one"), Order("two")]
    for order in orders:
        kept.slot(identifier_of(order), order)
    wrong = Order("three", rank=99)
    with pytest.raises(LoraFactoryError, match="rank=99 is above"):
        kept.slot(identifier_of(wrong), wrong)
    assert all(is_there(kept, order) for order in orders)
    assert kept.slot("adapter-0", None) is None


def test_equal_orders_have_one_identifier_and_others_another() -> None:
    same = {identifier_of(Order("a", given)) for given in (["x"], ("x",), [("", "x")], [{"text": "x"}])}
    others = (Order("b", ["x"]), Order("a"), Order("a", ["x"], seed=1), Order("a", [("x", "")]), Order("a", rank=1))
    assert len(same) == 1 and len({identifier_of(order) for order in others} - same) == 5
