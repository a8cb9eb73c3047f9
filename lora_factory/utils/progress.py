"""Progress of what takes over two seconds: a bar in a terminal or a notebook, a line every ten seconds in a log."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm.auto import tqdm as bar_class
from tqdm.std import tqdm

SECONDS = 10  # between two lines of a log
DELAY = 2  # seconds before a bar appears
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} passed, {remaining} left{postfix}"

_quiet = False


def hide_progress() -> None:
    """Show no progress in this process from now on."""
    global _quiet
    _quiet = True


def progress_bar(*args: Any, disable: bool = False, **options: Any) -> Any:  # noqa: ANN401
    """A ``tqdm`` bar, or where nobody watches one, lines that a log can hold.

    Args:
        *args: As ``tqdm`` takes them: what to iterate over, if anything.
        disable: Show nothing: on all processes but the main one.
        **options: As ``tqdm`` takes them: ``total``, ``desc``, ``unit``, ``initial``, ``leave``, ``bar_format``.
    """
    options = {"delay": DELAY, "unit": "steps", **options}
    watched = sys.stderr is not None and sys.stderr.isatty()
    if watched or "ipykernel" in sys.modules:
        bar: Any = _Bar
        return bar(*args, disable=disable or _quiet, **options)
    return _Lines(*args, disable=disable or _quiet, **options)


class _Bar(bar_class):  # type: ignore[type-arg]  # it takes no parameter when the program runs
    """A bar that nothing draws before its delay has passed: ``close`` would leave it on the line of what follows."""

    def refresh(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
        """Draw the bar, if it is time."""
        if not self.delay or self._time() >= self.start_t + self.delay:  # type: ignore[attr-defined]
            super().refresh(*args, **options)


class _Lines(tqdm):  # type: ignore[type-arg]  # as above
    """A bar that prints a line of its own every `SECONDS`, and none if it ends before the first."""

    _printed = math.inf

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
        line = options.pop("bar_format", LINE).replace("|{bar}|", "")
        everything: Any = {"bar_format": line, "ascii": True, **options}
        super().__init__(*args, **everything)
        self._started = self._printed = time.monotonic()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line, if the last one is long enough ago."""
        if msg is None and time.monotonic() - self._printed >= SECONDS:
            self._printed, self._count = time.monotonic(), self.n
            self.fp.write(f"{self}\n")

    def close(self) -> None:
        """Print the last line, if there was one before it."""
        if self.disable:
            return
        if self.leave is not False and self._printed > self._started and self.n != self._count:
            self._printed = -math.inf
            self.display()
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]
