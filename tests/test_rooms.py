"""The rooms of the package: what they export, where things are, and the import paths of version 0.1."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from lora_factory._moved import MOVED

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_factory"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_gives_what_it_names(room: str) -> None:
    module = import_module(f"lora_factory.{room}")
    assert "In: " in module.__doc__ and "Out: " in module.__doc__
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_the_architecture_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tables = page[page.index("## Where is") :]
    named = re.findall(r"`([a-z_]+/[a-z_]+\.py|[a-z_]+\.py)", tables)
    assert len(named) > 20
    assert [name for name in named if not (PACKAGE / name).is_file()] == []


def test_old_import_paths_work_and_say_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"lora_factory\.tasks\.text\.DataSource; the old path goes"):
        from lora_factory.data_source import DataSource
    assert DataSource.__module__ == "lora_factory.tasks.text"
    with pytest.raises(ImportError, match="nothing"):
        from lora_factory.data_source import nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        import_module("lora_factory.never_there")


@pytest.mark.parametrize("old", MOVED)
def test_old_modules_lead_to_modules(old: str) -> None:
    for home in MOVED[old].split():
        import_module(f"lora_factory.{home}")
