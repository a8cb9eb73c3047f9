"""Objects of JSON files: any number of keys, none of them twice, whichever function reads the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.local_rows import read_rows
from lora_factory.utils.yaml_files import read_values

KEYS = [f"key {number}" for number in range(20_000)]
READERS: dict[str, Callable[[Path], Any]] = {
    "values": lambda path: read_values(path, "task file"),
    "rows": lambda path: next(read_rows(path, "json")),
}


def write(path: Path, keys: list[str]) -> Path:
    path.write_text("{" + ", ".join(f'{json.dumps(key)}: "{number}"' for number, key in enumerate(keys)) + "}")
    return path


@pytest.mark.parametrize("reader", READERS)
def test_an_object_of_many_keys(tmp_path: Path, reader: str) -> None:
    read = READERS[reader]
    assert list(read(write(tmp_path / "a.json", KEYS))) == KEYS
    for doubled in (KEYS[0], KEYS[-1]):
        with pytest.raises(LoraFactoryError, match=rf"a\.json .*the key '{doubled}' stands twice"):
            read(write(tmp_path / "a.json", [*KEYS, doubled]))


def test_numbers_are_those_that_people_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("[7, -3, +4, 0, 010, 08, 0x10, 0b11, 1:30, 1_000, 1.5, 1.0e-3]")
    found = read_values(tmp_path / "a.yaml", "task file")
    assert found == [7, -3, 4, 0, "010", "08", "0x10", "0b11", "1:30", "1_000", 1.5, 0.001]
