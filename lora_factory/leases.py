"""Leases on disk: which process works on which run, among all processes of all launches that share a zoo.

A lease is a file that one process alone can create. Its holder touches it every few seconds; when it stops doing so,
or is a process of this host that is gone, another process takes the lease over by creating the next generation of the
file. No clock of one host is compared with that of another: a process goes by how long it has seen no touch itself.
A lease saves double work and no more. Results do not depend on it, since a run is the same whoever makes it and lands
by one rename.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

STALE_SECONDS = 60.0
_PROCESS_NAMESPACE = Path("/proc/self/ns/pid")
_CLOCK_SLACK = 5.0  # seconds by which the start of one process may be told differently when clocks are set
_LOGGER = logging.getLogger(__name__)


class Leases:
    """The leases in one folder.

    Args:
        folder: Made with the first lease.
        stale_seconds: How long a lease must have been seen untouched before it counts as that of a dead process.
    """

    def __init__(self, folder: str | Path, *, stale_seconds: float = STALE_SECONDS) -> None:
        """Nothing is read or written yet."""
        self.folder, self.stale_seconds = Path(folder), stale_seconds
        self._seen: dict[Path, tuple[int, float]] = {}  # last touch, and since when it is known

    def claim(self, name: str) -> Lease | None:
        """The lease of this name, or None while a living process holds it.

        Args:
            name: What is leased, a file name.

        Raises:
            OSError: When the folder cannot be written.
        """
        held = self._generations(name)
        if held and not self._is_dead(held[-1]):
            return None
        if held:
            _LOGGER.warning("taking over %s from %s, which is gone", name, _described(_holder(held[-1])))
        generation = _generation(held[-1]) + 1 if held else 1
        path = self.folder / f"{name}.{generation}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(_this_process(), file)
        except FileExistsError:
            return None
        except OSError:
            path.unlink(missing_ok=True)
            raise
        if self._generations(name)[-1:] != [path]:  # what was looked at had been taken over and removed meanwhile
            path.unlink(missing_ok=True)
            return None
        for older in held:
            older.unlink(missing_ok=True)
        return Lease(path, self.stale_seconds / 6)

    def remove_dead(self, name: str) -> None:
        """Remove the lease of this name if its holder is dead; for what needs no work any more."""
        for path in self._generations(name):
            if self._is_dead(path):
                path.unlink(missing_ok=True)

    def _generations(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}.*"), key=_generation)

    def _is_dead(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False  # released just now; the next look will see that
        holder = _holder(path)
        if holder.get("host") == _host() and not _is_alive(holder):
            return True
        if self._seen.get(path, (None, 0.0))[0] != touched:
            self._seen[path] = touched, time.monotonic()
            return False
        return time.monotonic() - self._seen[path][1] > self.stale_seconds


class Lease:
    """A lease that this process holds: touched by a thread inside the ``with`` block, released at its end.

    Attributes:
        lost: Whether another process has taken it over, because this one was stopped for too long.
    """

    def __init__(self, path: Path, touch_seconds: float) -> None:
        self.path, self.lost = path, False
        self._touch_seconds = touch_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, name=f"lease {path.name}", daemon=True)

    def __enter__(self) -> Lease:
        """Start to touch the file."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop to touch the file and give the lease back."""
        self._ended.set()
        self._thread.join()
        self.release()

    def release(self) -> None:
        """Give the lease back."""
        self.path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ended.wait(self._touch_seconds):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self.lost = True
                return
            except OSError as error:  # a network file system that is away for a while
                _LOGGER.warning("cannot touch %s: %s", self.path, error)


def _generation(path: Path) -> int:
    number = path.name.rpartition(".")[2]
    return int(number) if number.isdigit() else 0


def _this_process() -> dict[str, Any]:
    started = psutil.Process().create_time()
    return {"host": _host(), "pid": os.getpid(), "started": started, "time": datetime.now(UTC).isoformat()}


def _holder(path: Path) -> dict[str, Any]:
    """Who a lease file names; nobody when it is gone, or was not yet written to its end."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _host() -> str:
    """The host and, since containers may share its name, the name space in which process ids are counted."""
    return f"{socket.gethostname()} {_PROCESS_NAMESPACE.stat().st_ino if _PROCESS_NAMESPACE.exists() else ''}".strip()


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a process of this host still runs, and is no younger one with the same id."""
    try:
        process = psutil.Process(holder["pid"])
        same = abs(process.create_time() - holder["started"]) < _CLOCK_SLACK
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {str(holder.get('host', '?')).partition(' ')[0]}"
