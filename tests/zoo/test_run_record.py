"""The record of a run: its data set goes from the task to the generator's card; older records load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.models import TRAINING_TEXT
from helpers.runs import SMALL
from huggingface_hub import ModelCard

from lora_factory.arguments import TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.tasks.text import DataSource
from lora_factory.training.train import train_generator
from lora_factory.zoo.run_record import RunRecord


def test_the_data_set_of_a_task_reaches_the_card(
    pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"train": [Example("", f"{number} {TRAINING_TEXT[0]}") for number in range(30)]}
    monkeypatch.setattr(DataSource, "load", lambda source, task: rows)
    (tmp_path / "folder").mkdir()
    sources = {"legal": "alice/legal", "file": str(tmp_path / "rows.jsonl"), "folder": str(tmp_path / "folder")}
    tasks = [Task(name, (f"Write {name}",), DataSource(path), license="mit") for name, path in sources.items()]
    zoo = collect_adapters(tasks, pico_model_folder, tmp_path / "zoo", SMALL, base_model_name="pico/llama")
    assert [zoo.record(task.name, "seed-0").dataset for task in tasks] == ["alice/legal", None, None]
    train_generator(zoo, tmp_path / "generator", TrainArguments(steps=1, text_encoder=str(pico_encoder_folder)))
    card = ModelCard.load(tmp_path / "generator" / "README.md")
    assert card.data.datasets == ["alice/legal"]
    assert "| legal | Write legal | mit | alice/legal |" in card.content
    assert "| file | Write file | mit | unknown |" in card.content
    assert str(tmp_path) not in card.content


def test_records_without_a_data_set_are_as_before() -> None:
    values = {
        "format_version": 1,
        "task": "poems",
        "run": "seed-0",
        "descriptions": ["Continue a poem"],
        "seed": 0,
        "base_model": "pico/llama",
        "base_revision": None,
        "steps": 1,
        "snapshot_steps": [1],
        "validation_losses": [],
        "train_tokens": 1,
        "data_fingerprint": "f",
        "versions": {},
        "arguments": {},
        "sha256": {},
        "license": None,
    }
    record = RunRecord.from_dict(values)
    assert record.dataset is None
    assert json.loads(json.dumps(record.to_dict())) == values, "the fingerprint of an older zoo stays"
    named = RunRecord.from_dict(values | {"dataset": "alice/poems"})
    assert named.dataset == "alice/poems" and named.to_dict()["dataset"] == "alice/poems"


@pytest.mark.parametrize(
    "wrong", [{"seed": "x"}, {"descriptions": 3}, {"versions": []}, {"sha256": {"run.json": 1}}, {"steps": None}]
)
def test_values_of_a_wrong_type_are_refused(wrong: dict[str, object]) -> None:
    lists = {"descriptions": ["x"], "snapshot_steps": [1], "validation_losses": [2]}
    names = dict.fromkeys(("task", "run", "base_model", "base_revision", "data_fingerprint", "license"), "a")
    objects = {name: {} for name in ("versions", "arguments", "sha256")}
    values = {"format_version": 1, "seed": 0, "steps": 1, "train_tokens": 1, **names, **lists, **objects}
    assert RunRecord.from_dict(values).validation_losses == (2,)
    with pytest.raises(LoraFactoryError, match="holds a value of the wrong type"):
        RunRecord.from_dict(values | wrong)
