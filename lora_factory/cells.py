"""Finished cells of an evaluation as JSON lines, so that an interrupted one continues and repeats nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class CellLog:
    """A file with one JSON object a finished cell, keyed by a fingerprint of everything that the cell depends on.

    A line that a crash cut off is dropped when the file is opened; a cell counts once its whole line is on disk.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the finished cells of ``path``; it is made with the first new one."""
        self.path = Path(path)
        self._cells: dict[str, dict[str, Any]] = {}
        whole = b""
        if self.path.is_file():
            raw = self.path.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) < len(raw):
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
        for line in whole.splitlines():
            cell = json.loads(line)
            self._cells[cell["key"]] = cell

    def get_or_compute(self, facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of these facts, from the file or computed now.

        Args:
            facts: JSON values that fix the result: task, method, seeds, fingerprints of data and weights.
            compute: Makes the cell's figures when it is not there.
        """
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if key not in self._cells:
            cell = {"key": key, **facts, **compute()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._cells[key] = cell
        return self._cells[key]
