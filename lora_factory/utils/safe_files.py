"""Reading files that somebody else may have written: bounded, inside their folder, failing with one clear error."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public, not re-exported

from lora_factory.errors import LoraFactoryError, UnreadableError

MAX_CONFIG_BYTES = 16 << 20
MAX_JSON_BYTES = 512 << 20  # COCO's largest annotation file has 448 MB
_MAX_DEPTH = 64  # our own files are nested 8 deep at most
_MANY_DIGITS = re.compile(r"\d{300}")  # of a number: beyond any float
_LARGE_EXPONENT = re.compile(r"[eE]\+?\d{3}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def checked_file(folder: Path, name: str, limit: int) -> Path:
    """The path of an ordinary file of a folder.

    Links may point inside of the folder, or from a snapshot of the Hub's cache to its blobs, and nowhere else.

    Raises:
        LoraFactoryError: When it is missing, larger than ``limit`` bytes, no ordinary file, or a link that leads out.
        UnreadableError: When it is there and cannot be read.
    """
    path = folder / name
    try:
        with readable(path):
            real, home = path.resolve(strict=True), folder.resolve(strict=True)
            status = real.stat()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise LoraFactoryError(
            f"{path} is missing or cannot be read ({error}); name a folder that this package or PEFT wrote"
        ) from error
    blobs = [above.parent.parent / "blobs" for above in (home, *home.parents) if above.parent.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (home, *blobs[:1])):
        raise LoraFactoryError(f"{path} is a link to {real}, outside of its folder; it is not followed")
    if not stat.S_ISREG(status.st_mode):
        raise LoraFactoryError(f"{path} is no ordinary file")
    check_size(str(path), status.st_size, limit)
    with readable(path):
        real.open("rb").close()  # parsers call a file that they may not read a missing one
    return path


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """A context in which a file or folder is read; that it is missing, or no folder, is left to the caller.

    Raises:
        UnreadableError: When the file system refuses.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnreadableError(
            f"{path} cannot be read ({error.strerror or error}); let this user read it, or try again"
        ) from error


@contextlib.contextmanager
def reading(path: str | Path, remedy: str = "write or download it again") -> Iterator[None]:
    """A context in which a foreign file is parsed: whatever a parser raises becomes our error with the file's name.

    Args:
        path: The file.
        remedy: What the user can do about a damaged one.

    Raises:
        LoraFactoryError: When the block raises anything but Ctrl-C and the like; our own errors pass unchanged.
    """
    try:
        yield
    except LoraFactoryError:
        raise
    except Exception as error:  # somebody else's file: whatever a parser raises, it cannot be read
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise LoraFactoryError(f"{path} is damaged or cannot be read ({reason}); {remedy}") from error


def read_bytes(path: str | Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of an ordinary file.

    Raises:
        LoraFactoryError: When it is missing, may not be read, is no ordinary file (a folder, a pipe, a device), or has
            more than ``limit`` bytes.
        UnreadableError: When it is there and cannot be read.
    """
    try:
        path = Path(path).expanduser()
        with readable(path):
            check_ordinary(path, limit)
            with path.open("rb") as file:
                content = file.read(limit + 1)
    except UnreadableError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a ValueError: a name with a NUL or half of a surrogate pair
        reason = getattr(error, "strerror", None) or error
        raise LoraFactoryError(f"{path} cannot be read ({reason}); check the path") from error
    check_size(str(path), len(content), limit)
    return content


def check_ordinary(path: Path, limit: int) -> None:
    """Refuse what is no ordinary file, so that reading it may never end, or has more than ``limit`` bytes.

    Raises:
        LoraFactoryError: When it is refused.
        OSError: When it is missing.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise LoraFactoryError(f"{path} is no ordinary file; name a file")
    check_size(str(path), status.st_size, limit)


def read_text(path: str | Path, limit: int = MAX_JSON_BYTES) -> str:
    """The text of an ordinary file in UTF-8, with or without a byte order mark.

    Raises:
        LoraFactoryError: When `read_bytes` refuses the file, or it is no UTF-8 text.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoraFactoryError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): it was cut short or altered, or has "
            "another encoding; restore it or save it as UTF-8"
        ) from error


def read_json(path: str | Path, *, limit: int = MAX_JSON_BYTES) -> Any:  # noqa: ANN401
    """Read a JSON file that somebody else may have written; the one function that does it.

    For a file of a folder that came from elsewhere, pass what `checked_file` returns.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        LoraFactoryError: When `read_text` refuses the file, it is no JSON, is nested more than 64 deep, holds NaN,
            infinity, a number of 300 digits or half of a surrogate pair.
    """
    text = read_text(path, limit)
    try:
        small = _small if _MANY_DIGITS.search(text) else None  # the digits may be in a string
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=small, parse_float=small)
        _check_values(value, text)
    except (ValueError, RecursionError) as error:
        raise LoraFactoryError(
            f"{path} is no valid JSON ({str(error)[:300]}); it was cut short or altered; restore it or make it again"
        ) from error
    return value


def read_json_object(path: str | Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file of somebody else's holds; as `read_json`, and refuses every other value."""
    values = read_json(path, limit=limit)
    if not isinstance(values, dict):
        raise LoraFactoryError(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values


def _small(number: str) -> float:
    if _MANY_DIGITS.search(number):
        raise ValueError("a number has 300 digits or more")
    return int(number) if number.removeprefix("-").isdigit() else float(number)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_values(value: Any, text: str) -> None:  # noqa: ANN401
    """Refuse what is nested too deep, and what Python reads from valid JSON and nothing else can take."""
    escapes = _SURROGATE.search(text) is not None
    infinite = _LARGE_EXPONENT.search(text) is not None
    level = [value]
    for _ in range(_MAX_DEPTH):
        if escapes and any(isinstance(one, str) and not one.isascii() and _SURROGATES.search(one) for one in level):
            raise ValueError("half of a surrogate pair is no text")
        if infinite and any(isinstance(one, float) and math.isinf(one) for one in level):
            raise ValueError("a number is larger than any float")
        keys = [name for one in level if isinstance(one, dict) for name in one] if escapes else []
        values = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [*keys, *itertools.chain.from_iterable(values)]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def other_kind(folder: Path) -> str | None:
    """Name the kind of a folder by a file that it holds, for an error that says what it is instead."""
    for name, kind in (("zoo.json", "a zoo"), ("adapter_config.json", "an adapter"), ("config.json", "a model")):
        if (folder / name).is_file():
            with contextlib.suppress(LoraFactoryError):
                values = read_json_object(folder / name, limit=MAX_CONFIG_BYTES)
                return "a generator" if values.get("model_type") == "cvae_lora" else kind
            return kind
    return None


def folder_here(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model that is on this machine: a folder of that name, or the Hub's cache's of a Hub id."""
    if (folder := Path(name)).is_dir():
        return folder
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # it is no Hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_size(what: str, size: int, limit: int) -> None:
    """Refuse a file of more than ``limit`` bytes."""
    if size > limit:
        raise LoraFactoryError(f"{what} has {size:,} bytes, at most {limit:,} are expected; it is not read")
