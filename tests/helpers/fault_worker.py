"""What a process of the fault drill does, in a module of its own that a new process imports quickly."""

from __future__ import annotations

import os
from pathlib import Path

from lora_factory.arguments import CollectArguments
from lora_factory.collection.collect import collect_adapters


def collect_quietly(task_file: Path, model: Path, folder: Path, settings: CollectArguments, log: Path) -> None:
    """Collect, with all words going to a file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    collect_adapters(task_file, model, folder, settings)
