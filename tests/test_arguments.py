"""Option values as people write them: of a neighbouring type they are converted, or refused by the field's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_factory.arguments import CollectArguments, CompareArguments, TokenOptions, TrainArguments, from_record
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "q_proj,v_proj"),
        ({"target_modules": {"v_proj", "q_proj"}}, "q_proj,v_proj"),
        ({"seeds": 3}, (3,)),
        ({"seeds": np.arange(2)}, (0, 1)),
        ({"seeds": tuple(np.arange(2))}, (0, 1)),
        ({"seeds": range(2)}, (0, 1)),
        ({"seeds": torch.tensor([4, 5])}, (4, 5)),
        ({"seeds": "1,2"}, (1, 2)),
        ({"steps": "50"}, 50),
        ({"steps": np.int64(50)}, 50),
        ({"steps": 5e1}, 50),
        ({"learning_rate": np.float32(0.5)}, 0.5),
        ({"learning_rate": "1e-3"}, 1e-3),
        ({"report_to": "tensorboard"}, ("tensorboard",)),
    ],
)
def test_values_of_a_neighbouring_type_are_taken(given: dict[str, object], kept: object) -> None:
    (name,) = given
    found = getattr(CollectArguments(**given), name)
    assert found == kept and type(found) is type(kept)
    assert not isinstance(found, tuple) or [type(one) for one in found] == [type(one) for one in kept]


@pytest.mark.parametrize(
    "given",
    [
        {"steps": "five"},
        {"steps": 2.5},
        {"steps": True},
        {"steps": None},
        {"steps": [5]},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"packing": "no"},
        {"packing": 2},
        {"seeds": None},
        {"seeds": [0.5]},
        {"seeds": {"a": 1}},
        {"seeds": 2**64},
        {"target_modules": [1]},
        {"target_modules": None},
        {"lora_alpha": "four"},
    ],
)
def test_values_without_a_meaning_are_refused_by_name(given: dict[str, object]) -> None:
    with pytest.raises(LoraFactoryError, match=next(iter(given))):
        CollectArguments(**given)


def test_every_data_class_converts() -> None:
    assert TrainArguments(text_encoder=Path("models") / "encoder").text_encoder == str(Path("models") / "encoder")
    assert CompareArguments(seeds=np.int64(1)).seeds == (1,)


def test_records_of_earlier_versions_are_read() -> None:
    dropped = {"warmup_ratio": 0.1, "weight_decay": 0.0, "max_grad_norm": 1.0, "compile": False}
    assert from_record(CollectArguments, {"rank": 3, **dropped}) == CollectArguments(rank=3)
    assert from_record(TrainArguments, {"steps": 3, "base_mixtures": 5, "specialist_steps": 1}) == TrainArguments(
        steps=3
    )
    with pytest.raises(LoraFactoryError, match="rank"):
        from_record(CollectArguments, {"rank": 0})


def test_token_options_are_those_of_the_collection() -> None:
    given = {"sequence_length": 7, "packing": False, "max_tokens": 9, "chat_template": True}
    assert CollectArguments(**given).tokens == TokenOptions(**given)
    assert CollectArguments().tokens == TrainArguments().tokens == TokenOptions()


def test_no_task_is_refused(pico_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraFactoryError, match="tasks is empty"):
        collect_adapters([], pico_model_folder, tmp_path / "zoo")


def test_seeds_and_sizes_beyond_any_machine_are_refused() -> None:
    for kind in (CollectArguments, CompareArguments):
        with pytest.raises(LoraFactoryError, match="seeds holds 184467"):
            kind(seeds=2**64)
    with pytest.raises(LoraFactoryError, match="seed holds 184467"):
        TrainArguments(seed=2**64)
    for name in ("width", "depth", "latent_size", "conv_depth"):
        with pytest.raises(LoraFactoryError, match=f"{name}=1000000000 must be"):
            TrainArguments(**{name: 10**9})


def test_the_steps_of_one_lora_for_all_are_a_part_of_those_through_the_base() -> None:
    assert TrainArguments(multitask_steps=3).multitask_steps == 3, "without a zoo, base_steps has a default of its own"
    with pytest.raises(LoraFactoryError, match="multitask_steps=3 are the first of base_steps=2; give as many or few"):
        TrainArguments(base_steps=2, multitask_steps=3)
