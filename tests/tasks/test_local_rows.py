"""Cells stay as they are written, in every format; what cannot be read is one error that names the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy
import pyarrow
import pytest
from helpers.task_files import write_local
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.coco_tasks import detection_tasks
from lora_factory.tasks.examples import Example
from lora_factory.tasks.image_files import read_image
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import check_tasks, load_tasks
from lora_factory.tasks.text import DataSource, load_examples, read_examples

CELLS = ["007", "true", "1.50", "1e5", "12345678901234567890", "2024-01-02", "NA", "null", "None", " a ", 'a "b", c\n']
TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1).filter(str.strip)


def write(path: Path, cells: list[str]) -> DataSource:
    rows = [{"q": f"q{number}", "a": cell} for number, cell in enumerate(cells)]
    stream = io.StringIO(newline="")
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        writer = csv.writer(stream, delimiter="\t" if name.endswith(".tsv") else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([["q", "a"], *([row["q"], row["a"]] for row in rows)])
    elif name.endswith(".json"):
        json.dump(rows, stream)
    else:
        stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    content = stream.getvalue().encode("utf-8-sig")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return DataSource(str(path), prompt_column="q", completion_column="a")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.ndjson", "a.csv.gz", "a.jsonl.gz"])
def test_cells_are_texts(tmp_path: Path, name: str, streaming: bool) -> None:
    source = write(tmp_path / name, CELLS)
    source = DataSource(source.path, prompt_column="q", completion_column="a", streaming=streaming, max_rows=99)
    assert [row.completion for row in load_examples(source, "t")["train"]] == CELLS


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_column_of_one_kind_is_text(tmp_path: Path, cell: str, name: str) -> None:
    examples = load_examples(write(tmp_path / name, [cell] * 20), "t")["train"]
    assert {row.completion for row in examples} == {cell}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(TEXTS, min_size=1, max_size=4), name=st.sampled_from(["a.csv", "a.tsv", "a.json", "a.jsonl"]))
def test_any_text_comes_back(tmp_path: Path, cells: list[str], name: str) -> None:
    assert [row.completion for row in load_examples(write(tmp_path / name, cells), "t")["train"]] == cells


def test_numbers_of_json_and_parquet(tmp_path: Path) -> None:
    digits = "9" * 5000
    (tmp_path / "a.jsonl").write_text(f'{{"text": 1.50}}\n{{"text": true}}\n{{"text": {digits}}}\n{{"text": NaN}}\n')
    assert [row.completion for row in load_examples(DataSource(str(tmp_path / "a.jsonl")), "t")["train"]] == [
        "1.50",
        "true",
        digits,
    ]
    features = datasets.Features({"text": datasets.Value("float32")})
    datasets.Dataset.from_dict({"text": [0.1, None]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert load_examples(DataSource(str(tmp_path / "a.parquet")), "t")["train"] == [Example("", "0.1")]


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_of_lists(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"q": ["x", "y"], "text": ["a", "b"]}, indent=indent))
    assert load_examples(DataSource(str(tmp_path / "a.json")), "t")["train"] == [Example("", "a"), Example("", "b")]


def test_rows_that_nobody_labelled_are_left_out(tmp_path: Path) -> None:
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"q": ["x", "y", "z"], "a": [1, -1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    source = DataSource(str(tmp_path / "a.parquet"), prompt_column="q", completion_column="a")
    assert load_examples(source, "t")["train"] == [Example("x", "yes"), Example("z", "no")]


def test_a_split_without_rows_that_nobody_asks_for_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "rows").mkdir()
    for name, texts in (("train-0", ["x", "y", "z"]), ("train-1", []), ("test", [])):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, "string")}), tmp_path / "blobs" / name)
        (tmp_path / "rows" / f"{name}.parquet").symlink_to(tmp_path / "blobs" / name)  # as in the Hub's cache
    rows = load_examples(DataSource(str(tmp_path / "rows"), splits={"train": "train"}), "t")
    assert sum(map(len, rows.values())) == 3
    with pytest.raises(LoraFactoryError, match=r"test\.parquet has no row"):
        load_examples(DataSource(str(tmp_path / "rows")), "t")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_without_rows(tmp_path: Path, streaming: bool) -> None:
    features = datasets.Features({"text": datasets.Value("string")})
    for name, texts in (("a", []), ("b", ["x"]), ("[a]/train-0", ["x", "y", "z"]), ("[a]/train-1", [])):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table({"text": texts}, features.arrow_schema), path)
    options: dict = {"streaming": True, "max_rows": 9} if streaming else {}
    assert sum(map(len, load_examples(DataSource(str(tmp_path / "[a]"), **options), "t").values())) == 3
    both = DataSource("parquet", data_files={"train": [str(tmp_path / "*.parquet")]}, **options)
    assert load_examples(both, "t")["train"] == [Example("", "x")]
    with pytest.raises(LoraFactoryError, match=r"task 't': .*a\.parquet has no row; write at least one"):
        load_examples(DataSource(str(tmp_path / "a.parquet"), **options), "t")
    with pytest.raises(LoraFactoryError, match=r"a\.parquet has no row; write at least one"):
        read_examples(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "names", [("a.jsonl", "b.csv"), ("a.txt", "b.txt", "c.jsonl"), ("a.csv", "b.parquet"), ("train.csv", "test.jsonl")]
)
def test_a_folder_of_several_formats_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_local(tmp_path, name)
    with pytest.raises(LoraFactoryError, match=r"data files of 2 formats, such as .* name the files to read"):
        load_examples(DataSource(str(tmp_path)), "t")
    with pytest.raises(LoraFactoryError, match="data files of 2 formats"):
        load_examples(DataSource(str(tmp_path), data_files={"train": list(names)}), "t")
    one = DataSource(str(tmp_path), data_files={"train": [names[0]]})
    assert len(load_examples(one, "t")["train"]) == 20


def test_notes_beside_data_files_are_no_data(tmp_path: Path) -> None:
    write_local(tmp_path, "a.csv")
    for name in ("README.txt", "README.md"):
        (tmp_path / name).write_text("Read me.\n")
    assert len(load_examples(DataSource(str(tmp_path)), "t")["train"]) == 20


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text\na\nb, c\n", "line 3: 2 cells"),
        ("a.csv", b"text,text\na,b\n", "two columns are called"),
        ("a.csv", b"text;more\na;b\n", "header is one cell with"),
        ("a.csv", b'text\n"a\n', "line 2"),
        ("a.csv", b"text\n\xff\n", "a.csv"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "twice"),
        ("a.json", b"[" * 100_000, "a.json"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraFactoryError, match=words):
        load_examples(DataSource(str(tmp_path / name)), "t")


@pytest.mark.parametrize("path", ["a\0b.csv", "x" * 5000, "x" * 300 + ".jsonl"])
def test_impossible_paths(path: str) -> None:
    with pytest.raises(LoraFactoryError, match="NUL character, or a name of more than 255 bytes"):
        DataSource(path)


def test_folders_with_brackets_and_saved_ones(tmp_path: Path) -> None:
    cells = ["2024-01-02", "2024-01-03"]
    write(tmp_path / "a [b]" / "train.jsonl", cells)
    source = DataSource(str(tmp_path / "a [b]"), prompt_column="q", completion_column="a")
    assert [row.completion for row in load_examples(source, "t")["train"]] == cells
    datasets.Dataset.from_dict({"text": cells}).save_to_disk(tmp_path / "saved")
    saved = load_examples(DataSource(tmp_path / "saved", max_rows=numpy.int64(1)), "t")["train"]  # type: ignore[arg-type]
    assert [row.completion for row in saved] == cells[:1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.tsv", "a.parquet", "a.txt"])
def test_files_of_examples(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "p", "completion": "007"}, {"prompt": "p", "completion": "b"}]
    expected = [Example(**row) for row in rows]
    if name == "a.txt":
        (tmp_path / name).write_text("\ufeff007\n\nb", encoding="utf-8")
        expected = [Example("", "007"), Example("", "b")]
    elif name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name)
    elif name.endswith("v"):
        sign = "\t" if name == "a.tsv" else ","
        lines = ["prompt,completion", "p,007", "p,b"]
        (tmp_path / name).write_text("\n".join(lines).replace(",", sign))
    else:
        (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    assert read_examples(tmp_path / name) == expected


def coco(folder: Path, names: list[str], file_name: str = "0.png") -> Path:
    (folder / "photos").mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(folder / "photos" / "0.png")
    Image.new("RGB", (9, 9)).save(folder / "secret.png")
    content = {
        "images": [{"id": 0, "file_name": file_name, "width": 9, "height": 9}],
        "annotations": [{"id": n, "image_id": 0, "category_id": n, "bbox": [1, 1, 4, 4]} for n in range(len(names))],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    (folder / "boxes.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    return folder / "boxes.json"


@pytest.mark.parametrize(
    "names", [["猫", "犬"], ["hot dog", "hot_dog"], ["_background_", "cat"], ["a b", "a/b", "A b"]]
)
def test_categories_in_any_script(tmp_path: Path, names: list[str]) -> None:
    found = [task.name for task in detection_tasks(tmp_path / "photos", coco(tmp_path, names))]
    assert len({name.lower() for name in found}) == len(names)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../secret.png", "leads out of"),
        ("/etc/hostname", "leads out of"),
        ("link.png", "is a link to"),
        ("x" * 400, "xxx.*File name too long"),
        ("a\0", "no COCO annotation file"),
        (7, "file_name is '7', not a text"),
    ],
)
def test_images_stay_in_their_folder(tmp_path: Path, name: str, words: str) -> None:
    path = coco(tmp_path, ["cat"], name)
    os.symlink(tmp_path / "secret.png", tmp_path / "photos" / "link.png")
    with pytest.raises(LoraFactoryError, match=words):
        detection_tasks(tmp_path / "photos", path)[0].examples("train")


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, '{"images": 1e999}', '{"categories": [{"id": []}]}'])
def test_hostile_annotations(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(LoraFactoryError, match=r"a\.json"):
        detection_tasks(tmp_path, tmp_path / "a.json")


def test_only_known_image_formats_and_sizes(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(LoraFactoryError, match=r"a\.png"):
        read_image(tmp_path / "a.png")
    Image.new("1", (20_000, 6_000)).save(tmp_path / "wide.png")
    with pytest.raises(LoraFactoryError, match="20000 x 6000 pixels"):
        read_image(tmp_path / "wide.png")


@pytest.mark.parametrize(
    "content",
    [
        b"tasks:\n- {name: a, name: b, descriptions: [c], data: d}",
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n".encode() for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        b"[" * 20_000,
        b"\x89PNG\x00\xff",
    ],
)
def test_hostile_task_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tasks.yaml").write_bytes(content)
    with pytest.raises(LoraFactoryError, match=r"tasks\.yaml"):
        load_tasks(tmp_path / "tasks.yaml")


def test_all_faulty_tasks_are_named(tmp_path: Path) -> None:
    broken = [Task(name, ("d",), DataSource(str(tmp_path / f"{name}.jsonl"))) for name in ("one", "two")]
    with pytest.raises(LoraFactoryError, match=r"(?s)2 tasks.*one.jsonl.*two.jsonl"):
        check_tasks([Task.from_examples("good", ["d"], ["a", "b", "c"]), *broken])


def test_examples_of_a_task_come_as_people_write_them() -> None:
    pair = Example("p", "c")
    for one in ({"prompt": "p", "completion": "c", "id": 3}, ("p", "c"), ["p", "c"], pair):
        assert Task.from_examples("t", "One text.", [one], ["v"], ["t"]).examples("train") == [pair]
    rows = ({"text": text, "id": 3} for text in "abc")
    task = Task.from_examples("t", "One text.", rows)
    assert task.descriptions == ("One text.",)
    assert len(task.examples("train")) == 1
    for wrong in ([1, 2, 3], None, "a text", {"text": "a"}, pair, ["\ud800", "b", "c"], [("a", "b", "c")], [None]):
        with pytest.raises(LoraFactoryError, match="of task 't'"):
            Task.from_examples("t", ["d"], wrong)  # type: ignore[arg-type]


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "data.csv"
    folder.mkdir()
    with pytest.raises(LoraFactoryError, match="the folder must hold files of data"):
        load_examples(DataSource(str(folder)), "t")
    (folder / "part-0.csv").write_text("text\n007\n1.50\n")
    assert [e.completion for e in load_examples(DataSource(str(folder)), "t")["train"]] == ["007", "1.50"]


def test_packed_files_of_a_folder_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as packed:
        packed.writestr("train.csv", "text\n007\n")
    with pytest.raises(LoraFactoryError, match=r"train\.zip .*unpack it"):
        load_examples(DataSource(str(tmp_path)), "t")


def test_a_file_of_examples_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("q,a\n1,2\n")
    for path, words in (
        (tmp_path / "none.jsonl", "is missing; name a file of examples"),
        (tmp_path, "is a folder; name a file of examples"),
        (tmp_path / "rows.csv", "has the columns q, a; examples need a column text, or prompt and completion"),
    ):
        with pytest.raises(LoraFactoryError, match=words):
            read_examples(path)
