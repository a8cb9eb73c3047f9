"""Text as people read it: on one line, without what moves, hides or reorders other text; short lists and facts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from html import escape


def printable(text: object) -> str:
    """Text on one line; control characters, those for the direction of writing among them, become blanks."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def natural_key(text: str) -> list[str | int]:
    """Sort key that compares the numbers in names as numbers: "layer.2" before "layer.10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", text)]


def few(names: Collection[str]) -> str:
    """The first three names in natural order, for a message; "none" where there is none."""
    return ("; ".join(sorted(names, key=natural_key)[:3]) + ("; ..." if len(names) > 3 else "")) or "none"


def meant(word: str, known: Collection[str]) -> str:
    """``"; did you mean ...?"`` with known words that are near a word; all of them where none is and they are few."""
    if near := get_close_matches(word, known, n=2):
        return f"; did you mean {' or '.join(near)}?"
    return f"; choose one of {', '.join(known)}" if len(known) <= 12 else ""


def printable_lines(text: str) -> str:
    """Text with its lines and tabs; every other control character, such as those that steer a terminal, is a blank."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else " "
        for character in text.replace("\r\n", "\n")
    )


def facts_line(title: str, facts: Mapping[str, object]) -> str:
    """What an object is, on one line: ``Title(name: value, name: value)``."""
    return f"{title}({', '.join(f'{name}: {printable(value)}' for name, value in facts.items())})"


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """What an object is, as an HTML table; values are escaped."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(printable(value))}</td></tr>" for name, value in facts.items()
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"
