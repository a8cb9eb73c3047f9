"""Paths and names that come from outside, and fingerprints of files and texts."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_factory.errors import LoraFactoryError

_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # what file systems in common use take
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def local_path(path: str | Path) -> Path:
    """Return a path that a user named, with ``~`` and ``~user`` replaced by the home folder.

    Raises:
        LoraFactoryError: When it is no text or path, is empty, names an unknown user, or is no path for any file
            system: it holds a NUL character or half of a surrogate pair, or is too long.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise LoraFactoryError(f"{path!r} is no path; name a file or folder")
    try:
        long = len(os.fsencode(path)) > _MAX_PATH_BYTES
        if long or "\0" in str(path) or any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in Path(path).parts):
            raise LoraFactoryError(
                f"path {str(path)[:80]!r} holds a NUL character, or a name of more than {_MAX_NAME_BYTES} bytes, or "
                f"has more than {_MAX_PATH_BYTES:,} bytes; give a file, a folder or a Hub id"
            )
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
    """The folder of files that can be made again: ``$LORA_FACTORY_CACHE``, by default ``~/.cache/lora_factory``."""
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
    """A Hub id with its revision, or the name of a folder or file with a hash of its weights and settings."""
    path = Path(name)
    if not path.exists():
        return f"{name}@{revision}" if revision else name
    files = [path]
    if path.is_dir():
        files = sorted(one for ending in ("safetensors", "json", "txt") for one in path.glob(f"*.{ending}"))
    digest = sha256_text("".join(map(sha256_file, files)))
    return f"{path.resolve().name}#{digest[:16]}"
