"""Tasks: a name, descriptions in natural language and a data set, read from YAML or JSON task files."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lora_factory.data_source import LOCAL_FORMATS, SPLITS, DataSource, Example, Split, load_examples, with_text
from lora_factory.errors import LoraFactoryError
from lora_factory.files import safe_name, write_json, write_text
from lora_factory.folders import check_task_file
from lora_factory.given import read_example
from lora_factory.image_data import ImageExample, as_example
from lora_factory.image_sources import CocoSource, ImageRows
from lora_factory.image_tasks import ImageClasses, ImageTask, check_images
from lora_factory.safe_files import MAX_CONFIG_BYTES, check_size, reading

__all__ = ["METRICS", "SPLITS", "DataSource", "Example", "Split", "Task", "check_tasks", "load_tasks", "save_tasks"]

METRICS = ("exact_match", "multiple_choice")
SOURCES: dict[str, type[DataSource | CocoSource | ImageRows | ImageClasses]] = {
    "text": DataSource,
    "coco": CocoSource,
    "images": ImageRows,
    "classes": ImageClasses,
}
MAX_CHOICES_FOUND = 20
_KEYS = ("name", "descriptions", "data", "license", "metric", "choices")
_MAX_VALUES = 1_000_000  # 10 000 tasks of 100 lines
_TASK_FILE_ENDINGS = (".yaml", ".yml", ".json")
_TASK_FILE_EXAMPLE = """\
tasks:
  - name: poems
    descriptions: [Continue a rhymed poem about nature.]
    data: {path: poems.jsonl, text_column: text}"""


@dataclass(frozen=True)
class Task:
    """One thing that an adapter learns.

    Attributes:
        name: Short name, also the name of the task's folder in a zoo.
        descriptions: What the task is, in natural language; at least one, better several paraphrases.
        data: Where the examples come from, texts or images; None when they were given to `from_examples`.
        license: Licence of the data, if known.
        metric: How an answer is judged, beside its likelihood: "exact_match", "multiple_choice" or not at all.
        choices: The answers to choose from with "multiple_choice"; default: the completions seen in training.
    """

    name: str
    descriptions: tuple[str, ...]
    data: DataSource | CocoSource | ImageRows | None
    license: str | None = None
    metric: str | None = None
    choices: tuple[str, ...] = ()
    _examples: dict[Split, list[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every value at birth; a single description may come as a text."""
        if not isinstance(self.name, str):
            raise LoraFactoryError(f"name={self.name!r} of a task must be a text; put it in quotes")
        safe_name(self.name)
        given = (self.descriptions,) if isinstance(self.descriptions, str) else self.descriptions
        if not given:
            raise LoraFactoryError(
                f"task {self.name!r} has no descriptions; say in a sentence or more what its text is, for example"
                " descriptions: [Continue a rhymed poem about nature.]"
            )
        if not isinstance(given, Sequence) or not all(isinstance(text, str) and text.strip() for text in given):
            raise LoraFactoryError(f"task {self.name!r}: descriptions={given!r} must be texts that are not empty")
        if not isinstance(self.license, str | None):
            raise LoraFactoryError(f"task {self.name!r}: license={self.license!r} must be a text; put it in quotes")
        object.__setattr__(self, "descriptions", tuple(text.strip() for text in given))
        if self.metric is not None and self.metric not in METRICS:
            raise LoraFactoryError(
                f"task {self.name!r}: metric={self.metric!r}: choose one of {', '.join(METRICS)}, or leave it out"
            )
        object.__setattr__(self, "choices", _checked_choices(self.choices, self.metric, self.name))

    @classmethod
    def from_examples(
        cls,
        name: str,
        descriptions: tuple[str, ...] | list[str],
        train: Sequence[Example | ImageExample | str],
        validation: Sequence[Example | ImageExample | str] = (),
        test: Sequence[Example | ImageExample | str] = (),
        *,
        license: str | None = None,
        metric: str | None = None,
        choices: tuple[str, ...] = (),
    ) -> Task:
        """A task whose examples are already in memory; texts become examples with an empty prompt.

        Args:
            name: Short name.
            descriptions: What the task is; at least one sentence.
            train: Examples to learn from.
            validation: Examples for choosing; carved out of `train` when empty.
            test: Examples for the final evaluation; carved out of `train` when empty.
            license: Licence of the data, if known.
            metric: "exact_match" or "multiple_choice", if answers are right or wrong.
            choices: The answers to choose from with "multiple_choice"; default: the completions seen in training.

        Raises:
            LoraFactoryError: No description, a bad name, metric or choices, or no example with text.
        """
        several = descriptions if isinstance(descriptions, str) else tuple(descriptions)
        task = cls(name, several, None, license, metric, choices)
        given = dict(zip(SPLITS, (train, validation, test), strict=True))
        found: dict[Split, list[Any]] = {}
        for split, examples in given.items():
            if isinstance(examples, str | bytes | Mapping | Example | ImageExample) or not isinstance(
                examples, Iterable
            ):
                raise LoraFactoryError(f"{split}={str(examples)[:80]!r} of task {name!r} must be a list of examples")
            nouns = (f"{split} example {number} of task {name!r}" for number in itertools.count())
            if read := [as_example(read_example(one, noun)) for one, noun in zip(examples, nouns, strict=False)]:
                found[split] = with_text(read)
        task._examples.update(_complete(found, name))
        return task

    @property
    def dataset(self) -> str | None:
        """The id on the Hub of the data set that the examples come from; None for local and given ones."""
        return self.data.hub_id if self.data else None

    def examples(self, split: Split) -> list[Any]:
        """The examples of one split (`Example` or `ImageExample`), loaded on first use; none is without an answer.

        A missing validation or test split is carved out of train, a tenth of its rows each, always the same ones;
        equal rows stay on one side.

        Args:
            split: "train", "validation" or "test".

        Raises:
            LoraFactoryError: The data cannot be found or read, a column is missing, or a split has no text.
        """
        if split not in SPLITS:
            raise LoraFactoryError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
        if not self._examples and self.data is not None:
            found: Mapping[Split, list[Any]]
            if isinstance(self.data, DataSource):
                found = load_examples(self.data, self.name)
            else:
                found = self.data.load(self.name)
            self._examples.update(_complete(found, self.name))
        return self._examples[split]

    @property
    def has_images(self) -> bool:
        """Whether the examples are images with prompt and answer."""
        if self.data is None:
            return isinstance(self._examples["train"][0], ImageExample)
        return not isinstance(self.data, DataSource)

    def answer_choices(self) -> tuple[str, ...]:
        """The answers to choose from: those given, else the different completions of the training split, sorted.

        Raises:
            LoraFactoryError: None are given, and the training split has fewer than 2 or more than 20 of them.
        """
        if self.choices:
            return self.choices
        found = sorted({example.completion.strip() for example in self.examples("train")})
        if not 2 <= len(found) <= MAX_CHOICES_FOUND:
            raise LoraFactoryError(
                f"task {self.name!r} has no choices, and its training split has {len(found)} different completions,"
                f" which are choices only when there are 2 to {MAX_CHOICES_FOUND}; list its choices, or take"
                ' metric="exact_match"'
            )
        return tuple(found)

    def fingerprint(self) -> str:
        """SHA-256 of all examples of all splits: equal exactly when the data is."""
        digest = hashlib.sha256()
        for split in SPLITS:
            facts = json.dumps([split, self.examples(split)], ensure_ascii=True, default=ImageExample.facts)
            digest.update(facts.encode())
        return digest.hexdigest()


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
    path = Path(path).expanduser()
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
    names = [task.name for task in tasks]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise LoraFactoryError(
            f"task name {duplicates[0]!r} is used more than once in {path}; give each task its own name"
        )
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
    path = Path(path).expanduser()
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
    with reading(path, "write a task file of YAML or JSON in UTF-8"):
        check_size(f"task file {path}", path.stat().st_size, MAX_CONFIG_BYTES)
        text = path.read_text(encoding="utf-8-sig")
        try:
            is_json = path.suffix.lower() == ".json" and text.strip()
            content = json.loads(text, object_pairs_hook=_mapping) if is_json else yaml.load(text, _TaskLoader)
            _check_length(content, str(path))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise LoraFactoryError(f"task file {path} is not valid YAML or JSON: {error}") from error
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


