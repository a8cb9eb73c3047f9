"""Files and folders that are either whole or not there: temporary sibling or child, fsync, rename.

A crash can leave files and folders named ".tmp-*". They are never read, `safe_name` keeps them from being taken for
real things, and deleting them is always safe. Where two folders cannot be exchanged in one step, a crash in the middle
of a replacement leaves what was there as ".old-*", and nothing of this package deletes that.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.folders import FolderKind, check_folder, storage_errors
from lora_factory.utils.paths import local_path

_EMPTY = FolderKind("nothing", r"(?!)")


def write_text(path: str | Path, text: str, *, durable: bool = True, replaces: bool = True) -> None:
    """Write UTF-8 text atomically, with the newlines it has.

    Args:
        path: The file.
        text: What it will hold.
        durable: Whether it is on the disk when this returns; False in `atomic_folder`, which sees to it for all files.
        replaces: Whether an existing file is replaced, and not left as it is.

    Raises:
        StorageError: When the file cannot be written.
    """
    path = local_path(path).absolute()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, replaces=replaces) as new, new.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            _fsync(path.parent)


def write_json(path: str | Path, value: Any, **options: bool) -> None:  # noqa: ANN401
    """Write a JSON file atomically, indented, keys in their given order; options as in `write_text`.

    Raises:
        LoraFactoryError: if the value holds NaN, infinity or something that JSON does not know.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LoraFactoryError(
            f"{path} was not written: {error}; pass only JSON values, and None in place of NaN or infinity"
        ) from error
    write_text(path, text + "\n", **options)


@contextlib.contextmanager
def atomic_file(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `path` when the block ends well and is removed when it fails.

    With ``replaces=False`` a file that is there stays, also one that another process writes meanwhile.
    """
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        _fsync(temporary)
        if replaces:
            os.replace(temporary, path)
        else:
            _put_if_absent(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _put_if_absent(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:  # the file system has no hard links
        if not path.exists():
            os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(
    path: str | Path,
    kind: FolderKind | None = None,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` when the block ends well and is removed when it fails.

    Args:
        path: the folder to be; its parents are made.
        kind: what this package writes there; by default nothing but an empty folder is replaced.
        overwrite: whether a folder of this kind that is already there is replaced, as a whole, instead of refused.
        inputs: what the same call reads; see `check_folder`.

    Yields:
        The empty temporary folder, named ".tmp-...", to be filled.

    Raises:
        LoraFactoryError: if `check_folder` refuses, before the block or after it.
        StorageError: if the folder cannot be written.
    """
    kind, named, inputs = kind or _EMPTY, local_path(path), list(inputs)
    path = check_folder(named, kind, overwrite=overwrite, inputs=inputs)
    with storage_errors(named):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_sibling(path)
        temporary.mkdir()
        try:
            yield temporary
            _settle(temporary)
            check_folder(named, kind, overwrite=overwrite, inputs=inputs)
            _put_in_place(temporary, path, kind)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _fsync(path.parent)


@contextlib.contextmanager
def atomic_files(folder: Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder in `folder`; its files are renamed into `folder` when the block ends well.

    Files of the same names are replaced, and other files stay. Nothing is replaced before all new files are on the
    disk. The temporary folder is removed, also when the block fails.

    Args:
        folder: The folder, which is made if it is missing.
        last: The name of the file that is renamed after the others.

    Raises:
        StorageError: If the files cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_sibling(folder / "files")  # inside: only there is it on the same disk for certain
        temporary.mkdir()
        try:
            with contextlib.suppress(OSError):
                temporary.chmod(folder.stat().st_mode)
            yield temporary
            _settle(temporary)
            for path in sorted(temporary.rglob("*"), key=lambda path: path.name == last):
                if path.is_file():
                    place = folder / path.relative_to(temporary)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _fsync(folder)


def share_file(path: Path) -> None:
    """Let those read and write a file whom its folder lets in; safetensors writes files for their owner alone."""
    if not path.is_symlink():
        with contextlib.suppress(OSError):  # not every file system knows modes
            path.chmod(path.parent.stat().st_mode & 0o666)


def remove_folder(path: str | Path, kind: FolderKind) -> None:
    """Remove a folder of this package, so that it is there as a whole or not at all whenever the process ends.

    Raises:
        LoraFactoryError: if it holds anything else.
        StorageError: if it cannot be removed.
    """
    real = check_folder(path, kind, overwrite=True)
    with storage_errors(real, "remove"):
        aside = _temporary_sibling(real)
        real.rename(aside)
        shutil.rmtree(aside)


def _settle(folder: Path) -> None:
    """Share all files of a folder and make them durable."""
    for place, _, names in os.walk(folder):
        for name in names:
            share_file(Path(place, name))
            _fsync(Path(place, name))
        _fsync(Path(place))


def _temporary_sibling(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f".{kind}-{path.name[:100]}-{secrets.token_hex(6)}")


def _put_in_place(temporary: Path, path: Path, kind: FolderKind) -> None:
    """Rename `temporary` to `path`; what was there becomes `temporary`, or comes back if that fails."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = temporary
    if not _exchange(temporary, path):
        path.rename(aside := _temporary_sibling(path, "old"))
    try:
        if foreign := kind.foreign(aside):  # it came between the check and the renaming
            raise LoraFactoryError(f"{path / foreign} has just been written by somebody else; nothing is replaced")
        if aside != temporary:
            temporary.rename(path)
    except BaseException:
        if aside != temporary:
            aside.rename(path)
        else:
            _exchange(temporary, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, so that neither is ever missing; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _fsync(path: Path) -> None:
    """Make a file's or folder's content durable; a folder cannot be opened for that on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
