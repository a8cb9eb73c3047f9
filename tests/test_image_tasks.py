"""Image tasks from folders and data sets, and their splits."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from image_fixtures import brightness_task, picture

from lora_factory.errors import LoraFactoryError
from lora_factory.image_tasks import ImageTask, LabelledImage
from lora_factory.images import read_image


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
