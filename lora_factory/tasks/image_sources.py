"""Sources of images with prompts and answers: detection data in COCO's format, and rows of data sets."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal, Self

import datasets

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.boxes import Box
from lora_factory.tasks.examples import DETECTION_PROMPT, ImageExample, StoredImage
from lora_factory.tasks.text import SPLITS, DataSource, Split, answered, load_splits, texts_of
from lora_factory.utils.paths import local_path
from lora_factory.utils.safe_files import read_json_object, reading

MAX_SIDE = 1_000_000  # pixels; wider than any image that is read
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoSource:
    """One category of a detection data set in COCO's format: only images that show it, with its boxes alone.

    Attributes:
        path: Folder of the images; with a mapping, one for each of "train", "validation" and "test".
        annotations: The JSON file with ``images``, ``annotations`` and ``categories``, or one per split; a single file
            is "train". Boxes of crowds are left out.
        category: The category's name.
        prompt: What the model is asked.
    """

    path: str | Mapping[str, str]
    annotations: str | Mapping[str, str]
    category: str
    prompt: str = DETECTION_PROMPT

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _check_texts(self, "category", "prompt")
        for key in ("path", "annotations"):
            value = getattr(self, key)
            given = value if isinstance(value, Mapping) else {"train": value}
            if not given or not set(given) <= set(SPLITS) or not all(isinstance(v, str) and v for v in given.values()):
                raise LoraFactoryError(f"{key}={value!r} must be a path, or map {', '.join(SPLITS)} to one each")
        if isinstance(self.path, Mapping) and set(self.path) != set(_by_split(self.annotations)):
            raise LoraFactoryError(
                f"path={self.path!r} and annotations={self.annotations!r} must name the same splits"
            )

    @property
    def hub_id(self) -> None:
        """None: the files are local."""

    def relative_to(self, folder: Path) -> CocoSource:
        """Return a copy of this source whose relative paths start at ``folder``."""
        path: str | dict[str, str] = (
            {split: str(folder / name) for split, name in self.path.items()}
            if isinstance(self.path, Mapping)
            else str(folder / self.path)
        )
        files = {split: str(folder / name) for split, name in _by_split(self.annotations).items()}
        return replace(self, path=path, annotations=files)

    def load(self, task: str) -> dict[Split, list[ImageExample]]:
        """The examples of each split that there are annotations for.

        Raises:
            LoraFactoryError: A file is missing or damaged, or no image shows the category.
        """
        files = _by_split(self.annotations)
        return {split: self._split(split, files[split], task) for split in SPLITS if split in files}

    def _split(self, split: Split, file: str, task: str) -> list[ImageExample]:
        coco = read_coco(file)
        folder = local_path(self.path[split] if isinstance(self.path, Mapping) else self.path)
        if self.category not in coco.boxes:
            raise LoraFactoryError(
                f"task {task!r}: {file} has no category {self.category!r}; it has {', '.join(coco.boxes)}"
            )
        examples = []
        for number, boxes in coco.boxes[self.category].items():
            name, size = coco.images[number]
            image = StoredImage.of(_inside(folder, name, task, file))
            examples.append(ImageExample.of_boxes(image, self.category, boxes, size=size, prompt=self.prompt))
        return _with_boxes(examples, f"task {task!r}: {file} has no image with a {self.category!r}")


@dataclass(frozen=True)
class RowSource:
    """A data set with a column of images.

    Attributes:
        path: As in `DataSource`; a folder may hold images with a ``metadata.jsonl`` beside them.
        name: As in `DataSource`, like ``data_files``, ``splits`` and ``revision``.
        image_column: Column of images.
    """

    path: str
    name: str | None = None
    data_files: Mapping[str, Sequence[str]] | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    image_column: str = "image"

    def __post_init__(self) -> None:
        """Check what `DataSource` checks."""
        object.__setattr__(self, "data_files", self.rows.data_files)

    @property
    def rows(self) -> DataSource:
        """The source of the rows."""
        return DataSource(self.path, self.name, self.data_files, self.splits, revision=self.revision)

    @property
    def hub_id(self) -> str | None:
        """The data set's id on the Hub; None for local files and folders."""
        return self.rows.hub_id

    def relative_to(self, folder: Path) -> Self:
        """Return a copy of this source whose relative local paths start at ``folder``."""
        rows = self.rows.relative_to(folder)
        return replace(self, path=rows.path, data_files=rows.data_files)


