"""Finished cells of an evaluation as JSON lines, so that an interrupted one continues and repeats nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_factory.folders import storage_errors

_LOGGER = logging.getLogger(__name__)


class CellLog:
    """A file with one JSON object a finished cell, keyed by a fingerprint of everything that the cell depends on.

    A line that a crash cut off is dropped when the file is opened; a cell counts once its whole line is on disk. A
    damaged line is passed over, so that its cell is computed again.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the finished cells of ``path``; it is made with the first new one.

        Raises:
            StorageError: When the file cannot be read, or not be cut to whole lines.
        """
        self.path = Path(path)
        self._cells: dict[str, dict[str, Any]] = {}
        whole = b""
        with storage_errors(self.path, "read"):
            if self.path.is_file():
                raw = self.path.read_bytes()
                whole = raw[: raw.rfind(b"\n") + 1]
                if len(whole) < len(raw):
                    with self.path.open("r+b") as file:
                        file.truncate(len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                cell = json.loads(line)
                if cell.pop("sha256") != _digest(cell):
                    raise ValueError("it was altered")
                self._cells[cell["key"]] = cell
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                _LOGGER.warning("%s, line %d is damaged, its cell is computed again: %s", self.path, number, error)

    def get_or_compute(self, facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of these facts, from the file or computed now.

        Args:
            facts: JSON values that fix the result: task, method, seeds, fingerprints of data and weights.
            compute: Makes the cell's figures when it is not there.

        Raises:
            StorageError: When the file cannot be written.
        """
        key = _digest(facts)
        if key not in self._cells:
            cell = {"key": key, **facts, **compute()}
            line = json.dumps({**cell, "sha256": _digest(cell)}) + "\n"
            with storage_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            self._cells[key] = cell
        return self._cells[key]


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
