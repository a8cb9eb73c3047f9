from __future__ import annotations

import socket

import datasets
import pytest
from helpers.task_files import ROWS, write_local, write_rows, write_task

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import load_tasks, save_tasks
from lora_factory.tasks.text import DataSource

MULTIPLE_CHOICE = "tasks:\n- {name: a, descriptions: [a], data: b, metric: multiple_choice"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"network access: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt"])
def test_local_files_of_every_format_load_without_network_and_leave_nothing_behind(tmp_path, name, capfd):
    folder = tmp_path / "with [brackets] and space"
    folder.mkdir()
    write_local(folder, name)
    (task,) = load_tasks(write_task(folder, name))
    capfd.readouterr()
    texts = [example.completion for split in ("train", "validation", "test") for example in task.examples(split)]
    assert sorted(texts) == sorted(row["text"] for row in ROWS)
    assert sorted(file.name for file in folder.iterdir()) == sorted([name, "tasks.yaml"])
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


def test_prompt_and_completion_columns_patterns_and_splits(tmp_path):
    rows = [{"question": f"q{number}", "answer": number} for number in range(4)]
    write_rows(tmp_path / "part-0.jsonl", rows[:2])
    write_rows(tmp_path / "part-1.jsonl", rows[2:])
    write_rows(tmp_path / "dev.jsonl", [{"question": "q", "answer": 9}])
    data = {
        "path": "json",
        "data_files": {"main": "part-*.jsonl", "dev": "dev.jsonl"},
        "splits": {"train": "main", "validation": "dev", "test": "dev"},
        "prompt_column": "question",
        "completion_column": "answer",
    }
    (task,) = load_tasks(write_task(tmp_path, data))
    assert task.examples("train") == [Example(f"q{number}", str(number)) for number in range(4)]
    assert task.examples("test") == [Example("q", "9")]


def test_a_folder_of_data_files_is_a_source(tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    write_rows(tmp_path / "data" / "test.jsonl", [{"text": "held out"}])
    (task,) = load_tasks(write_task(tmp_path, "data"))
    assert task.examples("test") == [Example("", "held out")]
    assert len(task.examples("train")) == 18 and len(task.examples("validation")) == 2


def test_class_labels_become_their_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"t{number}", "label": number % 2} for number in range(10)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = {"path": "a.parquet", "prompt_column": "text", "completion_column": "label"}
    (task,) = load_tasks(write_task(tmp_path, data))
    assert {example.completion for example in task.examples("train")} == {"no", "yes"}


def test_carving_is_disjoint_deterministic_and_keeps_equal_rows_together():
    texts = [f"text {number % 50}" for number in range(100)]
    task, again = (Task.from_examples("a", ["b"], texts) for _ in range(2))
    splits = {split: set(task.examples(split)) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 40, "validation": 5, "test": 5}
    assert not splits["train"] & (splits["validation"] | splits["test"])
    assert task.fingerprint() == again.fingerprint()


def test_fingerprint_follows_the_data_only():
    texts = [f"text {number}" for number in range(10)]
    task = Task.from_examples("a", ["b"], texts)
    assert task.fingerprint() == Task.from_examples("c", ["d"], texts).fingerprint()
    assert task.fingerprint() != Task.from_examples("a", ["b"], [*texts, "one more"]).fingerprint()


def test_blank_rows_are_left_out():
    task = Task.from_examples("a", ["b"], ["x", " ", ""], ["y"], ["z", "\n"])
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [1, 1, 1]


