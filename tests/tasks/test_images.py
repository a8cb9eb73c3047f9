"""Image tasks from folders and data sets, and their splits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
from helpers.images import brightness_task, picture

from lora_factory.cli.commands import main
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.image_files import read_image
from lora_factory.tasks.images import ImageTask, LabelledImage
from lora_factory.tasks.task_file import load_tasks


def class_folders(folder: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(100 * number + index).save(folder / name / f"{index}.png")
    return folder


def labels(rows: list[LabelledImage]) -> list[str]:
    return sorted(row.label for row in rows)


def test_a_folder_a_class(tmp_path: Path) -> None:
    task = ImageTask.from_folder("pets", ["Cat or dog?"], class_folders(tmp_path, {"cat": 11, "dog": 9}))
    splits = [task.examples(split) for split in ("train", "validation", "test")]
    assert [len(rows) for rows in splits] == [16, 2, 2]
    assert len({row.image for rows in splits for row in rows}) == 20
    assert labels([row for rows in splits for row in rows]) == ["cat"] * 11 + ["dog"] * 9
    assert task.fingerprint() == ImageTask.from_folder("other", ["?"], tmp_path).fingerprint()


def test_folders_of_splits(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 10, "dog": 10})
    class_folders(tmp_path / "test", {"cat": 1, "dog": 2})
    task = ImageTask.from_folder("pets", ["Cat or dog?"], tmp_path, shown=["dog"])
    assert labels(task.examples("test")) == ["cat", "dog", "dog"]
    assert [len(task.examples(split)) for split in ("train", "validation")] == [18, 2]
    assert {Path(image).parent.name for image in task.images()} == {"dog"}


@pytest.mark.parametrize("names", [("train", "val"), ("training", "dev"), ("train", "valid")])
def test_folders_of_splits_by_other_names(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, count in zip(names, (10, 3), strict=True):
        class_folders(tmp_path / name, {"cat": count, "dog": count})
    task = ImageTask.from_folder("pets", ["Cat or dog?"], tmp_path)
    assert {Path(str(image)).parts[-3] for image, _ in task.examples("validation")} == {names[1]}
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [18, 6, 2]


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    class_folders(tmp_path, {"test": 5, "trial": 5})
    task = ImageTask.from_folder("kinds", ["Which?"], tmp_path)
    assert {row.label for row in task.examples("train")} == {"test", "trial"}
    for name in ("val", "test"):
        class_folders(tmp_path / "splits" / name, {"cat": 3, "dog": 3})
    with pytest.raises(LoraFactoryError, match="no training example"):
        ImageTask.from_folder("pets", ["Cat or dog?"], tmp_path / "splits")


def test_images_of_folders_in_a_class_and_hidden_ones(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 3, "cat/persian": 2, "dog": 5, ".ipynb_checkpoints": 2, "dog/.thumbnails": 2})
    task = ImageTask.from_folder("pets", ["Cat or dog?"], tmp_path)
    rows = [row for split in ("train", "validation", "test") for row in task.examples(split)]
    assert labels(rows) == ["cat"] * 5 + ["dog"] * 5


def test_a_class_without_images(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 3, "dog": 0})
    with pytest.raises(LoraFactoryError, match=r"no image in .*dog"):
        ImageTask.from_folder("pets", ["Cat or dog?"], tmp_path)
    with pytest.raises(LoraFactoryError, match="no folders of images"):
        ImageTask.from_folder("pets", ["Cat or dog?"], tmp_path / "cat")
    with pytest.raises(LoraFactoryError, match="no folders of images"):
        ImageTask.from_folder("pets", ["Cat or dog?"], tmp_path / "absent")


def table(count: int = 20) -> datasets.Dataset:
    columns = {"image": [picture(number) for number in range(count)], "label": [number % 2 for number in range(count)]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def test_a_data_set() -> None:
    task = ImageTask.from_dataset("odd", ["Is the number odd?"], table())
    rows = [row for split in ("train", "validation", "test") for row in task.examples(split)]
    found = {read_image(row.image).tobytes(): row.label for row in rows}
    assert found == {picture(number).tobytes(): "yes" if number % 2 else "no" for number in range(20)}
    splits = datasets.DatasetDict({"train": table(), "test": table(4)})
    assert len(ImageTask.from_dataset("odd", ["Odd?"], splits).examples("test")) == 4


def test_a_data_set_with_gaps() -> None:
    with pytest.raises(LoraFactoryError, match=r"no column 'picture'; the data set has \['image', 'label'\]"):
        ImageTask.from_dataset("odd", ["Odd?"], table(), image_column="picture")
    with pytest.raises(LoraFactoryError, match="column 'label' holds no images"):
        ImageTask.from_dataset("odd", ["Odd?"], table(), image_column="label")
    empty = datasets.Dataset.from_dict(
        {"image": [picture(0), None], "label": ["a", "b"]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    with pytest.raises(LoraFactoryError, match="row 1 lacks its image or its label"):
        ImageTask.from_dataset("odd", ["Odd?"], empty)
    unlabelled = datasets.Dataset.from_dict({"image": [picture(0)] * 2, "label": [1, -1]}, features=table().features)
    with pytest.raises(LoraFactoryError, match="row 1 lacks its image or its label"):
        ImageTask.from_dataset("odd", ["Odd?"], unlabelled)


def write_tasks(folder: Path, data: str, **more: str) -> Path:
    entry = "".join(f", {key}: {value}" for key, value in more.items())
    path = folder / "tasks.yaml"
    path.write_text(f"tasks:\n- {{name: pets, descriptions: Tell animals apart., data: {data}{entry}}}\n")
    return path


def test_classes_in_a_task_file(tmp_path: Path) -> None:
    class_folders(tmp_path / "pets", {"cat": 11, "dog": 9, "fox": 10})
    (task,) = load_tasks(write_tasks(tmp_path, "{kind: classes, path: pets}", license="MIT"))
    folder = ImageTask.from_folder("pets", ["Tell animals apart."], tmp_path / "pets", license="MIT")
    assert (task, task.fingerprint()) == (folder, folder.fingerprint())
    (task,) = load_tasks(write_tasks(tmp_path, "{kind: classes, path: pets, positives: [cat, fox]}"))
    rows = [row for split in ("train", "validation", "test") for row in task.examples(split)]
    assert labels(rows) == ["no"] * 9 + ["yes"] * 21
    assert {Path(image).parent.name for image in task.images()} == {"cat", "fox"}


def test_a_data_set_in_a_task_file(tmp_path: Path) -> None:
    table().rename_column("label", "odd").to_parquet(tmp_path / "rows.parquet")
    path = write_tasks(tmp_path, '{kind: classes, path: rows.parquet, label_column: odd, positives: ["yes"]}')
    (task,) = load_tasks(path)
    assert (task.shown, task.dataset) == (("yes",), None)
    assert task.fingerprint() == ImageTask.from_dataset("pets", ["Odd?"], table()).fingerprint()


@pytest.mark.parametrize("layout", ["saved", "saved splits", "Parquet", "metadata"])
def test_a_folder_that_holds_a_data_set(tmp_path: Path, layout: str) -> None:
    rows = tmp_path / "rows"
    if layout == "saved":
        table().save_to_disk(rows)
    elif layout == "saved splits":
        datasets.DatasetDict({"train": table()}).save_to_disk(rows)
    elif layout == "Parquet":
        (rows / "data").mkdir(parents=True)
        table().to_parquet(rows / "data" / "train-00000-of-00001.parquet")
    else:
        class_folders(rows, {"train": 20})
        lines = [{"file_name": f"{number}.png", "label": ["no", "yes"][number % 2]} for number in range(20)]
        (rows / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (task,) = load_tasks(write_tasks(tmp_path, "{kind: classes, path: rows}"))
    found = [row for split in ("train", "validation", "test") for row in task.examples(split)]
    assert {read_image(row.image).tobytes(): row.label for row in found} == {
        picture(number).tobytes(): ["no", "yes"][number % 2] for number in range(20)
    }


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("{kind: classes, path: pets, category: cat}", {}, "unknown key 'category'; choose one of kind, path"),
        ("{kind: classes, path: pets}", {"metric": "exact_match"}, "unknown key 'metric'"),
        ("{kind: classes, path: pets, positives: [yes]}", {}, "put each in quotes, since YAML reads yes"),
        (
            "{kind: classes, path: pets, positives: [cow]}",
            {},
            r"no training image of the class 'cow'; choose of \['ca",
        ),
        ("{kind: classes, path: pets, positives: [cat, dog]}", {}, r"has training images of \['yes'\]"),
        ("{kind: classes, path: absent}", {}, "cannot load data from absent .*there is no such folder"),
        ("{kind: classes, path: ./absent/here}", {}, "no data folder ./absent/here"),
        ("{kind: classes, path: gaps}", {}, "no image in .*dog"),
        ("{kind: classes, path: pets}", {"license": "3"}, "license=3 must be a text"),
    ],
)
def test_wrong_classes_say_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, more: dict[str, str], message: str
) -> None:
    class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    class_folders(tmp_path / "gaps", {"cat": 5, "dog": 0})
    tasks = str(write_tasks(tmp_path, data, **more))
    assert main(["collect", "--tasks", tasks, "--base-model", "a", "--output-dir", "b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_tasks_of_two_kinds_are_given_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    path = write_tasks(tmp_path, "{kind: classes, path: pets}")
    path.write_text(path.read_text() + "- {name: poems, descriptions: Rhyme., data: poems.txt}\n")
    assert main(["collect", "--tasks", str(path), "--base-model", "a", "--output-dir", str(tmp_path / "zoo")]) == 2
    assert "task 'poems' is not for image classifiers as others are" in capsys.readouterr().err


def test_what_writes_takes_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    path = write_tasks(tmp_path, "{kind: classes, path: pets}")
    assert main(["evaluate", "--tasks", str(path), "--adapter", "a"]) == 2
    assert "task 'pets' is for image classifiers" in capsys.readouterr().err


def test_fingerprint_follows_images_and_labels() -> None:
    assert brightness_task("bright", wanted=True).fingerprint() == brightness_task("b", wanted=True).fingerprint()
    assert brightness_task("bright", wanted=True).fingerprint() != brightness_task("dark", wanted=False).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"descriptions": []}, "must be texts, one or more"),
        ({"descriptions": [" "]}, "must be texts, one or more"),
        ({"name": "a/b"}, "a/b"),
        ({"shown": ["maybe"]}, r"shows \['maybe'\], but has images of \['no', 'yes'\]"),
        ({"train": [LabelledImage(picture(number), "no") for number in range(9)]}, r"training images of \['no'\]"),
        ({"train": [LabelledImage(picture(0), "no"), LabelledImage(picture(1), "yes")]}, "too few"),
    ],
)
def test_wrong_tasks(change: dict, message: str) -> None:
    rows = [LabelledImage(picture(number), "yes" if number % 2 else "no") for number in range(10)]
    with pytest.raises(LoraFactoryError, match=message):
        ImageTask.from_examples(**({"name": "task", "descriptions": ["A task."], "train": rows} | change))
