"""Tools for whole zoos: remove runs or checkpoints, and merge several zoos."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from lora_factory.errors import LoraFactoryError, NewerFormatError, UnreadableError
from lora_factory.utils.files import atomic_folder, remove_folder, write_json
from lora_factory.utils.folders import FolderKind, check_folder, run_kind
from lora_factory.utils.paths import local_path, sha256_file
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import (
    CHECKPOINTS_FILE,
    ORIGIN_FILE,
    RECORD_FILE,
    REQUIRED_FILES,
    ZOO_FILE,
    AdapterZoo,
    remedy,
)


def prune(
    zoo: AdapterZoo,
    *,
    tasks: Collection[str] = (),
    runs: Collection[str] = (),
    damaged: bool = False,
    keep_last: int | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Remove runs, or the older checkpoints of runs.

    Args:
        zoo: The zoo.
        tasks: Look at the runs of these tasks only; default: of all.
        runs: Look at runs of these names only; default: at all.
        damaged: Remove those among them that ``AdapterZoo.problems`` finds fault with. One that a newer version of
            this package wrote is not among them, nor one that cannot be read now.
        keep_last: Remove no run, but all of its checkpoints except for the last ones, as many as this; at least 1.
        dry_run: Change nothing.

    Returns:
        One sentence for each change.

    Raises:
        LoraFactoryError: When it is not said what to remove, ``keep_last`` is below 1, a task or run is not there, or
            one whose checkpoints are to be removed is damaged.
    """
    if keep_last is not None and keep_last < 1:
        raise LoraFactoryError(f"keep_last={keep_last} must be 1 or more; to remove whole runs, leave it out")
    if (damaged and keep_last) or not (tasks or runs or damaged or keep_last):
        raise LoraFactoryError("say what to remove: name tasks or runs, or give either damaged=True or keep_last=")
    pairs = [(task, run) for task in tasks or zoo.tasks for run in zoo.runs(task) if not runs or run in runs]
    if missing := set(runs) - {run for _, run in pairs}:
        raise LoraFactoryError(f"the zoo {zoo.folder} has no run named {', '.join(sorted(missing))} there")
    done = []
    for task, run in pairs:
        if keep_last:
            record = zoo.record(task, run)
            surplus = len(record.snapshot_steps) - keep_last
            if surplus > 0:
                if not dry_run:
                    _keep_last(zoo, record, keep_last)
                done.append(f"{task}/{run}: removed {surplus} of {len(record.snapshot_steps)} snapshots")
            continue
        problems = _damage(zoo, task, run) if damaged else []
        if problems or not damaged:
            folder, kind = zoo.folder / task / run, _kind_of(zoo, task, run)
            if foreign := kind.foreign(folder):
                raise LoraFactoryError(
                    f"{folder} holds {foreign!r}, which the zoo may not have written, so it is not removed; move that "
                    "file elsewhere first"
                )
            check_folder(folder, kind, overwrite=True)
            if not dry_run:
                remove_folder(folder, kind)
                with contextlib.suppress(OSError):  # it has other runs
                    (zoo.folder / task).rmdir()
            done.append(f"{task}/{run}: removed" + (f", since {problems[0]}" if problems else ""))
    return done


