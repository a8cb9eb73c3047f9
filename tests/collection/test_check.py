"""What a collection will take, before it starts: it is what the collection then takes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.images import brightness_task, save_classifier
from helpers.runs import tasks
from transformers import ViTImageProcessor

from lora_factory.arguments import CollectArguments
from lora_factory.cli import commands as cli
from lora_factory.collection.check import check_collection
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import save_tasks
from lora_factory.tasks.text import DataSource

SETTINGS = CollectArguments(steps=6, snapshots=3, batch_size=2, sequence_length=16, rank=2, seeds=(0, 1))


def test_sizes_are_those_of_the_collection(pico_model_folder: Path, tmp_path: Path) -> None:
    given = tasks("poems", "letters")
    size = check_collection(given, pico_model_folder, SETTINGS)
    zoo = collect_adapters(given, pico_model_folder, tmp_path / "zoo", SETTINGS)
    assert size.runs == sum(len(zoo.runs(task)) for task in zoo.tasks) == 4
    assert size.weights == zoo.layout.size
    for task in given:
        found = size.tasks[task.name]
        assert found.examples["train"] == len(task.examples("train"))
        assert found.steps == 6 and found.tokens == 16 * found.sequences  # packed
    files = [file for file in (tmp_path / "zoo").rglob("*.safetensors") if ".collection" not in file.parts]
    assert size.disk < sum(file.stat().st_size for file in files) < 1.5 * size.disk  # headers of tiny tensors
    assert size.seconds > 0 and size.memory > 0


def test_a_fault_in_the_last_task_is_named(pico_model_folder: Path, tmp_path: Path) -> None:
    gone = Task("gone", ("Nothing.",), DataSource(str(tmp_path / "gone.jsonl")))
    with pytest.raises(LoraFactoryError, match=r"task 'gone' cannot be used: .*gone\.jsonl"):
        check_collection([*tasks("poems"), gone], pico_model_folder, SETTINGS)


def test_a_step_that_fails_is_reported_with_the_models_class(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    with pytest.raises(
        LoraFactoryError, match=r"this ViTForImageClassification cannot learn such tasks: ValueError: .*16\*16.*8\*8"
    ):
        check_collection([brightness_task("bright", wanted=True)], folder, SETTINGS)


def test_an_error_of_our_own_stays_as_it_is(pico_model_folder: Path) -> None:
    with pytest.raises(LoraFactoryError, match=r"^measure: the loss"):
        check_collection(tasks("poems"), pico_model_folder, replace(SETTINGS, learning_rate=1e30))


def test_tasks_come_in_any_form(pico_model_folder: Path, tmp_path: Path) -> None:
    save_tasks(tasks("poems", "letters"), tmp_path / "tasks.yaml")
    assert list(check_collection(tmp_path / "tasks.yaml", pico_model_folder, SETTINGS).tasks) == ["poems", "letters"]
    with pytest.raises(LoraFactoryError, match="tasks is empty; give at least one task"):
        check_collection([], pico_model_folder, SETTINGS)


def test_the_command_prints_rows_tokens_and_needs(
    pico_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tasks(tasks("poems", "letters"), tmp_path / "tasks.yaml")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    Path("small.yaml").write_text("sequence_length: 16")
    before.append(tmp_path / "small.yaml")
    words = ["check", "--tasks", "tasks.yaml", "--base-model", str(pico_model_folder), "--config", "small.yaml"]
    assert cli.main(words) == 0
    poems, letters, needs, following = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"poems: \d+ train, .* training sequences, [\d,]+ tokens, \d+ steps per run", poems)
    assert letters.startswith("letters: ")
    assert re.fullmatch(
        r"2 runs of [\d,]+ weights: about .* by one process here, .* GB of memory, .* MB of disk", needs
    )
    assert following.startswith("next: lora-factory collect --tasks tasks.yaml --base-model ")
    assert following.endswith(" --config small.yaml --output-dir zoo")
    assert sorted(tmp_path.rglob("*")) == sorted(before)
