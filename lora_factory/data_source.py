"""Data sources: which data set, files and columns hold a task's examples, on the Hub or on this machine."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets

from lora_factory.errors import LoraFactoryError

Split = Literal["train", "validation", "test"]
Rows = Any  # datasets.Dataset, or datasets.IterableDataset when streaming; both come untyped

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LOCAL_FORMATS = ("json", "csv", "parquet", "text")
_FORMAT_OF_ENDING = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


class Example(NamedTuple):
    """One training text: the loss falls on the completion only; plain text has an empty prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class DataSource:
    """Where a task's examples come from and which columns hold their text.

    Attributes:
        path: A data set's id on the Hub, a local folder of data files, a local file (.json, .jsonl, .csv, .tsv,
            .parquet or .txt), or "json", "csv", "parquet" or "text" with `data_files`. Each line of a text file is an
            example.
        name: The data set's configuration on the Hub.
        data_files: File names or patterns, per split of the source. A bare name stands for a list of one, and
            without a split it means "train".
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
        for key in ("path", "name", "text_column", "prompt_column", "completion_column", "revision"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value.strip()) and not (value is None and key != "path"):
                raise LoraFactoryError(
                    f"{key}={value!r} of a data source must be a text that is not empty; put it in quotes"
                )
        if (self.prompt_column is None) != (self.completion_column is None):
            raise LoraFactoryError("prompt_column and completion_column go together: give both, or text_column alone")
        if self.text_column is None and self.prompt_column is None:
            object.__setattr__(self, "text_column", "text")
        elif self.text_column is not None and self.prompt_column is not None:
            raise LoraFactoryError("give either text_column or prompt_column and completion_column, not all three")
        splits = self.splits
        if not isinstance(splits, Mapping) or not set(splits) <= set(SPLITS) or not _are_texts(splits.values()):
            raise LoraFactoryError(f"splits={splits!r} must map {', '.join(SPLITS)} to the source's split names")
        if self.data_files is not None:
            object.__setattr__(self, "data_files", _files_of_splits(self.data_files))
        if self.max_rows is not None and (type(self.max_rows) is not int or self.max_rows < 1):
            raise LoraFactoryError(f"max_rows={self.max_rows!r} of a data source must be a number of rows above 0")
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
        return self.path if self.path in LOCAL_FORMATS else _FORMAT_OF_ENDING.get(Path(self.path).suffix.lower())

    @property
    def hub_id(self) -> str | None:
        """The data set's id on the Hub; None for local files and folders, which have no public name."""
        return None if self.format is not None or Path(self.path).expanduser().is_dir() else self.path

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
        """The same source, its local paths taken as relative to `folder`; ids on the Hub stay as they are."""
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
    splits: dict[Split, list[Example]] = {}
    for split, rows in load_splits(source, task).items():
        with _teaching_errors(source, task):
            first = _first_rows(rows, source)
        splits[split] = _read_rows(first, source, f"{task}/{split}")
    return splits


def with_text(examples: Iterable[Example]) -> list[Example]:
    """The examples whose completion is not blank."""
    return [example for example in examples if example.completion.strip()]


def _files_of_splits(given: Any) -> dict[str, list[str]]:  # noqa: ANN401
    by_split = given if isinstance(given, Mapping) else {"train": given}
    files = {split: [names] if isinstance(names, str) else names for split, names in by_split.items()}
    for split, names in files.items():
        if not isinstance(split, str) or not isinstance(names, Sequence) or not names or not _are_texts(names):
            raise LoraFactoryError(f"data_files={given!r} must name files, for example {{train: [a.jsonl, b.jsonl]}}")
    return {split: list(names) for split, names in files.items()}


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) and value for value in values)


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
    if source.format is not None:
        available = _load_local(source, source.local_files(), task)
    elif Path(source.path).expanduser().is_dir():
        with tempfile.TemporaryDirectory(prefix="lora_factory-") as cache, _quiet(), _teaching_errors(source, task):
            how = {"streaming": True} if source.streaming else {"keep_in_memory": True}
            available = datasets.load_dataset(os.path.expanduser(source.path), cache_dir=cache, **how)
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
    escaped: Any = {split: [glob.escape(name) for name in names] for split, names in files.items()}
    with tempfile.TemporaryDirectory(prefix="lora_factory-") as cache, _quiet(), _teaching_errors(source, task):
        if source.format == "json":
            return datasets.DatasetDict.from_json(escaped, cache_dir=cache, **options)
        if source.format == "parquet":
            return datasets.DatasetDict.from_parquet(escaped, cache_dir=cache, **options)
        if source.format == "text":
            return datasets.DatasetDict.from_text(escaped, cache_dir=cache, **options)
        is_tab = all(name.lower().endswith(".tsv") for names in files.values() for name in names)
        # Without keep_default_na, texts such as "None" and "NA" would be lost.
        options |= {"sep": "\t" if is_tab else ",", "keep_default_na": False}
        return datasets.DatasetDict.from_csv(escaped, cache_dir=cache, **options)


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
    for column in source.columns:
        if column not in rows.column_names:
            raise LoraFactoryError(
                f"{where}: no column {column!r} in {source.path}; it has {', '.join(rows.column_names)}"
            )
    columns = [_column_of_text(rows, column, where) for column in source.columns]
    examples = with_text(Example("" if source.text_column else row[0], row[-1]) for row in zip(*columns, strict=True))
    if not examples:
        raise LoraFactoryError(f"{where}: no row has text in column {source.columns[-1]!r}; write at least one")
    return examples


def _column_of_text(rows: datasets.Dataset, column: str, where: str) -> list[str]:
    feature, values = rows.features[column], list(rows[column])
    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(value) for value in values]
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise LoraFactoryError(
                f"{where}: column {column!r} holds {type(value).__name__}, not text; name a text column"
            )
    return ["" if value is None else str(value) for value in values]


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
        raise LoraFactoryError(
            f"task {task!r}: cannot load data from {source.path} ({type(reason).__name__}: {reason}); {hint}"
        ) from error
