"""Names of a package that are loaded from its modules when they are first used (PEP 562)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from lora_factory._moved import find


def lazy(package: str, modules: dict[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: ``__name__`` of the package.
        modules: For every module, relative to the package, the names that it gives, with blanks between them.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> object:
        if name not in homes:
            return find(package, name)
        with no_collection():
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)


@contextmanager
def no_collection() -> Iterator[None]:
    """Leave the cyclic garbage of the block for later: an import of thousands of modules has next to none.

    Python would look through all of them again and again, which is a seventh of the time that torch and transformers
    take to import.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
