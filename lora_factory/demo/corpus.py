"""Write the demo's tasks from text of the running Python environment; nothing is downloaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_factory.demo.text_kinds import KINDS, UNSEEN_KIND, TextKind
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.images import language_tasks
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import load_tasks, save_tasks
from lora_factory.tasks.text import SPLITS, Split
from lora_factory.utils.files import atomic_folder, write_text
from lora_factory.utils.folders import FolderKind, check_folder
from lora_factory.utils.paths import local_path, sha256_file, sha256_text
from lora_factory.utils.progress import progress_bar

_SUMS = "SHA256SUMS"
_DOCUMENT_BYTES = 5_000
_MIN_DOCUMENT_BYTES = 400
_TRAIN_BYTES = 400_000
_HELD_OUT_BYTES = 40_000  # validation and test each, and never more than an eighth of the text
_MIN_KIND_BYTES = 150_000
_MIN_HELD_OUT_BYTES = 8_000
_MIN_DOCUMENTS = 40
_MAX_LINE = 2_000
_GENERATED = re.compile(
    r"@generated|auto-?generated|generated (by|from|file|automatically)|do not edit", re.IGNORECASE
)


def build_corpus(folder: str | Path, *, seen: int | None = None) -> tuple[list[Task], Task]:
    """Write the demo's tasks into a folder, or load them when an earlier call wrote them.

    The folder gets `<kind>/{train,validation,test}.jsonl` with a column "text", and the task files `tasks.yaml` (seen)
    and `unseen.yaml`. It appears whole or not at all; one that has lost or changed files is written again. Documents
    of the three splits come from different files, and no validation or test document has most of its lines in common
    with others. The same environment gives the same text.

    Args:
        folder: Where to write.
        seen: How many of the seen tasks to return, in their fixed order; default: all. All are written.

    Returns:
        The seen tasks, and the one task that no adapter is trained on.

    Raises:
        LoraFactoryError: The folder holds something else, or too few kinds of text were found.
    """
    folder = local_path(folder).absolute()
    if not _is_whole(folder):
        check_folder(folder, _corpus(), overwrite=True)
        _write_corpus(folder)
    return language_tasks(load_tasks(folder / "tasks.yaml"))[:seen], language_tasks(
        load_tasks(folder / "unseen.yaml")
    )[0]


def find_documents(kind: TextKind) -> dict[Split, list[str]] | None:
    """The documents of one kind by split, in a fixed order; None when this environment has too little text of it."""
    documents: dict[str, str] = {}
    size = 0
    # Hash order mixes the packages, so that no large one fills the corpus alone.
    for candidate in sorted(kind.candidates(), key=lambda candidate: sha256_text(candidate.key)):
        text = _clean(candidate.read())
        digest = sha256_text(_essence(text)) if text else ""
        if text and digest not in documents:
            documents[digest] = _excerpt(text, digest)
            size += len(documents[digest].encode())
        if size >= _TRAIN_BYTES + 2 * _HELD_OUT_BYTES:
            break
    splits = _split([documents[digest] for digest in sorted(documents)], min(_HELD_OUT_BYTES, size // 8))
    enough = len(documents) >= _MIN_DOCUMENTS and size >= _MIN_KIND_BYTES
    return splits if enough and all(_size(splits[split]) >= _MIN_HELD_OUT_BYTES for split in SPLITS) else None


def _write_corpus(folder: Path) -> None:
    tasks = []
    for kind in progress_bar(KINDS, desc="looking for text", unit="kinds", leave=False):
        if documents := find_documents(kind):
            tasks.append(Task.from_examples(kind.name, kind.descriptions, *(documents[split] for split in SPLITS)))
    if len(tasks) < 3:
        raise LoraFactoryError(
            f"this Python environment has {len(tasks)} kinds of text with enough of it, at least 3 are needed; install"
            " lora-factory with its dependencies, or write a task file of your own for: lora-factory collect"
        )
    unseen = next((task for task in tasks if task.name == UNSEEN_KIND), tasks[-1])
    with atomic_folder(folder, _corpus(), overwrite=True) as temporary:
        save_tasks([task for task in tasks if task is not unseen], temporary / "tasks.yaml")
        save_tasks([unseen], temporary / "unseen.yaml")
        files = sorted(file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file())
        write_text(temporary / _SUMS, "".join(f"{sha256_file(temporary / name)}  {name}\n" for name in files))


def _is_whole(folder: Path) -> bool:
    """Return whether every file of the folder has its hash in SHA256SUMS, which lists task files and data."""
    if not (folder / _SUMS).is_file():
        return False
    sums = [line.split("  ", 1) for line in (folder / _SUMS).read_text(encoding="utf-8").splitlines()]
    files = {line[-1]: line[0] for line in sums}
    return {"tasks.yaml", "unseen.yaml"} <= set(files) and all(
        (folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in files.items()
    )


def _corpus() -> FolderKind:
    """The kind of folder that may be replaced: one with files of a corpus and nothing else."""
    kinds = "|".join(re.escape(kind.name) for kind in KINDS)
    files = rf"{_SUMS}|tasks\.yaml|unseen\.yaml|({kinds})/({'|'.join(SPLITS)})\.jsonl"
    return FolderKind("a corpus", files, lambda folder: (folder / UNSEEN_KIND).is_dir() or (folder / _SUMS).is_file())


def _clean(text: str | None) -> str | None:
    """The text with plain line ends; None when it is short, generated, minified or mostly data."""
    text = "\n".join(line.rstrip() for line in (text or "").splitlines()).strip() + "\n"
    if len(text.encode()) < _MIN_DOCUMENT_BYTES or "\0" in text or _GENERATED.search(text[:1_500]):
        return None
    sample = text[:_DOCUMENT_BYTES]
    letters = sum(character.isalpha() or character.isspace() for character in sample)
    return text if letters > len(sample) * 0.6 and max(map(len, text.splitlines())) <= _MAX_LINE else None


def _essence(text: str) -> str:
    """The letters of a text without copyright lines; equal for texts that differ in spacing, numbers or holders."""
    return re.sub(r"[^a-z]+", "", "\n".join(line for line in text.lower().splitlines() if "copyright" not in line))


def _excerpt(text: str, digest: str) -> str:
    """At most `_DOCUMENT_BYTES` of whole lines, from a place that the hash chooses: the heads of files look alike."""
    lines = text.splitlines(keepends=True)
    sizes = [len(line.encode()) for line in lines]
    excess = sum(sizes) - _DOCUMENT_BYTES
    if excess <= 0:
        return text
    start, skipped = 0, 0
    while skipped < int(digest[8:16], 16) % excess:
        skipped += sizes[start]
        start += 1
    end, taken = start, 0
    while end < len(lines) and taken + sizes[end] <= _DOCUMENT_BYTES:
        taken += sizes[end]
        end += 1
    return "".join(lines[start:end])


def _split(documents: Sequence[str], held_out_bytes: int) -> dict[Split, list[str]]:
    """Test and validation get the first documents that are mostly their own, train gets all others up to its size."""
    seen_in = Counter(line for document in documents for line in _long_lines(document))
    splits: dict[Split, list[str]] = {split: [] for split in SPLITS}
    room: dict[Split, int] = {"test": held_out_bytes, "validation": held_out_bytes, "train": _TRAIN_BYTES}
    for document in documents:
        lines, size = _long_lines(document), len(document.encode())
        is_own = 2 * sum(seen_in[line] > 1 for line in lines) <= len(lines)
        choices = [split for split in room if size <= room[split] and (is_own or split == "train")]
        if choices:
            splits[choices[0]].append(document)
            room[choices[0]] -= size
    return splits


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.lower().splitlines()) if len(line) >= 25}
