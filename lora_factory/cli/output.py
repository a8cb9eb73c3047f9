"""Print for commands."""

from __future__ import annotations

import argparse
import shlex
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_factory.utils.terminal import console


def say(*lines: str, stderr: bool = False, wrap: bool = False) -> None:
    """Print lines as they are: without markup or colours.

    Args:
        *lines: The lines.
        stderr: Print to standard error.
        wrap: Break long lines of a terminal between words; for sentences, not for what is to be pasted.
    """
    if lines:
        screen = console(stderr=stderr)
        if wrap and screen.is_terminal:
            whole: Any = {"break_long_words": False, "break_on_hyphens": False}
            lines = tuple(textwrap.fill(line, screen.width, **whole) for line in lines)
        screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def say_next(options: argparse.Namespace, *words: str) -> None:
    """Print the command that usually follows, ready to be pasted."""
    if not options.quiet:
        say(f"next: lora-factory {shlex.join(words)}")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the place in the code that they come from."""

    def line(message: Warning | str, *place: Any, **more: Any) -> str:  # noqa: ANN401
        return f"warning: {' '.join(str(message).split())}\n"

    usual, warnings.formatwarning = warnings.formatwarning, line
    try:
        yield
    finally:
        warnings.formatwarning = usual
