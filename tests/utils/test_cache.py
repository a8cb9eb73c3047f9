"""Finished cells of an evaluation: kept on disk, never computed twice, robust against a torn last line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lora_factory.errors import StorageError
from lora_factory.utils.cache import CellLog


class Counted:
    """A computation that counts its calls; every result is a new one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Any]:
        self.calls += 1
        return {"loss": 0.1 + self.calls}


def filled(path: Path, names: str) -> list[dict[str, Any]]:
    log = CellLog(path)
    return [log.get_or_compute({"task": name}, lambda name=name: {"loss": ord(name) / 7}) for name in names]


def test_no_cell_is_computed_twice(tmp_path: Path) -> None:
    compute = Counted()
    log = CellLog(tmp_path / "cells.jsonl")
    first = log.get_or_compute({"task": "a", "seed": 0}, compute)
    assert log.get_or_compute({"seed": 0, "task": "a"}, compute) == first
    assert compute.calls == 1
    assert log.get_or_compute({"task": "a", "seed": 1}, compute)["loss"] != first["loss"]
    assert compute.calls == 2


def test_another_process_reads_finished_cells_and_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cells.jsonl"
    before = filled(path, "ab")
    written = path.read_bytes()
    compute = Counted()
    log = CellLog(path)
    assert [log.get_or_compute({"task": name}, compute) for name in "ab"] == before
    assert compute.calls == 0
    assert path.read_bytes() == written


def test_a_line_names_facts_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    filled(path, "ab")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["task"], line["loss"]) for line in lines] == [("a", ord("a") / 7), ("b", ord("b") / 7)]


@pytest.mark.parametrize("kept", [1, 20, -1], ids=["first byte", "middle", "all but the line end"])
def test_a_torn_last_line_is_dropped_and_computed_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cells.jsonl"
    filled(path, "ab")
    whole = path.read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    path.write_bytes(first + whole[len(first) :][:kept])
    compute = Counted()
    log = CellLog(path)
    log.get_or_compute({"task": "a"}, compute)
    assert compute.calls == 0
    assert log.get_or_compute({"task": "b"}, compute)["loss"] == 1.1
    assert compute.calls == 1
    again = CellLog(path)
    assert again.get_or_compute({"task": "b"}, compute)["loss"] == 1.1
    assert compute.calls == 1
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_failed_cell_is_not_remembered(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    log = CellLog(tmp_path / "cells.jsonl")
    with pytest.raises(RuntimeError, match="out of memory"):
        log.get_or_compute({"task": "a"}, fails)
    assert log.get_or_compute({"task": "a"}, Counted())["loss"] == 1.1


def test_a_cell_whose_line_was_altered_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    before = filled(path, "abc")
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 3])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert filled(path, "abc") == before
    path.write_bytes(whole.replace(b'"loss": 1', b'"loss": 2'))
    assert filled(path, "abc") == before


@pytest.mark.parametrize("line", ["[]", "7", "{}", '{"key": []}', "[" * 100_000, "\N{BLACK HEART SUIT}"])
def test_a_line_of_something_else_is_passed_over(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    filled(path, "a")
    assert f"{path}, line 1 is damaged" in caplog.text


def test_cells_that_cannot_be_written_end_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        filled(tmp_path / "file" / "cells.jsonl", "a")
