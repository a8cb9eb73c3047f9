"""Reading files that somebody else may have written: bounded, inside their folder, failing with one clear error."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public, not re-exported

from lora_factory.errors import LoraFactoryError

MAX_CONFIG_BYTES = 16 << 20


def checked_file(folder: Path, name: str, limit: int) -> Path:
    """The path of an ordinary file of a folder.

    Links may point inside of the folder, or from a snapshot of the Hub's cache to its blobs, and nowhere else.

    Raises:
        LoraFactoryError: When it is missing, larger than ``limit`` bytes, no ordinary file, or a link that leads out.
    """
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:
        raise LoraFactoryError(
            f"{path} is missing or cannot be read ({error}); name a folder that this package or PEFT wrote"
        ) from error
    snapshot = home if home.parent.name == "snapshots" else home.parent  # or a folder in one
    blobs = snapshot.parent.parent / "blobs"
    if not (real.is_relative_to(home) or (snapshot.parent.name == "snapshots" and real.is_relative_to(blobs))):
        raise LoraFactoryError(f"{path} is a link to {real}, outside of its folder; it is not followed")
    if not stat.S_ISREG(status.st_mode):
        raise LoraFactoryError(f"{path} is no ordinary file")
    check_size(str(path), status.st_size, limit)
    return path


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


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file of somebody else's holds.

    Raises:
        LoraFactoryError: When it is something else, or nested deeper than can be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise LoraFactoryError(f"{path} is no valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise LoraFactoryError(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def few(names: Collection[str]) -> str:
    """The first three names, for a message."""
    return "; ".join(sorted(names)[:3]) + ("; ..." if len(names) > 3 else "")


def check_size(what: str, size: int, limit: int) -> None:
    """Refuse a file of more than ``limit`` bytes."""
    if size > limit:
        raise LoraFactoryError(f"{what} has {size:,} bytes, at most {limit:,} are expected; it is not read")