@pytest.mark.parametrize("name", ["tasks.yaml", "tasks.json"])
def test_save_and_load_round_trip_and_the_folder_can_move(tmp_path, name):
    folder = tmp_path / "here"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", ROWS)
    tasks = [
        Task("from-file", ("One.", "Two."), DataSource(str(folder / "rows.jsonl")), license="MIT"),
        Task.from_examples("plain", ["Ä: yes."], ["é", "b"], ["c"], ["d"]),
        Task.from_examples("pairs", ["Pairs."], [Example("p", "c")], [Example("", "v")], [Example("q", "t")]),
        Task("hub", ["Hub."], DataSource("user/name", splits={"train": "train[:10]"}, revision="v1")),
        Task("judged", ["Which?"], DataSource("user/name"), metric="multiple_choice", choices=("no", "yes")),
        Task.from_examples("exact", ["What?"], ["a", "b", "c"], metric="exact_match"),
    ]
    save_tasks(tasks, folder / name)
    moved = folder.rename(tmp_path / "moved")
    loaded = load_tasks(moved / name)
    assert [(t.name, t.descriptions, t.license, t.metric, t.choices) for t in loaded] == [
        (t.name, t.descriptions, t.license, t.metric, t.choices) for t in tasks
    ]
    for task, original in zip(loaded[1:3], tasks[1:3], strict=True):
        assert task.fingerprint() == original.fingerprint()
    assert loaded[0].examples("train")
    assert loaded[3].data == tasks[3].data


def test_a_folder_of_task_files(tmp_path):
    save_tasks([Task.from_examples("b", ["x"], ["1", "2", "3"])], tmp_path / "2.yaml")
    save_tasks([Task.from_examples("a", ["x"], ["1", "2", "3"])], tmp_path / "1.json")
    assert [task.name for task in load_tasks(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty; write at least one task"),
        ("tasks: []", "lists no tasks"),
        ("- a\n- b", "one list called tasks"),
        ("tasks: {", "not valid YAML"),
        ("tasks:\n- poems", "must be a mapping"),
        ("tasks:\n- {descriptions: [a], data: b}", "has no name"),
        ("tasks:\n- {name: a, descriptions: [a]}", "has no data"),
        ("tasks:\n- {name: a, data: b.jsonl}", "'a' has no descriptions"),
        ("tasks:\n- {name: a, descriptions: [' '], data: b.jsonl}", "texts that are not empty"),
        ("tasks:\n- {name: 7, descriptions: [a], data: b.jsonl}", "put it in quotes"),
        ("tasks:\n- {name: ../a, descriptions: [a], data: b.jsonl}", "cannot be a file name"),
        (
            "tasks:\n- {name: a, description: [a], data: b.jsonl}",
            "'description'; did you mean descriptions?",
        ),
        ("tasks:\n- {name: a, descriptions: [a], data: {path: b, revision: 7}}", "put it in quotes"),
        ("tasks:\n- {name: a, descriptions: [a], data: {path: json}}", "needs data_files"),
        ("tasks:\n- {name: a, descriptions: [a], data: {path: json, data_files: [7]}}", "must name files"),
        ("tasks:\n- {name: a, descriptions: [a], data: {path: b, prompt_column: c}}", "go together"),
        ("tasks:\n- {name: a, descriptions: [a], data: {path: b, splits: {dev: c}}}", "must map train"),
        (
            "tasks:\n- {name: a, descriptions: [a], data: b, metric: bleu}",
            "choose one of exact_match, multiple_choice",
        ),
        ("tasks:\n- {name: a, descriptions: [a], data: b, metric: [exact_match]}", "choose one of exact_match"),
        ("tasks:\n- {name: a, descriptions: [a], data: b, choices: [c, d]}", "write metric: multiple_choice"),
        (f"{MULTIPLE_CHOICE}, choices: [yes, no]}}", "put each in quotes, since YAML reads yes and no as true"),
        (f"{MULTIPLE_CHOICE}, choices: c}}", "must be a list of texts"),
        (f"{MULTIPLE_CHOICE}, choices: [c]}}", "two or more, all different"),
        (f"{MULTIPLE_CHOICE}, choices: [c, d, ' c']}}", "two or more, all different"),
        ("tasks:\n- &t {name: a, descriptions: [a], data: b.jsonl}\n- *t", "used more than once"),
    ],
)
def test_task_files_that_are_wrong_say_how_to_write_them(tmp_path, content, says):
    (tmp_path / "tasks.yaml").write_text(content)
    with pytest.raises(LoraFactoryError, match=says):
        load_tasks(tmp_path / "tasks.yaml")


