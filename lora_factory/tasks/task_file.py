"""Tasks: a name, descriptions in natural language and a data set, read from YAML or JSON task files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.coco_tasks import DESCRIPTIONS, detection_tasks
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.image_sources import CocoSource, ImageRows
from lora_factory.tasks.images import ImageClasses, ImageTask, check_images
from lora_factory.tasks.task import Task
from lora_factory.tasks.text import LOCAL_FORMATS, SPLITS, DataSource
from lora_factory.utils.files import write_json, write_text
from lora_factory.utils.folders import check_task_file
from lora_factory.utils.paths import local_path
from lora_factory.utils.printable import meant
from lora_factory.utils.yaml_files import read_values

SOURCES: dict[str, type[DataSource | CocoSource | ImageRows | ImageClasses]] = {
    "text": DataSource,
    "coco": CocoSource,
    "images": ImageRows,
    "classes": ImageClasses,
}
_KEYS = ("name", "descriptions", "data", "license", "metric", "choices")
_TASK_FILE_ENDINGS = (".yaml", ".yml", ".json")
_TASK_FILE_EXAMPLE = """\
tasks:
  - name: poems
    descriptions: [Continue a rhymed poem about nature.]
    data: {path: poems.jsonl, text_column: text}"""


def load_tasks(path: str | Path) -> list[Task | ImageTask]:
    """Read tasks from a YAML or JSON file, or from every such file of a folder; data is loaded later, on first use.

    A task file holds `tasks:`, a list of mappings with the fields of `Task`; `data` is a mapping with the fields of
    `DataSource`, or just its path; with `kind: coco` or `kind: images` those of `CocoSource` or `ImageRows`; with
    `kind: classes` those of `ImageClasses`, for an `ImageTask`, whose images are listed at once. `kind: coco` without
    a category, in a task without a name, is a task for every category, which `{}` in the descriptions stands for.
    Local paths are relative to the task file.

    Args:
        path: The task file, or a folder whose .yaml, .yml and .json files are all read, in the order of their names.

    Raises:
        LoraFactoryError: No such file, nothing in it, or a task that is incomplete; the message says what to write.
    """
    path = local_path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _TASK_FILE_ENDINGS and file.is_file())
        if not files:
            raise LoraFactoryError(
                f"folder {path} has no task file (.yaml, .yml or .json); write one:\n{_TASK_FILE_EXAMPLE}"
            )
    elif path.is_file():
        files = [path]
    else:
        raise LoraFactoryError(
            f"no task file {path}; give an existing .yaml or .json file, for example:\n{_TASK_FILE_EXAMPLE}"
        )
    tasks = [task for file in files for task in _read_task_file(file)]
    if duplicates := sorted(name for name, count in Counter(task.name for task in tasks).items() if count > 1):
        raise LoraFactoryError(
            f"task name {duplicates[0]!r} is used more than once in {path}; give each task its own name"
        )
    return tasks


def as_tasks(tasks: str | Path | Task | ImageTask | Sequence[Task | ImageTask]) -> list[Task | ImageTask]:
    """A user's tasks as a list, whatever they come in: a task file, a folder of them, one task or several.

    Raises:
        LoraFactoryError: When there is none, or as `load_tasks`.
    """
    if isinstance(tasks, Task | ImageTask):
        return [tasks]
    tasks = load_tasks(tasks) if isinstance(tasks, str | Path) else list(tasks)
    if not tasks:
        raise LoraFactoryError("tasks is empty; give at least one task, or a task file that holds one")
    return tasks


def save_tasks(tasks: Sequence[Task], path: str | Path) -> None:
    """Write a task file that `load_tasks` reads.

    Examples that live in memory are written next to it, as `<task>/<split>.jsonl`. Local files beside or below the
    task file are named relative to it, so that the folder can move.

    Args:
        tasks: The tasks, in order.
        path: The file to write, .yaml, .yml or .json.

    Raises:
        LoraFactoryError: Another file ending, or a file that is there and was not written by this function.
    """
    path = local_path(path)
    if path.suffix.lower() not in _TASK_FILE_ENDINGS:
        raise LoraFactoryError(f"task file {path} must end in {', '.join(_TASK_FILE_ENDINGS)}")
    examples = [path.parent / task.name / f"{split}.jsonl" for task in tasks if task.data is None for split in SPLITS]
    check_task_file(path, examples)
    content = {"tasks": [_task_to_dict(task, path.parent) for task in tasks]}
    if path.suffix.lower() == ".json":
        write_json(path, content)
    else:
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def _read_task_file(path: Path) -> list[Task | ImageTask]:
    content = read_values(path, "task file")
    if not content:
        raise LoraFactoryError(
            f"task file {path} is empty; write at least one task, for example:\n{_TASK_FILE_EXAMPLE}"
        )
    if not isinstance(content, Mapping) or set(content) != {"tasks"} or not isinstance(content["tasks"], list):
        raise LoraFactoryError(f"task file {path} must hold one list called tasks, for example:\n{_TASK_FILE_EXAMPLE}")
    if not content["tasks"]:
        raise LoraFactoryError(
            f"task file {path} lists no tasks; write at least one, for example:\n{_TASK_FILE_EXAMPLE}"
        )
    return [task for number, entry in enumerate(content["tasks"], 1) for task in _tasks_of(entry, path, number)]


def check_tasks(tasks: Iterable[Any], read: Callable[[Any], object] | None = None) -> None:
    """Read the data of all tasks, so that a fault in the last is found before the first run trains.

    Args:
        tasks: The tasks.
        read: Does with a task what is to be tried. By default the files, columns and splits are read and kept; an
            image file must exist and name its size.

    Raises:
        LoraFactoryError: Names every task whose data cannot be used, each with its reason.
    """
    faults = {}
    for task in tasks:
        try:
            (read or _read_data)(task)
        except LoraFactoryError as error:
            faults[task.name] = str(error)
    if len(faults) == 1:
        raise LoraFactoryError(f"task {next(iter(faults))!r} cannot be used: {next(iter(faults.values()))}")
    if faults:
        reasons = "\n".join(f"- {name}: {reason}" for name, reason in faults.items())
        raise LoraFactoryError(f"the data of {len(faults)} tasks cannot be used:\n{reasons}")


def _read_data(task: Task | ImageTask) -> None:
    if not isinstance(task, Task):
        check_images(task)
        return
    for split in SPLITS:
        for example in task.examples(split):
            if isinstance(example, ImageExample):
                _ = example.image.size


def _tasks_of(entry: object, path: Path, number: int) -> Sequence[Task | ImageTask]:
    where = f"task file {path}, task {number}"
    values = _checked(entry, _KEYS, where)
    is_coco = isinstance(values.get("data"), Mapping) and values["data"].get("kind") == "coco"
    every_category = is_coco and "name" not in values and "category" not in values["data"]
    if missing := [key for key in ("name", "data") if key not in values and not every_category]:
        raise LoraFactoryError(
            f"{where} has no {missing[0]}; a task needs name, descriptions and data:\n{_TASK_FILE_EXAMPLE}"
        )
    source = {"path": values["data"]} if isinstance(values["data"], str) else values["data"]
    kind = str(source.get("kind", "text")) if isinstance(source, Mapping) else "text"
    if kind not in SOURCES:
        raise LoraFactoryError(f"data of {where}: kind={kind!r}: choose one of {', '.join(SOURCES)}")
    options = _checked(source, ("kind", *(f.name for f in fields(SOURCES[kind]))), f"data of {where}")
    if "path" not in options:
        raise LoraFactoryError(f"data of {where} has no path; give a Hub id, a local file, or json with data_files")
    if every_category:
        options["category"] = "{}"
    if every_category or kind == "classes":
        _checked(values, ("name", "descriptions", "data", "license"), f"{where} (kind {kind})")
    try:
        data = _source(kind, options).relative_to(path.resolve().parent)
        if isinstance(data, ImageClasses):
            checked = Task(**{"descriptions": (), **values, "data": None})
            return [data.task(checked.name, checked.descriptions, checked.license)]
        if every_category and isinstance(data, CocoSource):
            return _tasks_of_categories(data, values)
        return [Task(**{"descriptions": (), **values, "data": data})]
    except LoraFactoryError as error:
        raise LoraFactoryError(f"{where}: {error}") from error


def _tasks_of_categories(source: CocoSource, values: Mapping[str, Any]) -> list[Task]:
    checked = Task(**{"name": "category", "descriptions": DESCRIPTIONS, **values, "data": None})
    more: Any = {"descriptions": checked.descriptions, "prompt": source.prompt, "license": checked.license}
    return detection_tasks(source.path, source.annotations, **more)


def _source(kind: str, options: Mapping[str, Any]) -> DataSource | CocoSource | ImageRows | ImageClasses:
    values = {name: value for name, value in options.items() if name != "kind"}
    required = [f.name for f in fields(SOURCES[kind]) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise LoraFactoryError(f"data of kind {kind!r} needs {missing[0]}; give {', '.join(required)}")
    return SOURCES[kind](**values)


def _checked(value: object, known: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise LoraFactoryError(f"{where} is {value!r}; it must be a mapping with the keys {', '.join(known)}")
    if unknown := sorted(str(key) for key in value if key not in known):
        raise LoraFactoryError(f"{where} has the unknown key {unknown[0]!r}{meant(unknown[0], known)}")
    return dict(value)


def _task_to_dict(task: Task, folder: Path) -> dict[str, Any]:
    data = task.data
    if data is None and task.has_images:
        raise LoraFactoryError(
            f"task {task.name!r} holds images in memory, which no task file can; make it of files, for example with"
            " lora_factory.tasks.coco_tasks.detection_tasks"
        )
    if data is None:
        data = DataSource("json", data_files={split: [str(folder / task.name / f"{split}.jsonl")] for split in SPLITS})
        if any(example.prompt for split in SPLITS for example in task.examples(split)):
            data = replace(data, text_column=None, prompt_column="prompt", completion_column="completion")
        for split in SPLITS:
            _write_examples(folder / task.name / f"{split}.jsonl", task.examples(split), data)
    source: dict[str, Any] = {f.name: getattr(data, f.name) for f in fields(data) if getattr(data, f.name)}
    if isinstance(data, CocoSource):
        source |= {"kind": "coco"} | {key: _relative_all(source[key], folder) for key in ("path", "annotations")}
    elif data.path in LOCAL_FORMATS and data.data_files:
        files = data.data_files.items()
        source["data_files"] = {split: [_relative(name, folder) for name in names] for split, names in files}
    else:
        source["path"] = _relative(data.path, folder)
    if isinstance(data, ImageRows):
        source["kind"] = "images"
    content = {
        "name": task.name,
        "descriptions": list(task.descriptions),
        "license": task.license,
        "metric": task.metric,
        "choices": list(task.choices) or None,
        "data": source,
    }
    return {key: value for key, value in content.items() if value is not None}


def _write_examples(path: Path, examples: Sequence[Example], data: DataSource) -> None:
    rows = ({"text": e.completion} if data.text_column else e._asdict() for e in examples)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _relative(name: str, folder: Path) -> str:
    file, folder = Path(name).resolve(), folder.resolve()
    return file.relative_to(folder).as_posix() if file.exists() and file.is_relative_to(folder) else name


def _relative_all(names: str | Mapping[str, str], folder: Path) -> str | dict[str, str]:
    if isinstance(names, str):
        return _relative(names, folder)
    return {split: _relative(name, folder) for split, name in names.items()}
