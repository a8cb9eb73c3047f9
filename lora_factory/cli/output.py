"""Print for commands; rich is imported when something is printed."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """The terminal, for tables and status lines."""
    from rich.console import Console

    return Console(stderr=stderr)


def say(*lines: str, stderr: bool = False) -> None:
    """Print lines as they are: without markup, colours or wrapping."""
    if lines:
        console(stderr=stderr).print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def say_next(options: argparse.Namespace, *words: str) -> None:
    """Print the command that usually follows, ready to be pasted."""
    if not options.quiet:
        say(f"next: lora-factory {shlex.join(words)}")
