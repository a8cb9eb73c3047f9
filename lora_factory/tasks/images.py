"""Image classification tasks: from image folders, from data sets with an image and a label column, or from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from datasets.data_files import SPLIT_KEYWORDS
from PIL import Image

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.image_files import ImageLike, check_image, image_fingerprint, images_in
from lora_factory.tasks.image_sources import RowSource, stored_image
from lora_factory.tasks.text import SPLITS, Split, carve, load_splits, texts_of
from lora_factory.utils.paths import local_path, safe_name

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

TaskKind = TypeVar("TaskKind")
_ROW_FILES = ("dataset_dict.json", "state.json", "metadata.jsonl", "*/metadata.jsonl", "*.parquet", "*/*.parquet")


class LabelledImage(NamedTuple):
    """One example: an image (a file, a file's content or in memory) and the name of its class."""

    image: ImageLike
    label: str


@dataclass(frozen=True)
class ImageTask:
    """Telling images apart: what one LoRA on an image classifier learns.

    Made by `from_examples`, `from_folder` or `from_dataset`; a missing validation or test split is carved out of
    train, a tenth of its rows each, always the same ones.

    Attributes:
        name: Short name, also the name of the task's folder in a zoo.
        descriptions: What the task is, in natural language; at least one.
        shown: Classes whose images tell a generator what the task is, for example ``("yes",)``; all when empty.
        license: Licence of the data, if known.
        dataset: The data set's id on the Hub, if it has one.
    """

    name: str
    descriptions: tuple[str, ...]
    shown: tuple[str, ...] = ()
    license: str | None = None
    dataset: str | None = None
    _examples: dict[Split, list[LabelledImage]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every value at birth."""
        safe_name(self.name)
        if isinstance(self.descriptions, str) or not self.descriptions or not all(map(str.strip, self.descriptions)):
            raise LoraFactoryError(
                f"task {self.name!r}: descriptions={self.descriptions!r} must be texts, one or more"
            )
        found = {example.label for example in self._examples.get("train", ())}
        if len(found) < 2:
            raise LoraFactoryError(
                f"task {self.name!r} has training images of {sorted(found)}; give some of two classes or more"
            )
        if strangers := sorted(set(self.shown) - found):
            raise LoraFactoryError(f"task {self.name!r} shows {strangers}, but has images of {sorted(found)} only")

    @classmethod
    def from_examples(
        cls,
        name: str,
        descriptions: Sequence[str],
        train: Sequence[LabelledImage],
        validation: Sequence[LabelledImage] = (),
        test: Sequence[LabelledImage] = (),
        *,
        shown: Sequence[str] = (),
        license: str | None = None,
    ) -> ImageTask:
        """A task of images with their labels.

        Raises:
            LoraFactoryError: When there is no description, one class only, or too few images to carve a split out of.
        """
        given: dict[Split, list[LabelledImage]] = {
            split: [LabelledImage(*row) for row in rows]
            for split, rows in zip(SPLITS, (train, validation, test), strict=True)
        }
        return cls(name, tuple(descriptions), tuple(shown), license, None, carve(given, name, _same_row, mixed=True))

    @classmethod
    def from_folder(
        cls,
        name: str,
        descriptions: Sequence[str],
        folder: str | Path,
        *,
        shown: Sequence[str] = (),
        license: str | None = None,
    ) -> ImageTask:
        """A task of a folder with one folder per class, or with such a folder for each of train, validation and test.

        Splits go by the names that `datasets` knows, such as val and dev. An image in a folder below a class folder
        is of that class; hidden files and folders are left out.

        Raises:
            LoraFactoryError: When the folder is missing, or a class has no image.
        """
        folder = local_path(folder)
        folders = _folders(folder)
        parts = [[path for path in folders if path.name in names] for names in SPLIT_KEYWORDS.values()]
        if not parts[0] and sum(map(len, parts)) < len(folders):
            parts = [[folder]]  # these are classes, one of which may be called test
        rows = [[row for path in part for row in _labelled(path)] for part in parts]
        return cls.from_examples(name, descriptions, *rows, shown=shown, license=license)

    @classmethod
    def from_dataset(
        cls,
        name: str,
        descriptions: Sequence[str],
        data: Dataset | DatasetDict | Mapping[Split, Dataset],
        *,
        image_column: str = "image",
        label_column: str = "label",
        shown: Sequence[str] = (),
        license: str | None = None,
    ) -> ImageTask:
        """A task of a loaded data set; images stay encoded until they are needed.

        Args:
            name: Short name.
            descriptions: What the task is; at least one sentence.
            data: What `datasets.load_dataset` returns: one split, which is train, or a dictionary of them.
            image_column: Its images.
            label_column: Its labels: texts, or numbers with names.
            shown: Classes whose images tell a generator what the task is; all when empty.
            license: Licence of the data, if known.

        Raises:
            LoraFactoryError: When a column is missing or no image, or an image is.
        """
        parts = data if isinstance(data, Mapping) else {"train": data}
        rows = [_rows(parts[split], image_column, label_column, name) if split in parts else [] for split in SPLITS]
        return cls.from_examples(name, descriptions, *rows, shown=shown, license=license)

    def asking_for(self, positives: Sequence[str]) -> ImageTask:
        """Return a task on these images with the answers "yes" for some classes and "no" for all others.

        Raises:
            LoraFactoryError: When there is no image of a class, or none that is not asked for.
        """
        found = {label for _, label in self.examples("train")}
        if strangers := sorted(set(positives) - found):
            raise LoraFactoryError(
                f"task {self.name!r}: no training image of the class {strangers[0]!r}; choose of {sorted(found)}"
            )
        rows = {
            split: [LabelledImage(image, "yes" if label in positives else "no") for image, label in examples]
            for split, examples in self._examples.items()
        }
        return replace(self, shown=("yes",), _examples=rows)

    def examples(self, split: Split) -> list[LabelledImage]:
        """The labelled images of "train", "validation" or "test"."""
        return self._examples[split]

    def images(self) -> list[ImageLike]:
        """The training images that tell a generator what the task is: those of the classes `shown`."""
        return [image for image, label in self.examples("train") if not self.shown or label in self.shown]

    def fingerprint(self) -> str:
        """SHA-256 of all images and labels of all splits."""
        digest = hashlib.sha256()
        for split in SPLITS:
            rows = (f"{image_fingerprint(image)} {label}\n" for image, label in self.examples(split))
            digest.update(f"{split}\n{''.join(rows)}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageClasses(RowSource):
    """Images with their classes, as a task file has them.

    Attributes:
        path: A folder as `ImageTask.from_folder` takes it, or as in `RowSource`, which has the other attributes; a
            saved data set, Parquet files or a ``metadata.jsonl`` in a folder make it one of rows.
        label_column: A data set's column of classes.
        positives: Classes to answer "yes" for, and "no" for all others; default: every class goes by its name.
    """

    label_column: str = "label"
    positives: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check every value at birth."""
        given = self.positives
        if not isinstance(given, list | tuple) or not all(isinstance(name, str) and name for name in given):
            raise LoraFactoryError(
                f"positives={given!r} must be a list of classes; put each in quotes, since YAML reads yes and no as"
                " true and false"
            )
        super().__post_init__()

    def task(self, name: str, descriptions: Sequence[str], license: str | None = None) -> ImageTask:
        """The task of telling these images apart; files are listed and data sets read now.

        Raises:
            LoraFactoryError: The data cannot be found or read, a column is missing, or a class has no image.
        """
        folder = local_path(self.path)
        if folder.is_dir() and not any(any(folder.glob(name)) for name in _ROW_FILES):
            task = ImageTask.from_folder(name, descriptions, folder, license=license)
        else:
            columns = {"image_column": self.image_column, "label_column": self.label_column}
            parts = load_splits(self.rows, name)
            task = ImageTask.from_dataset(name, descriptions, parts, license=license, **columns)
            task = replace(task, dataset=self.hub_id)
        return task.asking_for(self.positives) if self.positives else task


def check_images(task: ImageTask) -> None:
    """Look at the head of every image file of a task.

    Raises:
        LoraFactoryError: When a file is missing, no image or too large.
    """
    for split in SPLITS:
        for image, _ in task.examples(split):
            if isinstance(image, bytes):
                check_image(image, f"image of {len(image)} bytes of task {task.name!r}")
            elif not isinstance(image, Image.Image):
                check_image(image, str(image))


def language_tasks(tasks: Sequence[TaskKind | ImageTask]) -> list[TaskKind]:
    """Return the tasks, or refuse those for image classifiers: the caller needs a model that writes text.

    Raises:
        LoraFactoryError: One of them is for image classifiers.
    """
    if strangers := [task.name for task in tasks if isinstance(task, ImageTask)]:
        raise LoraFactoryError(
            f"task {strangers[0]!r} is for image classifiers; give tasks whose answers are texts, and score"
            " classifiers by lora_factory.models.classifiers.image_accuracy"
        )
    return [task for task in tasks if not isinstance(task, ImageTask)]


def _labelled(folder: Path) -> list[LabelledImage]:
    """Every image below a folder's class folders."""
    return [LabelledImage(file, path.name) for path in _folders(folder) for file in images_in(path)]


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones, such as .ipynb_checkpoints."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [path for path in found if path.is_dir() and not path.name.startswith(".")]
    if not folders:
        raise LoraFactoryError(f"{folder} has no folders of images; make one folder per class in it")
    return folders


def _same_row(row: LabelledImage) -> Hashable:
    """The key by which rows are equal: the object of an image in memory, and the value of anything else."""
    return (id(row.image) if isinstance(row.image, Image.Image) else row.image, row.label)


def _rows(data: Dataset, image_column: str, label_column: str, task: str) -> list[LabelledImage]:
    """A split's rows, with images as files' contents where the data set holds those."""
    from datasets import Image

    for column in (image_column, label_column):
        if column not in data.column_names:
            raise LoraFactoryError(f"task {task!r}: no column {column!r}; the data set has {data.column_names}")
    if not isinstance(data.features[image_column], Image):
        raise LoraFactoryError(
            f"task {task!r}: column {image_column!r} holds no images; cast it: "
            f"data.cast_column({image_column!r}, datasets.Image())"
        )
    labels = texts_of(data[label_column], data.features[label_column], f"task {task!r}", label_column)
    images = map(stored_image, data.cast_column(image_column, Image(decode=False))[image_column])
    rows = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        if image is None or not label.strip():
            raise LoraFactoryError(f"task {task!r}: row {number} lacks its image or its label; filter such rows out")
        rows.append(LabelledImage(image, label))
    return rows
