"""Settings and tasks of small collections, and what lies in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from helpers.models import TRAINING_TEXT
from lora_factory.arguments import CollectArguments
from lora_factory.tasks.task import Task

SMALL = CollectArguments(
    target_modules="q_proj,v_proj",
    steps=3,
    snapshots=2,
    batch_size=2,
    sequence_length=16,
    learning_rate=1e-2,
    validation_sequences=4,
)


def text_task(name: str, text: str = TRAINING_TEXT[0], rows: int = 5) -> Task:
    texts = [f"{number} {text}" for number in range(rows + 2)]
    return Task.from_examples(name, [f"Write {name}."], texts[2:], texts[:1], texts[1:2])


def tasks(*names: str) -> list[Task]:
    return [text_task(name, text) for name, text in zip(names, TRAINING_TEXT, strict=False)]


def modification_times(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}


TOGETHER = replace(SMALL, parallel="data", gradient_accumulation=2)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if not any(p[0] == "." for p in name.parts)}
