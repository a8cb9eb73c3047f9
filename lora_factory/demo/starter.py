"""Write a task file to start from, with comments, and small data that it refers to."""

from __future__ import annotations

import json
from pathlib import Path

from lora_factory.demo.corpus import find_documents
from lora_factory.demo.text_kinds import KINDS
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.text import SPLITS
from lora_factory.utils.files import atomic_folder, write_text
from lora_factory.utils.paths import local_path

STARTER_KINDS = ("licences", "python_code", "unit_tests")
DOCUMENTS = {"train": 60, "validation": 6, "test": 6}  # of every task at most, a few kilobytes each

_HEAD = """\
# Tasks for lora-factory. Each becomes a LoRA; together they teach a generator to write one from a description.
# These are examples, with text from the Python packages of this machine: put your own tasks in their place.
# A generator needs two tasks at least. To be of use it needs three or more, and about five to ten for every way in
# which they differ.
tasks:
"""
_TASK = """\
  - name: {name}
    # What the task is, in one sentence or in several wordings: what people will type to get such an adapter.
    descriptions:
{descriptions}
    # Where the examples are; paths are relative to this file. Instead of local files: `path: user/dataset` of the Hub.
    data:
      path: json
      data_files:
{files}
      text_column: text  # or prompt_column and completion_column: the loss is then on the completion only
"""


def write_starter(folder: str | Path) -> Path:
    """Write ``tasks.yaml`` and, in the folder ``data`` beside it, the examples of its three tasks.

    Args:
        folder: Where to write; made if it is missing.

    Returns:
        The task file.

    Raises:
        LoraFactoryError: When there is a ``tasks.yaml`` or a ``data`` in the folder already, or this Python
            environment has too little text.
        StorageError: When the folder cannot be written; it is a LoraFactoryError.
    """
    folder = local_path(folder)
    for name in ("tasks.yaml", "data"):
        if (folder / name).exists() or (folder / name).is_symlink():
            raise LoraFactoryError(f"{folder / name} is there already; give another folder with output_dir=")
    entries = []
    with atomic_folder(folder / "data") as data:
        for kind in KINDS:
            if kind.name not in STARTER_KINDS or (documents := find_documents(kind)) is None:
                continue
            for split in SPLITS:
                texts = documents[split][: DOCUMENTS[split]]
                rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
                write_text(data / kind.name / f"{split}.jsonl", "".join(f"{row}\n" for row in rows), durable=False)
            descriptions = "\n".join(f"      - {json.dumps(text, ensure_ascii=False)}" for text in kind.descriptions)
            files = "\n".join(f"        {split}: data/{kind.name}/{split}.jsonl" for split in SPLITS)
            entries.append(_TASK.format(name=kind.name, descriptions=descriptions, files=files))
        if not entries:
            raise LoraFactoryError("this Python environment has too little text; write a task file of your own")
    write_text(folder / "tasks.yaml", _HEAD + "\n".join(entries))
    return folder / "tasks.yaml"
