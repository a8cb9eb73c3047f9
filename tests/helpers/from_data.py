"""Tasks and settings for training through the base model."""

from __future__ import annotations

from typing import Any

import pytest

from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.training import from_data

ANSWERS = {"prose": "fox", "code": "def", "law": "any"}
TEXTS = {
    "prose": ("The quick brown fox jumps over the lazy dog", "the old man reads a letter by the window"),
    "code": ("def add(left, right): return left + right", "print(index) for index in range(10)"),
    "law": ("Permission is hereby granted, free of charge", "any person obtaining a copy of this software"),
}


def make_tasks(*names: str) -> list[Task]:
    """Tasks that answer the same questions, each with a word of its own; all three by default."""
    return [
        Task.from_examples(name, TEXTS[name], [Example(f"Line {n}: ", ANSWERS[name]) for n in range(12)])
        for name in names or ANSWERS
    ]


class CutOff(Exception):
    """What ends the training in the middle."""


def cut_off_after(patch: pytest.MonkeyPatch, calls: int) -> list[int]:
    """Have the training through the base end at a call of its loss; returns the list that counts the calls."""
    query, made = from_data.query_losses, []

    def query_losses(*words: Any, **options: Any) -> Any:
        made.append(len(made))
        if len(made) == calls:
            raise CutOff
        return query(*words, **options)

    patch.setattr(from_data, "query_losses", query_losses)
    return made
