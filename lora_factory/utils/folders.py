"""Decide which folders and files may be replaced: those that this package wrote, and nothing else.

Every replacement of a folder goes through `check_folder`, once before any work starts and once more when the new
folder is put in its place; every replacement of a report goes through `check_report`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.utils.paths import local_path
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, read_json_object


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes as a whole.

    Attributes:
        noun: What errors call it, with its article.
        files: A regular expression of the paths that it may hold, relative to it and with "/" between the parts.
        is_ours: Whether its marker is there, and says that this package wrote it.
    """

    noun: str
    files: str
    is_ours: Callable[[Path], bool] = lambda _: True

    def foreign(self, folder: Path) -> str | None:
        """Find what this package did not write in a folder: its path, "." when the marker is missing, or None.

        An empty folder holds nothing foreign; a link, a hidden file and an empty folder inside are foreign.
        """
        with storage_errors(folder, "read"):
            if not any(os.scandir(folder)):
                return None
            for path in _contents(folder):
                name = path.relative_to(folder).as_posix()
                if not re.fullmatch(self.files, name) or not stat.S_ISREG(path.lstat().st_mode):
                    return name
            return None if self.is_ours(folder) else "."


@contextlib.contextmanager
def storage_errors(
    path: Path, doing: str = "write", remedy: str = "make room there, allow it, or name another path"
) -> Iterator[None]:
    """Turn what the file system refuses into one clear error with the path.

    Args:
        path: What is written or read.
        doing: The verb.
        remedy: What the user can do.

    Raises:
        StorageError: When the block fails for the disk: full, read-only, gone, or not allowed.
    """
    try:
        yield
    except (OSError, SafetensorError, StorageError) as error:  # of nested ones, the outer path is the user's
        reason = (error.__cause__ if isinstance(error, StorageError) else None) or error
        raise StorageError(f"cannot {doing} {path}: {reason}; {remedy}") from reason