def merge(sources: Iterable[AdapterZoo], output_dir: str | Path) -> AdapterZoo:
    """Copy the runs of several zoos of one layout into one.

    Args:
        sources: The zoos; a run that several of them have in the same form is copied once.
        output_dir: The zoo's folder; made when missing. What it holds already counts as one of the sources.

    Raises:
        LoraFactoryError: When layouts, commits or weights of the base differ, two zoos have different runs of one
            name, or a run is damaged; except for the last, nothing is written then.
    """
    sources, folder = list(sources), local_path(output_dir)
    if not sources:
        raise LoraFactoryError("there is nothing to merge; name at least one zoo")
    layout = sources[0].layout
    there = AdapterZoo(folder) if (folder / ZOO_FILE).exists() else None
    zoos = [*([there] if there else []), *sources]
    for zoo in zoos:
        zoo.check_base()
        if (zoo.layout.fingerprint(), zoo.layout.base_revision) != (layout.fingerprint(), layout.base_revision):
            raise LoraFactoryError(
                f"{zoo.folder} holds {zoo.layout.size} weights on {zoo.layout.base_model} "
                f"({zoo.layout.base_revision}), {sources[0].folder} {layout.size} on {layout.base_model} "
                f"({layout.base_revision}), or with other modules; merge zoos of one layout"
            )
    chosen: dict[tuple[str, str], tuple[AdapterZoo, RunRecord]] = {}
    conflicts = []
    for zoo in zoos:
        for task in zoo.tasks:
            for run in zoo.runs(task):
                record = zoo.record(task, run)
                first, other = chosen.setdefault((task, run), (zoo, record))
                if other != record:
                    conflicts.append(f"{task}/{run} of {first.folder} and {zoo.folder}")
    if conflicts:
        raise LoraFactoryError(
            f"{len(conflicts)} runs have the same name and are not the same: {', '.join(conflicts[:5])}; "
            "rename or prune one of each"
        )
    target = AdapterZoo.create(folder, layout)
    for zoo, record in chosen.values():
        if not target.has_run(record.task, record.run):
            _copy_run(zoo, record, target)
    return target


def run_files(zoo: AdapterZoo, record: RunRecord) -> dict[str, int]:
    """The files of a run, below the zoo's folder, with the most bytes that each may have."""
    names = (*record.sha256, RECORD_FILE)
    return {f"{record.task}/{record.run}/{name}": zoo.limit(record, name) for name in names}


def _damage(zoo: AdapterZoo, task: str, run: str) -> list[str]:
    """What is wrong with a run; nothing where a newer version may read it, or it is gone."""
    if not zoo.has_run(task, run):
        return []
    try:
        zoo.record(task, run)
        return zoo.problems(task, run)
    except (NewerFormatError, UnreadableError):
        return []
    except LoraFactoryError as error:
        return [str(error)]


def _kind_of(zoo: AdapterZoo, task: str, run: str) -> FolderKind:
    """The files of a run: those of its record, or all that this package writes beside a damaged one."""
    try:
        return run_kind([*zoo.record(task, run).sha256, RECORD_FILE])
    except LoraFactoryError:
        return run_kind([*REQUIRED_FILES, ORIGIN_FILE, RECORD_FILE])


def _keep_last(zoo: AdapterZoo, record: RunRecord, count: int) -> None:
    """Write a run anew with its last checkpoints alone; numbers stay bit for bit."""
    if problems := zoo.problems(record.task, record.run):
        raise LoraFactoryError(problems[0])
    run = zoo.folder / record.task / record.run
    with safe_open(zoo.file(record, CHECKPOINTS_FILE), framework="pt") as file:
        last = {key: file.get_slice(key)[-count:].contiguous() for key in file.keys()}
    with atomic_folder(run, run_kind([*record.sha256, RECORD_FILE]), overwrite=True) as folder:
        for name in set(record.sha256) - {CHECKPOINTS_FILE}:
            shutil.copyfile(zoo.file(record, name), folder / name)
        save_file(last, folder / CHECKPOINTS_FILE, metadata={"format": "pt"})
        changed = replace(
            record,
            snapshot_steps=record.snapshot_steps[-count:],
            validation_losses=record.validation_losses[-count:],
            sha256=dict(record.sha256) | {CHECKPOINTS_FILE: sha256_file(folder / CHECKPOINTS_FILE)},
        )
        write_json(folder / RECORD_FILE, changed.to_dict())


def _copy_run(zoo: AdapterZoo, record: RunRecord, target: AdapterZoo) -> None:
    """Copy a run; the copies' SHA-256 must be those of the record."""
    with atomic_folder(target.folder / record.task / record.run) as folder:
        for name, digest in record.sha256.items():
            path = zoo.file(record, name)
            if sha256_file(shutil.copyfile(path, folder / name)) != digest:
                mend = remedy(path.parent, f"prune damaged runs of {zoo.folder} first")
                raise LoraFactoryError(f"{path} was cut short or altered; {mend}")
        write_json(folder / RECORD_FILE, record.to_dict())