@dataclass(frozen=True)
class ImageRows(RowSource):
    """Rows of a data set, each with an image and either a prompt and a completion, or objects with boxes.

    Attributes:
        prompt_column: Column of the questions; without it, every row is asked ``prompt``.
        completion_column: Column of the answers, for captions and visual questions.
        category: For detection: the category to find; only rows that show it are taken.
        objects_column: For detection: column with the lists ``bbox`` and ``category`` (or ``categories``).
        box_format: "xywh" (as COCO has it) or "xyxy".
        prompt: What the model is asked where there is no prompt column.
    """

    prompt_column: str | None = None
    completion_column: str | None = None
    category: str | None = None
    objects_column: str = "objects"
    box_format: Literal["xywh", "xyxy"] = "xywh"
    prompt: str = DETECTION_PROMPT

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _check_texts(self, "image_column", "objects_column", "prompt")
        if (self.category is None) == (self.completion_column is None):
            raise LoraFactoryError(
                "give either category, to detect it, or completion_column, for captions and answers"
            )
        if self.box_format not in ("xywh", "xyxy"):
            raise LoraFactoryError(f"box_format={self.box_format!r}: choose xywh or xyxy")
        super().__post_init__()

    def load(self, task: str) -> dict[Split, list[ImageExample]]:
        """The examples of each split that the data set has.

        Raises:
            LoraFactoryError: The data cannot be found or read, a column is missing, or no row has what is asked for.
        """
        return {split: self._split(rows, f"{task}/{split}") for split, rows in load_splits(self.rows, task).items()}

    def _split(self, rows: datasets.Dataset, where: str) -> list[ImageExample]:
        wanted = self.objects_column if self.category else str(self.completion_column)
        for name in filter(None, (self.image_column, wanted, self.prompt_column)):
            if name not in rows.column_names:
                raise LoraFactoryError(
                    f"{where}: no column {name!r} in {self.path}; it has {', '.join(rows.column_names)}"
                )
        try:
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise LoraFactoryError(
                f"{where}: column {self.image_column!r} holds no images ({error}); name one that does by image_column"
            ) from error
        texts = rows.remove_columns([name for name in rows.column_names if name == self.image_column])

        def column(name: str) -> list[str]:
            return texts_of(texts[name], texts.features[name], where, name)

        prompts = column(self.prompt_column) if self.prompt_column else [self.prompt] * len(rows)
        images = [
            StoredImage(f"{where}, image of row {index}", partial(_image_bytes, rows, index, self.image_column, where))
            for index in range(len(rows))
        ]
        if self.category is None:
            return answered(map(ImageExample, images, prompts, column(wanted)), where, wanted)
        shown = [self._boxes(objects, texts.features[self.objects_column], where) for objects in texts[wanted]]
        examples = [
            ImageExample.of_boxes(image, self.category, boxes, prompt=prompt)
            for image, prompt, boxes in zip(images, prompts, shown, strict=True)
            if boxes
        ]
        return _with_boxes(examples, f"{where}: no row of {self.path} shows a {self.category!r}")

    def _boxes(self, objects: Any, feature: Any, where: str) -> list[Box]:  # noqa: ANN401
        """The boxes of the category among a row's objects, which are lists by name, a list of objects or None."""
        try:
            if isinstance(feature, datasets.List):
                feature = {name: datasets.List(kind) for name, kind in feature.feature.items()}
                objects = {name: [one[name] for one in objects or ()] for name in feature}
            key = "category" if "category" in feature else "categories"
            objects = objects or {"bbox": None, key: None}
            names = texts_of(objects[key] or (), feature[key].feature, where, self.objects_column)
            pairs = zip(objects["bbox"] or (), names, strict=True)
            return [_corners(box, self.box_format) for box, name in pairs if name == self.category]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LoraFactoryError(
                f"{where}: column {self.objects_column!r} holds no objects ({type(error).__name__}: {error}); it must"
                " hold the lists bbox, of four numbers each, and category"
            ) from error


@dataclass(frozen=True)
class Coco:
    """A COCO file, sorted by category.

    Attributes:
        images: File name and (width, height) of every image by its id.
        boxes: For every category its images' ids with their boxes; a category without images has none.
    """

    images: Mapping[int, tuple[str, tuple[int, int] | None]]
    boxes: Mapping[str, Mapping[int, list[Box]]]


