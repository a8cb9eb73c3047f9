"""Runs of a collection that failed: why, how often, and one error that names them all at the end."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_factory.errors import LoraFactoryError
from lora_factory.files import write_json
from lora_factory.safe_files import read_json_object, reading


def may_pass(error: Exception) -> bool:
    """Whether a run that failed may succeed when it is tried again: what the machine did, not what it was given.

    Memory, devices and disks fail with a RuntimeError, MemoryError or OSError; a wrong setting, damaged data or a loss
    that is not finite comes again with the same seed.
    """
    return isinstance(error, RuntimeError | MemoryError | OSError)


class CollectionError(LoraFactoryError):
    """Some runs of a collection failed; the others are in the zoo.

    Attributes:
        reasons: The last reason of every run that failed, by ``<task>/<run>``.
    """

    def __init__(self, reasons: Mapping[str, str], total: int) -> None:
        self.reasons = dict(reasons)
        first, reason = next(iter(self.reasons.items()))
        super().__init__(
            f"{len(self.reasons)} of {total} runs failed, first {first}: {reason}. The others are in the zoo; mend "
            "the cause and run the same command: it tries the failed ones alone"
        )


class Failures:
    """A folder with one JSON file for every run that failed and has not succeeded since.

    Args:
        folder: Made with the first failure.
        launch: Names this launch, the same in all of its processes: only its own attempts count against ``retries``.
    """

    def __init__(self, folder: str | Path, launch: str) -> None:
        """Nothing is read or written yet."""
        self.folder, self.launch = Path(folder), launch

    def add(self, name: str, error: Exception) -> str:
        """Write down that an attempt failed; only who holds the run's lease may call this.

        Args:
            name: The run's name, a file name.
            error: What happened.

        Returns:
            The reason, in one line.
        """
        kind = "" if isinstance(error, LoraFactoryError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())[:2000]
        attempt: dict[str, Any] = {"launch": self.launch, "time": datetime.now(UTC).isoformat(), "reason": reason}
        attempt["final"] = not may_pass(error)
        attempt |= {"host": socket.gethostname(), "pid": os.getpid()}
        write_json(self._path(name), {"attempts": [*self._attempts(name), attempt]})
        return reason

    def count(self, name: str) -> int:
        """How many attempts at a run failed in this launch."""
        return sum(attempt.get("launch") == self.launch for attempt in self._attempts(name))

    def given_up(self, name: str, retries: int) -> bool:
        """Whether this launch tries a run no more: it failed too often, or in a way that would come again."""
        return self.count(name) > retries or any(
            attempt.get("launch") == self.launch and attempt.get("final") for attempt in self._attempts(name)
        )

    def reasons(self, names: Iterable[str]) -> dict[str, str]:
        """The last reason of those runs that failed in this launch."""
        return {name: self._attempts(name)[-1]["reason"] for name in names if self.count(name)}

    def remove(self, name: str) -> None:
        """Forget the failures of a run that has landed."""
        self._path(name).unlink(missing_ok=True)

    def _attempts(self, name: str) -> list[dict[str, Any]]:
        path = self._path(name)
        if not path.is_file():
            return []
        with reading(path, "delete it"):
            attempts = read_json_object(path)["attempts"]
            return [{**attempt, "reason": str(attempt["reason"])} for attempt in attempts]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