def check_folder(
    path: str | Path, kind: FolderKind, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Path:
    """Find out whether a folder may be made, or replaced as a whole; nothing is changed.

    Args:
        path: The folder.
        kind: What this package writes there.
        overwrite: Whether an existing folder may be replaced, if it holds nothing but what this package wrote.
        inputs: Files and folders that are read by the same call; names that are no path here are left out.

    Returns:
        The real path, without links, ``..`` and ``~``.

    Raises:
        LoraFactoryError: When there is a file or a link, a folder that is not to be replaced, anything that this
            package did not write, the working directory, the home folder, an input, or a folder around one of these.
        StorageError: When the folder cannot be looked at.
    """
    named = local_path(path)
    with storage_errors(named, "look at"):
        is_link, real = named.is_symlink(), Path(os.path.realpath(named))
        there, is_folder = os.path.lexists(real), real.is_dir()
        if is_link or (there and not is_folder):
            raise LoraFactoryError(f"{named} is there and is not a folder; choose another path or remove it")
        if not real.name:
            raise LoraFactoryError(f"{named} cannot be replaced; name a folder in it")
        if not there:
            return real
    used = {"the working directory": [Path.cwd()], "the home folder": [Path.home()]}
    used["what this call reads"] = [local_path(one) for one in inputs if one is not None and str(one)]
    for noun, places in used.items():
        if any(_same_or_around(real, place) for place in places):
            raise LoraFactoryError(
                f"{named} is {noun} or a folder around it, and is not replaced; name another folder"
            )
    foreign = kind.foreign(real)
    if foreign is not None:
        what = "other files than those" if foreign == "." else repr(foreign)
        raise LoraFactoryError(
            f"{named} is already there and holds {what}, not just {kind.noun} that this package wrote, so it is not "
            "replaced; name another folder"
        )
    if not overwrite and any(os.scandir(real)):
        raise LoraFactoryError(f"{named} is already there; choose another path, remove it or pass overwrite=True")
    return real


def _contents(folder: Path) -> Iterable[Path]:
    """All that a folder holds but for folders with something in them; links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        yield from (Path(place, name) for name in names)
        yield from (Path(place, name) for name in folders if Path(place, name).is_symlink())
        if not folders and not names:
            yield Path(place)


def _same_or_around(folder: Path, other: Path) -> bool:
    """Return whether a folder is the other path or contains it, however the two are written."""
    if not os.path.lexists(other):
        return False
    real = Path(os.path.realpath(other))
    number = folder.stat()
    return any(os.path.samestat(number, one.stat()) for one in (real, *real.parents) if one.exists())


def _object(path: Path) -> dict[str, object]:
    """Read the object of a JSON file; an empty one when the file is damaged or holds no object."""
    try:
        return read_json_object(path, limit=MAX_CONFIG_BYTES)
    except LoraFactoryError:
        return {}


def _is_generator(folder: Path) -> bool:
    return _object(folder / "config.json").get("model_type") == "cvae_lora"


def _is_generated(folder: Path) -> bool:
    """Return whether the weights are those that a generator wrote; other weights were trained by the user."""
    record, weights = _object(folder / "generation.json"), folder / "adapter_model.safetensors"
    if not {"generator", "versions", "sha256"} <= record.keys():
        return False
    if not weights.is_file():
        return True
    with weights.open("rb") as file:
        return record["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()


GENERATOR = FolderKind(
    "a generator",
    r"(config|training)\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|README\.md",
    _is_generator,
)
ADAPTER = FolderKind(
    "a generated adapter",
    r"adapter_config\.json|adapter_model\.safetensors|generation\.json|condition\.safetensors|README\.md",
    _is_generated,
)
_STATE_FILES = r"state\.(json|safetensors)"
STATE = FolderKind("the state of a training", _STATE_FILES)
WORKING = (
    FolderKind(  # beside a generator's folder while it trains through the base; a crash can leave temporary files
        "the state of a training", rf"(through-base|\.tmp-through-base-\w+)/{_STATE_FILES}"
    )
)


def run_kind(names: Iterable[str]) -> FolderKind:
    """A zoo's run that holds these files."""
    return FolderKind("a run", "|".join(map(re.escape, names)))


COMPARISON_FILES = ("cells.jsonl", "comparison.json", "tables.md", "report.html")
# What the reports of this package hold, and other files of the same names are most unlikely to.
_REPORTS = {
    "evaluation.json": rb'"bits_per_character"',
    "comparison.json": rb'"created_with"',
    "cells.jsonl": rb'\A(\{"key": "[0-9a-f]{64}"|\Z)',
    "tables.md": rb"\A# (Adapters generated for|Comparison on) ",  # the latter until 0.2
    "report.html": rb"<title>(Adapters generated for|Comparison on) ",
    "detection.json": rb'"created_with"',
    "detection.md": rb"\A# ",
    "detection.html": rb"<title>(Detection with|Comparison on) ",
    "results.json": rb'"unseen_task"',
}


def check_reports(folder: str | Path, *names: str) -> Path:
    """Find out whether reports may be written into a folder: other files in it stay as they are.

    Args:
        folder: The folder; it may be missing.
        names: The names of the reports.

    Returns:
        The folder's path.

    Raises:
        LoraFactoryError: When the path is no folder, or a file of such a name is there that this package did not
            write.
        StorageError: When one cannot be read.
    """
    folder = local_path(folder)
    with storage_errors(folder, "look at"):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not there.is_dir():
            raise LoraFactoryError(f"{there} is there and is not a folder; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{there} may not be written into; allow it, or name another folder")
    for name in names:
        path = folder / name
        with storage_errors(path, "read"):
            if not os.path.lexists(path):
                continue
            if path.is_symlink() or not path.is_file() or not re.search(_REPORTS[name], path.read_bytes()):
                raise LoraFactoryError(
                    f"{path} is there and was not written by this package; it is not replaced; name another folder"
                )
    return folder


def check_saving(folder: str | Path) -> Path:
    """Find out whether a generator may be saved into a folder, beside what that holds.

    Raises:
        LoraFactoryError: When it holds another model's config or weights, which would be replaced.
    """
    folder = local_path(folder)
    with storage_errors(folder, "look at"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise LoraFactoryError(f"{folder} is there and is not a folder; name another one")
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        taken = sorted(name for name in names if re.fullmatch(r"(config|training)\.json|model.*\.safetensors.*", name))
        if taken and (not _is_generator(folder) or any((folder / name).is_symlink() for name in taken)):
            raise LoraFactoryError(
                f"{folder / taken[0]} is no generator's and would be replaced; name another folder for the generator"
            )
    return folder


def check_task_file(path: Path, examples: Iterable[Path]) -> None:
    """Find out whether a task file and the files of its examples may be written.

    Args:
        path: The task file; an older one is replaced, with the examples beside it.
        examples: The files of examples that belong to it.

    Raises:
        LoraFactoryError: When the file is there and is no task file, or files of examples are there without one.
        StorageError: When it cannot be read.
    """
    with storage_errors(path, "read"):
        if os.path.lexists(path):
            if not path.is_file() or not re.search(rb"(?m)^tasks:|\A\s*\{\s*\"tasks\"", path.read_bytes()):
                raise LoraFactoryError(
                    f"{path} is there and is no task file, so it is not replaced; name another file"
                )
        elif taken := next((file for file in examples if os.path.lexists(file)), None):
            raise LoraFactoryError(f"{taken} is there without a task file, so it is not replaced; name another folder")