def read_coco(path: str | Path) -> Coco:
    """Read a COCO annotation file, once for all categories; boxes of crowds are left out.

    Raises:
        LoraFactoryError: No such file, or it is not in COCO's format.
    """
    path = local_path(path)
    with reading(path, "give the JSON file of a COCO data set"):
        found = path.is_file()
    if not found:
        raise LoraFactoryError(f"no annotation file {path}; give the JSON file of a COCO data set")
    return _read_coco(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read_coco(path: Path, modified: int) -> Coco:
    content = read_json_object(path)
    try:
        categories = _by_id(content["categories"], "category")
        names = {key: _text(category["name"], "name") for key, category in categories.items()}
        if doubled := [name for name, count in Counter(names.values()).items() if count > 1]:
            raise ValueError(f"two categories are called {doubled[0]!r}")
        images = {
            key: (_text(image["file_name"], "file_name"), _size(image))
            for key, image in _by_id(content["images"], "image").items()
        }
        boxes: dict[str, dict[int, list[Box]]] = {name: {} for name in names.values()}
        for entry in content["annotations"]:
            if not entry.get("iscrowd"):
                images[entry["image_id"]]  # a KeyError where the file names no such image
                box = _corners(_numbers(entry["bbox"]), "xywh")
                boxes[names[entry["category_id"]]].setdefault(entry["image_id"], []).append(box)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise LoraFactoryError(
            f"{path} is no COCO annotation file ({type(error).__name__}: {str(error)[:300]}); it must hold images,"
            " annotations with bbox, and categories that refer to each other"
        ) from error
    return Coco(images, boxes)


def _by_id(entries: list[dict[str, Any]], what: str) -> dict[Any, dict[str, Any]]:
    found = {entry["id"]: entry for entry in entries}
    if len(found) < len(entries):
        doubled = next(key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1)
        raise ValueError(f"the {what} id {doubled!r} stands twice")
    return found


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise TypeError(f"{what} is {str(value)[:60]!r}, not a text")
    value.encode()  # a ValueError for half of a surrogate pair
    return value


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    if not width or not height:
        return None
    if not all(
        type(length) in (int, float) and 0 < length <= MAX_SIDE and length == int(length) for length in (width, height)
    ):
        raise ValueError(f"an image of {str(width)[:30]} x {str(height)[:30]} pixels")
    return int(width), int(height)


def _numbers(box: Any) -> list[float]:  # noqa: ANN401
    if not isinstance(box, list) or not all(type(value) in (int, float) and math.isfinite(value) for value in box):
        raise ValueError(f"the box {str(box)[:80]} must be four finite numbers")
    return [float(value) if abs(value) > MAX_SIDE else value for value in box]


def _inside(folder: Path, name: str, task: str, file: str) -> Path:
    """The image file of a name that stands in an annotation file, which may not lead out of the folder."""
    pure = PurePath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or PureWindowsPath(name).drive:
        raise LoraFactoryError(f"task {task!r}: {file} names the image {name[:200]!r}, which leads out of {folder}")
    with reading(folder / name[:200], f"check the folder of images that {file} belongs to"):
        path = folder / name
        if not path.is_file():
            raise LoraFactoryError(f"task {task!r}: no image {path}, which {file} names; check the folder")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise LoraFactoryError(f"task {task!r}: {path} is a link to {path.resolve()}, outside of {folder}")
    return path


def stored_image(value: Mapping[str, Any] | None) -> bytes | str | None:
    """The content of a data set's image that is not decoded, or its file; None when it is missing."""
    return (value["bytes"] or value["path"] or None) if value else None


def _image_bytes(rows: datasets.Dataset, index: int, column: str, where: str) -> bytes:
    image = stored_image(rows[index][column])
    if image is None:
        raise LoraFactoryError(f"{where}: row {index} lacks its image; filter such rows out")
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _corners(box: Sequence[float], form: str) -> Box:
    first, second, third, fourth = box
    return Box(first, second, third, fourth) if form == "xyxy" else Box(first, second, first + third, second + fourth)


def _with_boxes(examples: list[ImageExample], otherwise: str) -> list[ImageExample]:
    """The examples that show something; those whose boxes are all empty or outside are left out with a warning."""
    kept = [example for example in examples if example.boxes]
    if not kept:
        raise LoraFactoryError(f"{otherwise} that has a box of some area inside it; choose another category")
    if len(kept) < len(examples):
        _LOGGER.warning(
            "%d of %d images have no box inside them, and are left out", len(examples) - len(kept), len(examples)
        )
    return kept


def _by_split(value: str | Mapping[str, str]) -> Mapping[str, str]:
    return value if isinstance(value, Mapping) else {"train": value}


def _check_texts(source: object, *names: str) -> None:
    for name in names:
        value = getattr(source, name)
        if not (isinstance(value, str) and value.strip()):
            raise LoraFactoryError(f"{name}={value!r} of a data source must be a text that is not empty")
