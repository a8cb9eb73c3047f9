"""Row budgets and streaming: the same rows, and no more of them than asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
from helpers.task_files import ROWS, write_local, write_rows, write_task
from hub_server.local import LocalHub

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import load_tasks, save_tasks
from lora_factory.tasks.text import DataSource, load_examples


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.txt"])
def test_the_first_rows_of_every_format(tmp_path: Path, name: str, streaming: bool) -> None:
    write_local(tmp_path, name)
    source = DataSource(str(tmp_path / name), streaming=streaming, max_rows=7)
    lines = 4 if name == "a.txt" else 7  # every other line of that text file is blank
    assert load_examples(source, "a") == {"train": [Example("", row["text"]) for row in ROWS[:lines]]}
    more = DataSource(str(tmp_path / name), streaming=streaming, max_rows=1000)
    assert len(load_examples(more, "a")["train"]) == len(ROWS)


def test_streaming_reads_the_named_columns_of_a_folder(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"t{number}", "label": number % 2} for number in range(10)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    data = {"path": "data", "prompt_column": "text", "completion_column": "label"}
    path = write_task(tmp_path, data | {"streaming": True, "max_rows": 5})
    (task,) = load_tasks(path)
    examples = [example for split in ("train", "validation", "test") for example in task.examples(split)]
    assert sorted(examples) == [Example(f"t{number}", ("no", "yes")[number % 2]) for number in range(5)]
    save_tasks([task], tmp_path / "again.yaml")
    (again,) = load_tasks(tmp_path / "again.yaml")
    assert again.data == task.data and again.fingerprint() == task.fingerprint()


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_data_files_choose_among_the_files_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    for part in ("mine", "other", "held"):
        rows = datasets.Dataset.from_list([{"text": f"{part} {number}"} for number in range(3)])
        file = tmp_path / "data" / f"{part}.{name}"
        rows.to_parquet(file) if name == "parquet" else rows.to_json(file)
    files = {"train": f"mine.{name}", "test": [f"held.{name}"]}
    (task,) = load_tasks(write_task(tmp_path, {"path": "data", "data_files": files}))
    learned = {example.completion.split()[0] for split in ("train", "validation") for example in task.examples(split)}
    assert learned == {"mine"}
    assert [example.completion for example in task.examples("test")] == ["held 0", "held 1", "held 2"]
    with pytest.raises(LoraFactoryError, match=f"missing.{name}"):
        load_examples(DataSource(str(tmp_path / "data"), data_files={"train": f"missing.{name}"}), "a")
    one = DataSource(str(tmp_path / "data" / f"mine.{name}"), data_files={"train": f"held.{name}"})
    with pytest.raises(LoraFactoryError, match="is one file, of which data_files are no part"):
        load_examples(one, "a")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_and_damaged_rows_are_named(tmp_path: Path, streaming: bool) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    source = DataSource(str(tmp_path / "a.jsonl"), text_column="body", streaming=streaming, max_rows=3)
    with pytest.raises(LoraFactoryError, match=r"a/train: no column 'body' in .*; it has text"):
        load_examples(source, "a")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(LoraFactoryError, match=r"task 'a': cannot load data from .*a.jsonl"):
        load_examples(DataSource(str(tmp_path / "a.jsonl"), streaming=streaming, max_rows=3), "a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rows": 0}, "max_rows=0 .* must be a number of rows from 1 to"),
        ({"max_rows": "7"}, "max_rows='7' .* must be a number of rows from 1 to"),
        ({"max_rows": 2**63}, "max_rows=9223372036854775808 .* must be a number of rows from 1 to"),
        ({"streaming": True}, "true needs max_rows"),
        ({"streaming": "yes", "max_rows": 5}, "streaming='yes' must be true or false"),
    ],
)
def test_a_stream_without_end_is_refused(options: dict, words: str) -> None:
    with pytest.raises(LoraFactoryError, match=words):
        DataSource("user/name", **options)


def test_a_huge_data_set_is_not_downloaded(hub: LocalHub) -> None:
    shards = {
        f"data/train-{number:05d}.jsonl": "".join(
            json.dumps({"text": f"row {number}-{row}"}) + "\n" for row in range(50)
        ).encode()
        for number in range(3)
    }
    hub.add_repo("alice/huge", shards, repo_type="dataset")
    code = """
from lora_factory.tasks.text import DataSource, load_examples
source = DataSource("alice/huge", streaming=True, max_rows=20)
result = [example.completion for example in load_examples(source, "huge")["train"]]
"""
    assert hub.evaluate(code, timeout=300.0) == [f"row 0-{row}" for row in range(20)]
    assert hub.log.matching("/resolve/.*train-00000.jsonl", "GET")
    assert not hub.log.matching("/resolve/.*train-00002.jsonl", "GET")


def test_a_task_without_data_and_examples_says_so() -> None:
    task = Task.from_examples("poems", ["Write poems."], ["a", "b", "c"])
    for empty in (Task("poems", ("Write poems.",), None), dataclasses.replace(task, descriptions=("Write verse.",))):
        with pytest.raises(LoraFactoryError, match=r"'poems' has neither data nor examples; use Task"):
            empty.examples("train")
