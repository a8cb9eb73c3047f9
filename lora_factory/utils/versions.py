"""Versions: of the packages that results depend on, and of file formats."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from lora_factory._version import __version__
from lora_factory.errors import LoraFactoryError, NewerFormatError

LIBRARIES = ("torch", "transformers", "peft")
_installed = cache(version)  # what the process has imported does not change


def versions() -> dict[str, str]:
    """The versions of this package and of those that its files depend on, by name."""
    return {"lora-factory": __version__, **{name: _installed(name) for name in LIBRARIES}}


def check_format(number: object, newest: int, what: str) -> None:
    """Refuse a file in a format that this version of the package does not read.

    Args:
        number: The file's ``format_version``.
        newest: The newest format that is read.
        what: The file, for the error message.

    Raises:
        LoraFactoryError: When the number is none, or that of a newer format.
    """
    if type(number) is not int or not 1 <= number <= newest:
        newer = type(number) is int and number > newest
        raise (NewerFormatError if newer else LoraFactoryError)(
            f"{what} has format_version={number!r}: this lora-factory reads versions up to {newest}; "
            "pip install --upgrade lora-factory"
        )