class _TaskLoader(yaml.SafeLoader):
    """YAML of plain values, in which no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice, of which PyYAML keeps the last without a word."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the key {doubled[0]!r} stands twice")
    return dict(pairs)


def _check_length(content: object, path: str) -> None:
    """Refuse aliases that blow a small file up, before anything walks through or prints what it holds."""
    left, count = [content], 0
    while left:
        value = left.pop()
        count += 1
        if count > _MAX_VALUES:
            raise LoraFactoryError(f"task file {path} holds more than {_MAX_VALUES:,} values; write several files")
        left += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []


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
    from lora_factory.detection import DESCRIPTIONS, detection_tasks  # it imports this module

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
        raise LoraFactoryError(f"{where} has the unknown key {unknown[0]!r}; the known ones are {', '.join(known)}")
    return dict(value)


def _task_to_dict(task: Task, folder: Path) -> dict[str, Any]:
    data = task.data
    if data is None and task.has_images:
        raise LoraFactoryError(
            f"task {task.name!r} holds images in memory, which no task file can; make it of files, for example with"
            " lora_factory.detection.detection_tasks"
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


def _checked_choices(given: object, metric: str | None, task: str) -> tuple[str, ...]:
    """The choices without the blanks around them."""
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) and text.strip() for text in given):
        raise LoraFactoryError(
            f"task {task!r}: choices={given!r} must be a list of texts that are not empty; put each in quotes, since"
            " YAML reads yes and no as true and false"
        )
    choices = tuple(text.strip() for text in given)
    if choices and metric != "multiple_choice":
        raise LoraFactoryError(f"task {task!r} has choices, but metric={metric!r}; write metric: multiple_choice")
    if len(choices) == 1 or len(set(choices)) < len(choices):
        raise LoraFactoryError(f"task {task!r}: choices={choices!r} must be two or more, all different")
    return choices


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


def _complete(found: Mapping[Split, list[Any]], task: str) -> dict[Split, list[Any]]:
    """All three splits: those found, the missing ones carved out of train."""
    complete = {split: found[split] for split in SPLITS if found.get(split)}
    missing = [split for split in SPLITS if split not in complete]
    if "train" in missing:
        raise LoraFactoryError(f"task {task!r} has no training text; give at least one example that is not empty")
    distinct = list(dict.fromkeys(complete["train"]))
    if missing and len(distinct) < len(missing) + 1:
        raise LoraFactoryError(
            f"task {task!r} has {len(distinct)} different training rows, too few to carve out {' and '.join(missing)};"
            " give these splits, or more rows"
        )
    random.Random(0).shuffle(distinct)
    share = max(1, len(distinct) // 10)
    for number, split in enumerate(missing):
        carved = set(distinct[number * share : (number + 1) * share])
        complete[split] = [example for example in complete["train"] if example in carved]
    held_out = {example for split in missing for example in complete[split]}
    complete["train"] = [example for example in complete["train"] if example not in held_out]
    return complete
