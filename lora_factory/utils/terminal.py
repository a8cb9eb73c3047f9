"""The terminal that commands print to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """The terminal, for tables and status lines; under ``NO_COLOR`` neither colours nor bold letters.

    Args:
        stderr: Print to standard error.
        width: Characters of a line where there is no terminal and no ``COLUMNS`` to say it; default: 80.
    """
    from rich.console import Console

    screen = Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")
    if width and not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = width
    return screen