def test_no_task_file(tmp_path):
    with pytest.raises(LoraFactoryError, match="no task file"):
        load_tasks(tmp_path / "tasks.yaml")
    with pytest.raises(LoraFactoryError, match="has no task file"):
        load_tasks(tmp_path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"path": "rows.jsonl", "text_column": "body"}, "no column 'body' in .*; it has text, tags"),
        ({"path": "rows.jsonl", "text_column": "tags"}, "column 'tags' holds list, not text"),
        ({"path": "missing.jsonl"}, "no data file .*missing.jsonl"),
        ({"path": "empty.jsonl"}, "empty.jsonl is empty"),
        ({"path": "blank.jsonl"}, "no row has text in column 'text'"),
        ({"path": "broken.jsonl"}, "cannot load data from .*broken.jsonl .*repair the file"),
        ({"path": "few.jsonl"}, "too few to carve out validation and test"),
        ({"path": "json", "data_files": {"dev": "rows.jsonl"}}, "no split called train, but dev"),
        ({"path": "rows.jsonl", "splits": {"train": "all"}}, "no split 'all' in .*; it has train"),
        ({"path": "./nowhere"}, "no data folder"),
    ],
)
def test_data_that_is_wrong_says_what_there_is(tmp_path, data, says):
    write_rows(tmp_path / "rows.jsonl", [{"text": f"t{number}", "tags": ["a"]} for number in range(10)])
    write_rows(tmp_path / "blank.jsonl", [{"text": " "}, {"text": ""}])
    write_rows(tmp_path / "few.jsonl", [{"text": "a"}, {"text": "b"}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n nonsense')
    (task,) = load_tasks(write_task(tmp_path, data))
    with pytest.raises(LoraFactoryError, match=says):
        task.examples("train")


def test_choices_are_those_given_or_those_seen_in_training():
    def task(train, choices=()):
        examples = [Example("q", answer) for answer in train]
        return Task.from_examples("a", ["b"], examples, examples, examples, metric="multiple_choice", choices=choices)

    assert task(["no"], [" yes", "no"]).answer_choices() == ("yes", "no")
    assert task([" yes", "no", "yes\n", "no"]).answer_choices() == ("no", "yes")
    assert len(task(map(str, range(20))).answer_choices()) == 20
    for train in (["no", " no"], map(str, range(21))):
        with pytest.raises(LoraFactoryError, match=r"has (1|21) different completions.*list its choices"):
            task(train).answer_choices()


def test_unknown_split_and_no_text_in_memory():
    task = Task.from_examples("a", ["b"], ["1", "2", "3"])
    with pytest.raises(LoraFactoryError, match="choose one of train, validation, test"):
        task.examples("dev")
    with pytest.raises(LoraFactoryError, match="no training example"):
        Task.from_examples("a", ["b"], [" "])
    with pytest.raises(LoraFactoryError, match="must end in"):
        save_tasks([task], "tasks.toml")


def test_hub_sources_load_the_named_splits_and_teach_when_the_hub_cannot_help(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if arguments[0] == "user/unknown":
            raise datasets.exceptions.DatasetNotFoundError("it does not exist")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource("user/name", name="small", splits={"train": "train[:20]"}, revision="v1")
    assert len(Task("a", ("b",), source).examples("train")) == 16
    assert calls == [(("user/name", "small"), {"split": "train[:20]", "data_files": None, "revision": "v1"})]
    with pytest.raises(LoraFactoryError, match="check the id on the Hub"):
        Task("a", ("b",), DataSource("user/unknown")).examples("train")
