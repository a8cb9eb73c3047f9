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
