"""Packages that the extras bring: what needs them says so in one line, before it does any work."""

from __future__ import annotations

from importlib.util import find_spec

from lora_factory.errors import LoraFactoryError


def require(extra: str, what: str, *packages: str) -> None:
    """Refuse what needs packages that are not installed, and name the extra that brings them.

    Args:
        extra: One of those in ``pyproject.toml``.
        what: What needs them, for the error message.
        packages: Their names in Python.

    Raises:
        LoraFactoryError: When one is missing.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise LoraFactoryError(f"{what} needs {' and '.join(missing)}; run: pip install 'lora-factory[{extra}]'")
