"""Text from outside as people may see it: on one line, with nothing that moves, hides or reorders other text."""

from __future__ import annotations


def printable(text: object) -> str:
    """Text on one line; control characters, those for the direction of writing among them, become blanks."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())
