"""Data sources: which data set, files and columns hold a task's examples, on the Hub or on this machine."""

from __future__ import annotations

import glob
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy
from datasets.data_files import DataFilesDict, get_data_patterns
from pyarrow import parquet  # type: ignore[import-untyped]

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.local_rows import as_text, format_of, read_paragraphs, read_rows, separator_hint
from lora_factory.utils.paths import local_path
from lora_factory.utils.safe_files import reading

Split = Literal["train", "validation", "test"]
Rows = Any  # datasets.Dataset, or datasets.IterableDataset when streaming; both come untyped
Row = TypeVar("Row")
Answered = TypeVar("Answered", Example, ImageExample)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_ROW_FORMATS = ("json", "csv", "parquet")
LOCAL_FORMATS = (*_ROW_FORMATS, "text")
_OWN_FORMATS = ("json", "csv", "text")  # read by `read_rows`: the readers of `datasets` guess types and change cells


@dataclass(frozen=True)
class DataSource:
    """A source of text examples: files or a data set of the Hub, and the columns that hold the text.

    Attributes:
        path: A data set's id on the Hub, a local folder of data files of one format or one that `Dataset.save_to_disk`
            wrote, a local file (.json, .jsonl, .ndjson, .csv, .tsv or .txt, all also with .gz behind, or .parquet), or
            "json", "csv", "parquet" or "text" with `data_files`. Each line of a text file is an example.
        name: The data set's configuration on the Hub.
        data_files: File names or patterns, per split of the source. A bare name stands for a list of one, and
            without a split it means "train". Of a data set on the Hub or a folder of data files they are in it.
        splits: For each of "train", "validation" and "test", the source's split; default: the split of the same name.
            With the Hub, slices such as "train[:1000]" work.
        text_column: Column of plain text; "text" unless `prompt_column` and `completion_column` are given.
        prompt_column: Column of the text that is read but not learned.
        completion_column: Column of the text that is learned.
        revision: Branch, tag or commit on the Hub.
        streaming: Read rows one by one, and download no more than these, instead of the whole data set first; needs
            `max_rows`.
        max_rows: How many of the first rows of every split are read; default: all.
    """

    path: str
    name: str | None = None
    data_files: Mapping[str, Sequence[str]] | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        """Check every value at birth and fill in the default text column."""
        object.__setattr__(self, "path", os.fspath(self.path) if isinstance(self.path, os.PathLike) else self.path)
        if isinstance(self.max_rows, numpy.integer):
            object.__setattr__(self, "max_rows", int(self.max_rows))
        for key in ("path", "name", "text_column", "prompt_column", "completion_column", "revision"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value.strip()) and not (value is None and key != "path"):
                raise LoraFactoryError(
                    f"{key}={value!r} of a data source must be a text that is not empty; put it in quotes"
                )
        local_path(self.path)  # refuses what no file system takes, before anything looks for it
        if (self.prompt_column is None) != (self.completion_column is None):
            raise LoraFactoryError("prompt_column and completion_column go together: give both, or text_column alone")
        if self.text_column is None and self.prompt_column is None:
            object.__setattr__(self, "text_column", "text")
        elif self.text_column is not None and self.prompt_column is not None:
            raise LoraFactoryError("give either text_column or prompt_column and completion_column, not all three")
        splits = self.splits
        named = isinstance(splits, Mapping) and all(isinstance(name, str) and name for name in splits.values())
        if not named or not set(splits) <= set(SPLITS):
            raise LoraFactoryError(f"splits={splits!r} must map {', '.join(SPLITS)} to the source's split names")
        if self.data_files is not None:
            object.__setattr__(self, "data_files", _files_of_splits(self.data_files))
        if self.max_rows is not None and (type(self.max_rows) is not int or not 1 <= self.max_rows <= sys.maxsize):
            raise LoraFactoryError(
                f"max_rows={self.max_rows!r} of a data source must be a number of rows from 1 to {sys.maxsize}; leave "
                "it out for all"
            )
        if not isinstance(self.streaming, bool) or (self.streaming and self.max_rows is None):
            raise LoraFactoryError(
                f"streaming={self.streaming!r} must be true or false, and true needs max_rows, for example "
                "streaming: true, max_rows: 20000"
            )
        if self.path in LOCAL_FORMATS and not self.data_files:
            raise LoraFactoryError(
                f"path={self.path!r} needs data_files, for example data_files: {{train: train.{self.path}}}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read: one of plain text, or prompt and completion."""
        return tuple(c for c in (self.text_column, self.prompt_column, self.completion_column) if c is not None)

    @property
    def format(self) -> str | None:
        """The format of local files, None for a local folder and for the Hub."""
        if self.path in LOCAL_FORMATS:
            return self.path
        return None if Path(self.path).expanduser().is_dir() else format_of(self.path)

    @property
    def hub_id(self) -> str | None:
        """The data set's id on the Hub; None for local files and folders, which have no public name."""
        return None if self.format is not None or Path(self.path).expanduser().is_dir() else self.path

    def load(self, task: str) -> dict[Split, list[Example]]:
        """The examples of each split; see `load_examples`."""
        return load_examples(self, task)

    def local_files(self) -> dict[str, list[str]]:
        """The existing local files per split of the source, patterns resolved and sorted.

        Raises:
            LoraFactoryError: A file does not exist or is empty.
        """
        patterns = self.data_files if self.path in LOCAL_FORMATS and self.data_files else {"train": [self.path]}
        return {
            split: [file for pattern in given for file in _matching_files(pattern)]
            for split, given in patterns.items()
        }

    def relative_to(self, folder: Path) -> DataSource:
        """Return a copy of this source whose relative local paths start at `folder`; Hub ids stay as they are."""
        if self.path in LOCAL_FORMATS:
            files = (self.data_files or {}).items()
            return replace(
                self, data_files={split: [_below(folder, name) for name in given] for split, given in files}
            )
        is_local = self.format is not None or (folder / self.path).is_dir()
        return replace(self, path=_below(folder, self.path)) if is_local else self


def load_examples(source: DataSource, task: str) -> dict[Split, list[Example]]:
    """Load the splits that a source has; rows without text are left out.

    Args:
        source: Where the rows come from and which columns hold text.
        task: The task's name, for error messages.

    Raises:
        LoraFactoryError: The data cannot be found or read, there is no split to learn from, a column is missing, or a
            split has no text.
    """
    found = _own_files(source, task)
    if found is None:
        splits: dict[Split, list[Example]] = {}
        for split, rows in load_splits(source, task).items():
            with _teaching_errors(source, task):
                first = _first_rows(rows, source)
            splits[split] = _read_rows(first, source, f"{task}/{split}")
        return splits
    form, files = found
    return {
        split: _examples_of(_rows_of(names, form, source, task), source, f"{task}/{split}")
        for split, names in _choose_splits(files, source, task).items()
    }


def read_examples(path: str | Path) -> list[Example]:
    """Read a file of examples of one task.

    Rows of JSON Lines, JSON, CSV, TSV and Parquet files hold a column `text`, or `prompt` and `completion`. A text
    file holds an example in each paragraph, since a blank line, unlike a line's end, may not stand in an example.

    Args:
        path: The file; all formats but Parquet may be packed with gzip, and then end in ``.gz`` as well.

    Raises:
        LoraFactoryError: The file cannot be read, is empty, or has other columns.
    """
    file = local_path(path)
    with reading(file, "name a file of examples"):
        if not file.is_file():
            raise LoraFactoryError(f"{file} is {'a folder' if file.is_dir() else 'missing'}; name a file of examples")
    form = format_of(file.name)
    if form is None or form == "text":
        return [Example("", text) for text in read_paragraphs(file)]
    source = DataSource(str(file))
    (name,) = source.local_files()["train"]
    if form == "parquet":
        with _quiet(), _teaching_errors(source, "examples"):
            columns = parquet.read_schema(name).names
    else:
        columns = list(next(read_rows(name, form), {}))
    if "text" not in columns and {"prompt", "completion"} <= set(columns):
        source = replace(source, text_column=None, prompt_column="prompt", completion_column="completion")
    elif "text" not in columns:
        raise LoraFactoryError(
            f"{file} has the columns {', '.join(map(str, columns)) or 'of no row'}; examples need a column text, or"
            " prompt and completion"
        )
    return load_examples(source, "examples")["train"]


def carve(
    found: Mapping[Split, Sequence[Row]],
    task: str,
    key: Callable[[Row], Hashable] = lambda row: row,
    *,
    mixed: bool = False,
) -> dict[Split, list[Row]]:
    """All three splits: those found, the missing ones carved out of train, a tenth of its different rows each.

    The same rows are carved out every time, and equal rows stay on one side.

    Args:
        found: Rows by split; a split without rows is missing.
        task: The task's name, for error messages.
        key: What rows are equal by.
        mixed: Whether the rows come in random order, since their own puts one class after the other, when a split is
            missing; by default they keep their order.

    Raises:
        LoraFactoryError: There is no row to learn from, or too few to carve splits out of.
    """
    complete = {split: [*found[split]] for split in SPLITS if found.get(split)}
    missing = [split for split in SPLITS if split not in complete]
    if "train" in missing:
        raise LoraFactoryError(f"task {task!r} has no training example; give at least one that is not empty")
    if not missing:
        return complete
    rows = complete["train"]
    distinct = list(dict.fromkeys(map(key, rows)))
    if len(distinct) < len(missing) + 1:
        raise LoraFactoryError(
            f"task {task!r} has {len(distinct)} different training rows, too few to carve out {' and '.join(missing)};"
            " give these splits, or more rows"
        )
    random.Random(0).shuffle(distinct)
    if mixed:
        random.Random(0).shuffle(rows)
    share = max(1, len(distinct) // 10)
    home = {one: split for number, split in enumerate(missing) for one in distinct[number * share :][:share]}
    carved = {split: [row for row in rows if home.get(key(row), "train") == split] for split in (*missing, "train")}
    return {split: carved.get(split) or complete[split] for split in SPLITS}


def with_text(examples: Iterable[Answered]) -> list[Answered]:
    """The examples whose completion is not blank."""
    return [example for example in examples if example.completion.strip()]


def answered(examples: Iterable[Answered], where: str, column: str) -> list[Answered]:
    """The examples whose completion, which comes from a column, is not blank; where is "<task>/<split>".

    Raises:
        LoraFactoryError: There is none.
    """
    found = with_text(examples)
    if not found:
        raise LoraFactoryError(f"{where}: no row has text in column {column!r}; write at least one")
    return found


def texts_of(values: Iterable[Any], feature: Any, where: str, column: str) -> list[str]:  # noqa: ANN401
    """The texts of a data set's column: a class goes by its name, and what is missing is empty.

    Args:
        values: What the column holds.
        feature: Its kind, as `datasets` has it.
        where: "<task>/<split>", for error messages.
        column: The column's name, for error messages.

    Raises:
        LoraFactoryError: As `as_text`.
    """
    if isinstance(feature, datasets.ClassLabel):  # rows that nobody labelled have -1
        values = (None if value is None or value < 0 else feature.int2str(value) for value in values)
    elif getattr(feature, "dtype", None) in ("float16", "float32"):  # 0.1, not 0.10000000149
        kind = numpy.dtype(feature.dtype).type
        values = (None if value is None or value != value else str(kind(value)) for value in values)
    return [as_text(value, where, column) for value in values]


def _files_of_splits(given: Any) -> dict[str, list[str]]:  # noqa: ANN401
    by_split = given if isinstance(given, Mapping) else {"train": given}
    files = {
        split: [os.fspath(names)] if isinstance(names, str | os.PathLike) else names
        for split, names in by_split.items()
    }
    for split, names in files.items():
        named = isinstance(split, str) and isinstance(names, Sequence) and names
        if not named or not all(isinstance(name, str | os.PathLike) and os.fspath(name) for name in names):
            raise LoraFactoryError(f"data_files={given!r} must name files, for example {{train: [a.jsonl, b.jsonl]}}")
        for name in names:
            local_path(name)
    return {split: [os.fspath(name) for name in names] for split, names in files.items()}


def _below(folder: Path, name: str) -> str:
    return str(folder / Path(name).expanduser())


def _matching_files(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    found = (
        [str(path)]
        if path.is_file()
        else sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    )
    if not found:
        raise LoraFactoryError(f"no data file {path}; paths in a task file are relative to that file")
    if empty := [name for name in found if not Path(name).stat().st_size]:
        raise LoraFactoryError(f"data file {empty[0]} is empty; write at least one row with text")
    return found


def load_splits(source: DataSource, task: str) -> dict[Split, Rows]:
    """The source's rows for each of our splits that it has."""
    _check_data_files(source, task)
    if source.format is not None:
        available = _load_local(source, source.local_files(), task)
    elif (folder := local_path(source.path)).is_dir():
        with tempfile.TemporaryDirectory(prefix="lora_factory-") as cache, _quiet(), _teaching_errors(source, task):
            how = {"streaming": True} if source.streaming and not _has_signs(folder) else {"keep_in_memory": True}
            if _was_saved(folder):
                saved = datasets.load_from_disk(str(folder))
                available = saved if isinstance(saved, Mapping) else {"train": saved}
            else:
                place, files = _without_signs(folder, cache), source.data_files
                builder = datasets.load_dataset_builder(place, data_files=files, cache_dir=cache)
                if _form_of(builder) == "parquet":  # of which `datasets` cannot read a file without rows
                    every = _files_of(builder)
                    if (full := _without_empty(every, source, task)) != every:
                        files = {split: [glob.escape(name) for name in names] for split, names in full.items()}
                available = datasets.load_dataset(place, data_files=files, cache_dir=cache, **how)
    elif Path(source.path).is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1:
        raise LoraFactoryError(
            f"task {task!r}: no data folder {source.path}; give an existing one, a data file or a Hub id"
        )
    else:
        return _load_from_hub(source, task)
    return _choose_splits(available, source, task)


def _load_local(source: DataSource, files: dict[str, list[str]], task: str) -> Mapping[str, Rows]:
    """Read local files without the network: `load_dataset("json", …)` would report its use to a server first."""
    # The builders copy the rows into a cache, which is of no use to anyone once they are in memory.
    options: dict[str, Any] = {"streaming": True} if source.streaming else {"keep_in_memory": True}
    with tempfile.TemporaryDirectory(prefix="lora_factory-") as cache, _quiet(), _teaching_errors(source, task):
        if source.format == "parquet":
            full = _without_empty(files, source, task)
            escaped: Any = {split: [glob.escape(name) for name in names] for split, names in full.items()}
            return datasets.DatasetDict.from_parquet(escaped, cache_dir=cache, **options)
        form = str(source.format)
        return {
            split: datasets.Dataset.from_list([row for name in names for row in read_rows(name, form, as_texts=False)])
            for split, names in files.items()
        }


def _without_empty(files: dict[str, list[str]], source: DataSource, task: str) -> dict[str, list[str]]:
    """Files by split, without those of Parquet that have no row; a split that is read must have others."""
    full = {
        split: [name for name in names if format_of(name) != "parquet" or parquet.read_metadata(name).num_rows]
        for split, names in files.items()
    }
    bare = [split for split, names in full.items() if not names]
    if wanted := [split for split in bare if not source.splits or split in source.splits.values()]:
        raise LoraFactoryError(f"task {task!r}: {files[wanted[0]][0]} has no row; write at least one")
    return {split: names for split, names in full.items() if names}


def _own_files(source: DataSource, task: str) -> tuple[str, dict[str, list[str]]] | None:
    """The format and the files of local data that `read_rows` reads; None for what `datasets` reads."""
    _check_data_files(source, task)
    if source.format is not None:
        return (source.format, source.local_files()) if source.format in _OWN_FORMATS else None
    folder = local_path(source.path)
    if not folder.is_dir() or _was_saved(folder):
        return None
    with tempfile.TemporaryDirectory(prefix="lora_factory-") as cache, _quiet(), _teaching_errors(source, task):
        place = _without_signs(folder, cache)
        patterns = source.data_files or get_data_patterns(place)
        every = [*itertools.chain(*DataFilesDict.from_patterns(patterns, base_path=place).values())]
        # A text file beside others is a note, such as README.txt.
        formats = {kind: Path(name).name for name in every if (kind := format_of(name)) in _ROW_FORMATS}
        try:
            builder = datasets.load_dataset_builder(place, data_files=source.data_files, cache_dir=cache)
        except ValueError:
            if len(formats) < 2:
                raise
            form, files = next(iter(formats)), {}  # the splits have several formats
        else:
            form, files = _form_of(builder), _files_of(builder)
            if _has_signs(folder):  # these are links that go with the cache
                files = {split: [os.path.realpath(name) for name in names] for split, names in files.items()}
    formats |= {kind: Path(name).name for name in every if (kind := format_of(name)) == form}
    if form in formats and len(formats) > 1:
        raise LoraFactoryError(
            f"task {task!r}: {source.path} has data files of {len(formats)} formats, such as"
            f" {' and '.join(formats.values())}; keep one format, or name the files to read with data_files"
        )
    if form not in _OWN_FORMATS:
        return None
    if packed := next((name for names in files.values() for name in names if format_of(name) != form), None):
        raise LoraFactoryError(
            f"task {task!r}: {packed} in {source.path} is packed or has an ending that is not read; unpack it, or give"
            " it one of these: .csv, .tsv, .json, .jsonl, .ndjson, .txt, all also with .gz behind"
        )
    return form, files


def _form_of(builder: datasets.DatasetBuilder) -> str:
    """What a folder's files are by `datasets`: "json", "imagefolder" and so on; empty for what it does not ship."""
    ours = "datasets.packaged_modules."
    modules = (part.__module__ for part in type(builder).__mro__[:2])
    return next((name.rpartition(".")[2] for name in modules if name.startswith(ours)), "")


def _files_of(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """The files of every split of a folder."""
    found = builder.config.data_files or {}
    return {str(split): [os.path.abspath(name) for name in names] for split, names in found.items()}


def _check_data_files(source: DataSource, task: str) -> None:
    """Refuse files beside what is one file, or was saved as a whole."""
    one = source.format is not None and source.path not in LOCAL_FORMATS
    if source.data_files and (one or _was_saved(local_path(source.path))):
        what, remedy = "a data set that was saved as a whole", "leave data_files out and choose with splits"
        if one:
            what, remedy = "one file", f"write path: {source.format} with data_files"
        raise LoraFactoryError(
            f"task {task!r}: path={source.path!r} is {what}, of which data_files are no part; {remedy}"
        )


def _was_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _has_signs(folder: Path) -> bool:
    return glob.escape(str(folder.resolve())) != str(folder.resolve())


def _without_signs(folder: Path, cache: str) -> str:
    """The folder, or one of links to its files where its path has brackets, which `datasets` takes for a pattern."""
    if not _has_signs(folder):
        return str(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            link = Path(cache) / "data" / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    return str(Path(cache) / "data")


def _rows_of(names: Sequence[str], form: str, source: DataSource, task: str) -> list[dict[str, Any]]:
    """The first rows of the files, no more than the source's budget."""
    every = itertools.chain.from_iterable(read_rows(name, form) for name in names)
    try:
        return list(itertools.islice(every, source.max_rows))
    except LoraFactoryError as error:
        raise LoraFactoryError(f"task {task!r}: cannot load data from {source.path} ({error})") from error


def _load_from_hub(source: DataSource, task: str) -> dict[Split, Rows]:
    options: dict[str, Any] = {"data_files": source.data_files, "revision": source.revision}
    options |= {"streaming": True} if source.streaming else {}
    with _teaching_errors(source, task):
        if source.splits:
            return {
                ours: datasets.load_dataset(source.path, source.name, split=source.splits[ours], **options)
                for ours in SPLITS
                if ours in source.splits
            }
        available = datasets.load_dataset(source.path, source.name, **options)
    return _choose_splits(available, source, task)


def _choose_splits(available: Mapping[str, Rows], source: DataSource, task: str) -> dict[Split, Rows]:
    available = {str(name): rows for name, rows in available.items()}
    wanted = source.splits or {split: split for split in SPLITS if split in available}
    if unknown := sorted(set(wanted.values()) - set(available)):
        raise LoraFactoryError(
            f"task {task!r}: no split {unknown[0]!r} in {source.path}; it has {', '.join(available)}"
        )
    if "train" not in wanted:
        raise LoraFactoryError(
            f"task {task!r}: {source.path} has no split called train, but {', '.join(available)}; say which one to"
            f" learn from, for example splits: {{train: {next(iter(available))}}}"
        )
    return {split: available[wanted[split]] for split in SPLITS if split in wanted}


def _first_rows(rows: Rows, source: DataSource) -> datasets.Dataset:
    """The rows that the source's budget allows, read now."""
    if source.max_rows is None:
        return rows
    if not source.streaming:
        return rows.select(range(min(source.max_rows, len(rows))))
    names = rows.column_names or list(next(iter(rows), {}))
    wanted = [name for name in source.columns if name in names]
    if len(wanted) < len(source.columns):
        return datasets.Dataset.from_dict({name: [] for name in names})  # whoever reads it names the missing column
    features = rows.features and datasets.Features({name: rows.features[name] for name in wanted})
    chosen = rows.select_columns(wanted) if features else rows
    first = [{name: row.get(name) for name in wanted} for row in chosen.take(source.max_rows)]
    return datasets.Dataset.from_list(first, features=features)


def _read_rows(rows: datasets.Dataset, source: DataSource, where: str) -> list[Example]:
    """The examples with text among the rows; `where` is "<task>/<split>" for error messages."""
    _check_columns(rows.column_names, source, where)
    texts = [texts_of(rows[column], rows.features[column], where, column) for column in source.columns]
    return _from_texts(zip(*texts, strict=True), source, where)


def _check_columns(names: Sequence[str], source: DataSource, where: str) -> None:
    for column in source.columns:
        if column not in names:
            hint = separator_hint(names) if source.format in (None, "csv") else ""
            raise LoraFactoryError(
                f"{where}: no column {column!r} in {source.path}; it has {', '.join(map(str, names))}{hint}"
            )


def _examples_of(rows: Sequence[Mapping[str, Any]], source: DataSource, where: str) -> list[Example]:
    """The examples with text among the rows."""
    if rows:
        _check_columns(list(dict.fromkeys(name for row in rows for name in row)), source, where)
    texts = ([as_text(row.get(column), where, column) for column in source.columns] for row in rows)
    return _from_texts(texts, source, where)


def _from_texts(texts: Iterable[Sequence[str]], source: DataSource, where: str) -> list[Example]:
    examples = (Example("" if source.text_column else row[0], row[-1]) for row in texts)
    return answered(examples, where, source.columns[-1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which say nothing about a local file, and put things back afterwards."""
    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            datasets.enable_progress_bars()


@contextmanager
def _teaching_errors(source: DataSource, task: str) -> Iterator[None]:
    try:
        yield
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, LoraFactoryError):
            raise
        reason = error.__cause__ or error
        hint = (
            "there is no such folder, so check the id on the Hub and the network, or give local files"
            if source.format is None
            else "repair the file"
        )
        if local_path(source.path).is_dir():
            hint = "the folder must hold files of data that the package reads, such as train.jsonl or train.csv"
        raise LoraFactoryError(
            f"task {task!r}: cannot load data from {source.path} ({type(reason).__name__}: {reason}); {hint}"
        ) from error
