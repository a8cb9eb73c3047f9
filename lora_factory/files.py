"""Files and folders that are either whole or not there: temporary sibling, fsync, rename.

A crash can leave siblings named ".tmp-*". They are never read, `safe_name` keeps them from being taken for real
things, and deleting them is always safe.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_factory.errors import LoraFactoryError
from lora_factory.folders import FolderKind, check_folder, storage_errors

_EMPTY = FolderKind("nothing", r"(?!)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def local_path(path: str | Path) -> Path:
    """Return a path that a user named, with ``~`` and ``~user`` replaced by the home folder.

    Raises:
        LoraFactoryError: When it is no text or path, is empty, holds a NUL character, or names an unknown user.
    """
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise LoraFactoryError(f"{path!r} is no path; name a file or folder")
    try:
        os.fsencode(path)
        return Path(path).expanduser()
    except UnicodeEncodeError as error:
        raise LoraFactoryError(f"{str(path)!a} holds half of a surrogate pair and is no path; rename it") from error
    except RuntimeError as error:
        raise LoraFactoryError(f"{str(path)!r}: {error}; write the path of the home folder instead of ~") from error


def task_names(given: Sequence[str]) -> dict[str, str]:
    """For names in any script, file names that are all different, also where letters' case does not count.

    A name that is no file name, or falls together with another, gets a hash of itself behind it; one that only has
    blanks between its words gets underscores for them. So a name may change when another joins that falls together
    with it, and in no other case.
    """
    short = {name: re.sub(r"[^A-Za-z0-9._-]+", "_", name) for name in given}
    alike = Counter(form.lower() for form in short.values())

    def final(name: str) -> str:
        form = short[name]
        if _NAME.fullmatch(form) and ".." not in form and alike[form.lower()] == 1 and name.isascii():
            return form
        if (
            form == name
            and _NAME.fullmatch(form)
            and ".." not in form
            and name == min(other for other in given if short[other].lower() == form.lower() and short[other] == other)
        ):
            return form  # it is the one name that needs no change
        stem = re.sub(r"\.{2,}", ".", form).strip("._-")[:80] or "category"
        return f"{stem}-{sha256_text(name.encode('utf-8', 'replace').decode())[:8]}"

    return {name: final(name) for name in given}


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$LORA_FACTORY_CACHE``, by default ``~/.cache/lora_factory``."""
    return local_path(os.environ.get("LORA_FACTORY_CACHE") or "~/.cache/lora_factory")


def safe_name(name: str) -> str:
    """Check a name that comes from outside and becomes a file or folder name.

    Returns:
        The name itself.

    Raises:
        LoraFactoryError: unless it is 1 to 100 letters, digits, ".", "_" or "-", starts with a letter or digit and
            holds no "..".
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise LoraFactoryError(
            f"{name!r} cannot be a file name; use 1 to 100 letters, digits, '.', '_' or '-', "
            "start with a letter or digit and avoid '..'"
        )
    return name


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, with the newlines it has; an existing file is replaced.

    Raises:
        StorageError: When the file cannot be written.
    """
    path = local_path(path).absolute()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _fsync(path.parent)


def write_json(path: str | Path, value: Any) -> None:  # noqa: ANN401
    """Write a JSON file atomically, indented, keys in their given order.

    Raises:
        LoraFactoryError: if the value holds NaN, infinity or something that JSON does not know.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LoraFactoryError(
            f"{path} was not written: {error}; pass only JSON values, and None in place of NaN or infinity"
        ) from error
    write_text(path, text + "\n")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `path` when the block ends well and is removed when it fails."""
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            for folder, _, names in os.walk(temporary):
                for name in names:
                    share_file(Path(folder, name))
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            check_folder(named, kind, overwrite=overwrite, inputs=inputs)
            _put_in_place(temporary, path, kind)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _fsync(path.parent)


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


def recorded_name(name: str | Path) -> str:
    """The name of a model as adapters and generators record it.

    A folder here is recorded by its absolute path, which nobody takes for an id of the Hub.
    """
    if not str(name):
        return ""
    path = local_path(name)
    return os.path.abspath(path) if path.is_dir() else str(name)


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def weights_identifier(name: str, revision: str | None) -> str:
    """A Hub id with its revision, or the name of a folder or file with a hash of its weights."""
    path = Path(name)
    if not path.exists():
        return f"{name}@{revision}" if revision else name
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()
    return f"{path.resolve().name}#{digest[:16]}"


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name[:100]}-{secrets.token_hex(6)}")


def _put_in_place(temporary: Path, path: Path, kind: FolderKind) -> None:
    """Rename `temporary` to `path`; what was there is renamed aside first and comes back if that fails."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = _temporary_sibling(path)
    path.rename(aside)
    try:
        if foreign := kind.foreign(aside):  # it came between the check and the renaming
            raise LoraFactoryError(f"{path / foreign} has just been written by somebody else; nothing is replaced")
        temporary.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Make a file's or folder's content durable; a folder cannot be opened for that on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
