"""Rows of local CSV, TSV, JSON and text files, whose cells stay the texts that the files hold."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.paths import local_path
from lora_factory.utils.safe_files import reading
from lora_factory.utils.yaml_files import without_doubles

FORMAT_OF_ENDING = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_MAX_CELL = 1 << 30  # characters; the csv module's own bound of 131072 would refuse long documents


def format_of(name: str | Path) -> str | None:
    """The format of a file by its ending, which ``.gz`` may follow except for Parquet; None for other endings."""
    lower = str(name).lower()
    found = FORMAT_OF_ENDING.get(Path(lower.removesuffix(".gz")).suffix)
    return None if found == "parquet" and lower.endswith(".gz") else found


def read_rows(path: str | Path, form: str, *, as_texts: bool = True) -> Iterator[dict[str, Any]]:
    """Read the rows of a file one by one.

    Args:
        path: A file of UTF-8 text, with or without byte order mark; packed when its name ends in ``.gz``.
        form: "csv", "json" (a list, JSON Lines, or one object of equally long lists) or "text" (a row for each line).
        as_texts: Give the numbers of a JSON file as the texts that stand in it, and its NaN as None.

    Raises:
        LoraFactoryError: The file cannot be read, is no UTF-8 text, or is damaged; the message names file and line.
    """
    packed = str(path).lower().endswith(".gz")
    with (
        reading(path, "repair the file, which must be UTF-8 text"),
        (gzip.open if packed else open)(
            path, "rt", encoding="utf-8-sig", newline="" if form == "csv" else None
        ) as file,
    ):
        if form == "csv":
            tabs = str(path).lower().removesuffix(".gz").endswith(".tsv")
            yield from _csv_rows(file, path, "\t" if tabs else ",")
        elif form == "json":
            yield from _json_rows(file, path, as_texts)
        else:
            yield from ({"text": line.rstrip("\n")} for line in file)


def as_text(value: object, where: str, column: str) -> str:
    """The text of one cell.

    Texts stay as they are, numbers are written as in Python, booleans as in JSON, dates as in ISO 8601; a missing
    value or NaN is empty.

    Raises:
        LoraFactoryError: The value is a list, a mapping, bytes or the like, or a text that UTF-8 cannot express.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise LoraFactoryError(
                    f"{where}: column {column!r} holds half of a surrogate pair in {value[:60]!a}, which is no"
                    " character; repair the file"
                ) from error
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    raise LoraFactoryError(f"{where}: column {column!r} holds {type(value).__name__}, not text; name a text column")


def separator_hint(names: Sequence[str]) -> str:
    """A word on a CSV header of one cell that looks like several; else nothing."""
    found = [sign for sign in ("\t", ";", "|", ",") if len(names) == 1 and sign in names[0]]
    return (
        f"; the header is one cell with {found[0]!r} in it: .csv files need commas, .tsv files tabs" if found else ""
    )


def _csv_rows(file: Iterable[str], path: str | Path, separator: str) -> Iterator[dict[str, str]]:
    before = csv.field_size_limit(_MAX_CELL)
    try:
        reader = csv.reader(file, delimiter=separator, strict=True)
        names: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise LoraFactoryError(f"{path}, line {line}: {error}; repair the quotes of that row") from error
            if cells is None:
                return
            if names is None:
                names = cells
                if doubled := [name for name, count in Counter(names).items() if name and count > 1]:
                    raise LoraFactoryError(f"{path}: two columns are called {doubled[0]!r}; rename one in the header")
            elif cells and len(cells) != len(names):
                raise LoraFactoryError(
                    f"{path}, line {line}: {len(cells)} cells, but the header names {len(names)} columns; put a cell"
                    f" that holds {separator!r} in double quotes{separator_hint(names)}"
                )
            elif cells:  # not a blank line
                yield dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(before)


def _json_rows(file: IO[str], path: str | Path, as_texts: bool) -> Iterator[dict[str, Any]]:
    # Numbers as they are written: 1.50 is not 1.5, and Python refuses integers of more than 4300 digits.
    numbers: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": _constant} if as_texts else {}
    read = json.JSONDecoder(object_pairs_hook=without_doubles, **numbers).decode
    number, first = next(((number, line) for number, line in enumerate(file, 1) if line.strip()), (0, ""))
    if not first:
        return
    try:
        row = read(first)
    except json.JSONDecodeError:
        row = None  # no JSON Lines, but one value over several lines
    if isinstance(row, dict) and (
        second := next(((n, line) for n, line in enumerate(file, number + 1) if line.strip()), None)
    ):
        yield row
        yield _json_row(read, second[1], path, second[0])
        yield from (_json_row(read, line, path, n) for n, line in enumerate(file, second[0] + 1) if line.strip())
        return
    content = row if row is not None else read(first + file.read())
    if isinstance(content, dict):
        columns = list(content.values())
        lists = columns and all(isinstance(column, list) for column in columns)
        if not lists or len({len(column) for column in columns}) > 1:
            content = [content]
        else:
            content = [dict(zip(content, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(content, list):
        raise LoraFactoryError(f"{path} holds {type(content).__name__}; write a list of objects, or one on each line")
    for place, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise LoraFactoryError(f"{path}, row {place}: {type(entry).__name__} instead of an object with columns")
        yield entry


def _json_row(read: Any, line: str, path: str | Path, number: int) -> dict[str, Any]:  # noqa: ANN401
    try:
        row = read(line)
    except (ValueError, RecursionError) as error:
        raise LoraFactoryError(f"{path}, line {number}: no valid JSON ({error}); repair the file") from error
    if not isinstance(row, dict):
        raise LoraFactoryError(f"{path}, line {number}: {type(row).__name__} instead of an object with columns")
    return row


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


def read_paragraphs(path: str | Path) -> list[str]:
    """The paragraphs of a text file: what stands between blank lines.

    Raises:
        LoraFactoryError: When the file cannot be read, is no UTF-8 text, or is empty.
    """
    try:
        opened = gzip.open if str(path).lower().endswith(".gz") else open
        with opened(local_path(path), "rt", encoding="utf-8-sig") as file:
            text = str(file.read())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise LoraFactoryError(f"cannot read {path}: {error}; name a text file") from error
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not paragraphs:
        raise LoraFactoryError(f"{path} is empty; put the examples into it, a blank line between them")
    return paragraphs
