"""The adapter zoo: a folder with one PEFT adapter, its last K checkpoints and its record for every task and run."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_factory.adapters.folder import ADAPTER_FILE, CONFIG_FILE, save_adapter_config
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError, NewerFormatError, UnreadableError
from lora_factory.utils.files import atomic_folder, write_json, write_text
from lora_factory.utils.paths import local_path, safe_name, sha256_file, sha256_text
from lora_factory.utils.printable import facts_html, facts_line, few, natural_key
from lora_factory.utils.safe_files import (
    MAX_CONFIG_BYTES,
    checked_file,
    other_kind,
    read_json_object,
    readable,
    reading,
)
from lora_factory.utils.versions import check_format
from lora_factory.zoo.run_record import FORMAT_VERSION, RunRecord

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from lora_factory.hub.client import PushOptions


ZOO_FILE = "zoo.json"
HIDDEN_FOLDER = ".collection"  # of a collection: leases, states, failures, logs
RECORD_FILE = "run.json"
ORIGIN_FILE = "import.json"  # of a run that was imported: where it came from
CHECKPOINTS_FILE = "checkpoints.safetensors"
_HEADER_BYTES = 16 << 20  # what a safetensors file may hold besides its tensors
BASE_WEIGHTS = "base_weights"  # among a run's arguments: the SHA-256 of a base that is a folder
REQUIRED_FILES = (CONFIG_FILE, ADAPTER_FILE, CHECKPOINTS_FILE)


class AdapterZoo:
    """A folder of runs that share one layout: `<task>/<run>/`, each run folder a PEFT adapter that loads by itself.

    Opening reads `zoo.json` alone, and nothing of the folder is remembered: what another process adds is there at
    once. A file's SHA-256 is checked when this object, or a selection of it, first reads the file as a whole, and
    again when its size or time has changed. Temporary folders that a crash left behind are not seen.

    Attributes:
        folder: the zoo's folder.
        layout: the layout that all runs share.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open an existing zoo.

        Raises:
            LoraFactoryError: if there is no zoo in the folder, or its `zoo.json` is damaged.
        """
        self.folder = local_path(folder).absolute()
        path = self.folder / ZOO_FILE
        with readable(path):
            there = path.exists()
        if not there:
            if kind := other_kind(self.folder):
                raise LoraFactoryError(
                    f"{self.folder} is {kind}, not a zoo; name a folder that lora-factory collect or import wrote"
                )
            make = f"make one with `lora-factory collect` or AdapterZoo.create({str(self.folder)!r}, layout)"
            if name := _pulled(self.folder):
                make = f"the repository {name} has none at that commit; name another revision or repository"
            raise LoraFactoryError(f"no zoo in {self.folder} ({ZOO_FILE} is missing); {make}")
        try:
            values = read_json_object(checked_file(self.folder, ZOO_FILE, MAX_CONFIG_BYTES))
            check_format(values.get("format_version"), FORMAT_VERSION, "the zoo")
            layout = values.get("layout")
            self.layout = AdapterLayout.from_dict(layout if isinstance(layout, dict) else {})
        except LoraFactoryError as error:
            raise type(error)(_located(path, error)) from error
        self._whole_files: dict[Path, tuple[int, int]] = {}
        self._selected: dict[str, set[str]] | None = None

    @classmethod
    def create(cls, folder: str | Path, layout: AdapterLayout) -> AdapterZoo:
        """Make an empty zoo, or open the one that is there if its layout has the same fingerprint.

        Of several processes that do so at once, one makes it and the others open that.

        Raises:
            LoraFactoryError: if the folder holds a zoo of another layout, or is a file.
        """
        folder = local_path(folder)
        if folder.exists() and not folder.is_dir():
            raise LoraFactoryError(f"{folder} is a file; choose another folder for the zoo")
        path = folder / ZOO_FILE
        if not path.exists():
            write_json(path, {"format_version": FORMAT_VERSION, "layout": layout.to_dict()}, replaces=False)
        zoo = cls(folder)
        if zoo.layout.fingerprint() != layout.fingerprint():
            raise LoraFactoryError(
                f"{folder} holds a zoo of {zoo.layout.size} weights on {zoo.layout.base_model}, expected "
                f"{layout.size} on {layout.base_model} with the same modules; choose another folder or the same LoRA "
                "settings"
            )
        return zoo

    def __repr__(self) -> str:
        """Say on one line what the zoo holds."""
        return facts_line("AdapterZoo", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("AdapterZoo", self._facts())

    def _facts(self) -> dict[str, object]:
        try:
            tasks = self.tasks
        except (OSError, UnreadableError) as error:  # somebody has removed the folder
            return {"folder": self.folder, "unreadable": getattr(error, "strerror", error)}
        return {"folder": self.folder, "tasks": f"{len(tasks)} ({few(tasks)})", **self.layout.facts()}

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks with at least one run, sorted; looks at the folder of every task."""
        with readable(self.folder), os.scandir(self.folder) as entries:
            return sorted(entry.name for entry in entries if next(self._run_names(entry.name), None) is not None)

    def runs(self, task: str) -> list[str]:
        """Return the names of a task's runs in natural order; looks at the folder of that task alone.

        Raises:
            LoraFactoryError: if the zoo has no run of that task; names the tasks it has.
        """
        runs = list(self._run_names(safe_name(task)))
        if not runs:
            raise LoraFactoryError(
                f"the zoo {self.folder} has no task {task!r}; it has {', '.join(self.tasks) or 'none yet'}"
            )
        return sorted(runs, key=natural_key)

    def select(self, tasks: Collection[str], runs: Collection[str] | None = None) -> AdapterZoo:
        """Return a view of this zoo with these tasks alone, for example the seen tasks of a leave-tasks-out fold.

        Args:
            tasks: names of tasks; each must have a run.
            runs: names of runs, for example `["seed-0"]`; all by default.

        Raises:
            LoraFactoryError: if the zoo has no such task or run.
        """
        chosen = {task: {run for run in self.runs(task) if runs is None or run in runs} for task in tasks}
        if missing := sorted(task for task, found in chosen.items() if not found):
            raise LoraFactoryError(f"the zoo {self.folder} has none of the runs {runs} of {', '.join(missing)}")
        view = AdapterZoo(self.folder)
        view._whole_files, view._selected = self._whole_files, chosen
        return view

    def has_run(self, task: str, run: str) -> bool:
        """Return whether the run is complete."""
        path = self.folder / safe_name(task) / safe_name(run) / RECORD_FILE
        with readable(path):
            return self._is_selected(task, run) and path.is_file()

    def record(self, task: str, run: str) -> RunRecord:
        """Read a run's record.

        Raises:
            LoraFactoryError: if there is no such run, or its `run.json` is damaged or another run's.
        """
        path = self.folder / safe_name(task) / safe_name(run) / RECORD_FILE
        if not self.has_run(task, run):
            raise LoraFactoryError(f"the zoo {self.folder} has no run {run!r} of task {task!r}; see AdapterZoo.runs")
        try:
            record = RunRecord.from_dict(read_json_object(checked_file(path.parent, RECORD_FILE, MAX_CONFIG_BYTES)))
            if (record.task, record.run) != (task, run):
                raise LoraFactoryError(f"it is the record of {record.task}/{record.run}")
            if not set(REQUIRED_FILES) <= set(record.sha256):
                raise LoraFactoryError(f"it lacks the SHA-256 of one of {', '.join(REQUIRED_FILES)}")
        except (NewerFormatError, UnreadableError) as error:
            raise type(error)(_located(path, error)) from error
        except LoraFactoryError as error:
            raise LoraFactoryError(f"{_located(path, error)}; {remedy(path.parent)}") from error
        return record

    def add_run(self, record: RunRecord, snapshots: Tensor, *, extra_files: Mapping[str, str] | None = None) -> None:
        """Store a run; its folder appears as a whole or not at all.

        Args:
            record: the run's record; `sha256` is filled in here.
            snapshots: (K, D) flat adapters, one for each of `record.snapshot_steps`; the last is the final adapter.
            extra_files: more text files for the run folder, {name: content}.

        Raises:
            LoraFactoryError: if the run is already there, belongs to another base model, or the checkpoints have
                another shape or are not finite.
        """
        extra_files = extra_files or {}
        self._check_new_run(record, snapshots, extra_files)
        checkpoints = self.layout.unflatten(snapshots.detach().cpu())
        with atomic_folder(self.folder / record.task / record.run) as folder:
            save_adapter_config(self.layout, folder)
            final = {key: tensor[-1].contiguous() for key, tensor in checkpoints.items()}
            save_file(final, folder / ADAPTER_FILE, metadata={"format": "pt"})
            save_file(checkpoints, folder / CHECKPOINTS_FILE, metadata={"format": "pt"})
            for name, text in extra_files.items():
                write_text(folder / name, text)
            sha256 = {name: sha256_file(folder / name) for name in sorted((*REQUIRED_FILES, *extra_files))}
            write_json(folder / RECORD_FILE, replace(record, sha256=sha256).to_dict())

    def describe(self, record: RunRecord, descriptions: Sequence[str]) -> None:
        """Replace the descriptions of a stored run; its weights stay as they are."""
        changed = replace(record, descriptions=tuple(descriptions))
        write_json(self.folder / record.task / record.run / RECORD_FILE, changed.to_dict())

    def snapshots(
        self, task: str, run: str | None = None, *, rows: slice = slice(None), verify: bool | None = None
    ) -> Tensor:
        """Read checkpoints as float32 vectors.

        Args:
            task: the task's name.
            run: one run; all runs of the task in natural order by default.
            rows: which of the K checkpoints of every run; only these are read (the file is memory-mapped).
            verify: whether the SHA-256 of the whole file is checked first, unless that was done before; by default
                only when all rows are read. Shapes, and that all numbers are finite, are checked always.

        Returns:
            (n, D), on the CPU.

        Raises:
            LoraFactoryError: if a file is missing, cut short or altered; names it and what to do.
        """
        runs = self.runs(task) if run is None else [run]
        verify = rows == slice(None) if verify is None else verify
        parts = [self._read_run(task, name, CHECKPOINTS_FILE, rows, verify) for name in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def final(self, task: str, run: str) -> Tensor:
        """Read a run's final adapter: (D,) in float32, on the CPU; errors as in `snapshots`."""
        return self._read_run(task, run, ADAPTER_FILE, None, True)

    def descriptions(self, task: str) -> tuple[str, ...]:
        """Return the descriptions of a task, those of all its runs, each once."""
        return tuple(dict.fromkeys(text for run in self.runs(task) for text in self.record(task, run).descriptions))

    def verify(self) -> list[str]:
        """Read every file of every run anew.

        Returns:
            One sentence for each problem (missing, cut short, altered, not finite), none when all is well.
        """
        self._whole_files.clear()
        problems = []
        for task in self.tasks:
            for run in sorted(self._run_names(task), key=natural_key):
                try:
                    problems += self.problems(task, run)
                except UnreadableError as error:
                    problems.append(str(error))
        return problems

    def problems(self, task: str, run: str) -> list[str]:
        """List the faults of one run for `verify`; files that were found whole are not hashed again.

        A run that another process replaces meanwhile is looked at again; one that it removes has no faults.

        Raises:
            UnreadableError: If a file is there and cannot be read now.
        """
        while True:
            state = self._state(task, run)
            found, now = self._problems(task, run), self._state(task, run)
            if not found or now == state:
                return found
            if now is None:
                return []

    def _problems(self, task: str, run: str) -> list[str]:
        try:
            record = self.record(task, run)
        except UnreadableError:
            raise
        except LoraFactoryError as error:
            return [str(error)]
        problems = []
        for name in record.sha256:
            try:
                self._whole_file(record, name)
                if name in (ADAPTER_FILE, CHECKPOINTS_FILE):
                    self._read_vectors(record, name, slice(None) if name == CHECKPOINTS_FILE else None, False)
            except UnreadableError:
                raise
            except LoraFactoryError as error:
                problems.append(str(error))
        return problems

    def check_base(self, base_model: str | Path | None = None) -> None:
        """Find out whether a base model that is a folder has the weights that the runs were trained on.

        Args:
            base_model: the folder; by default the one that the zoo names.

        Raises:
            LoraFactoryError: if it has others.
        """
        known: dict[str, RunRecord] = {}
        for task in self.tasks:
            for run in self._run_names(task):
                with contextlib.suppress(LoraFactoryError):  # a damaged record is named by those who need the run
                    record = self.record(task, run)
                    if isinstance(digest := record.arguments.get(BASE_WEIGHTS), str):
                        known[digest] = record
        folder = base_model or self.layout.base_model
        now = weights_digest(folder) if known else None
        for digest, record in known.items():
            if now not in (None, digest):
                raise LoraFactoryError(
                    f"{record.task}/{record.run} of the zoo {self.folder} was trained on other weights than those in "
                    f"{folder}; put the old ones back, or collect into another folder"
                )

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the sorted SHA-256 of all runs' records, which hold those of their files."""
        digests = []
        for path in self._record_paths():
            with contextlib.suppress(FileNotFoundError), readable(path):  # another process has removed the run
                digests.append(f"{path.parent.parent.name}/{path.parent.name} {sha256_file(path)}")
        return sha256_text("\n".join(sorted(digests)))

    def push_to_hub(self, repo_id: str, *, tags: Sequence[str] = (), **options: Unpack[PushOptions]) -> CommitInfo:
        """Push the zoo as a data set repository in one commit, unless a file is damaged; options: `PushOptions`."""
        from lora_factory.hub.client import push  # here: a zoo that is not pushed needs no network code
        from lora_factory.zoo.hub import zoo_writer

        write = zoo_writer(self, tags=tags, token=options.get("token"))
        return push(write, repo_id, default_message="Push zoo", repo_type="dataset", **options)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> AdapterZoo:
        """Download a zoo that `push_to_hub` wrote, and open it in the Hub's cache, to be read and not changed.

        Args:
            repo_id: Hub id of the data set repository.
            revision: branch, tag or commit.
            token: access token.

        Raises:
            LoraFactoryError: if it is no zoo, a file is larger than its record allows, or the Hub refuses.
        """
        from lora_factory.zoo.hub import download_zoo  # here: a zoo that is not pulled needs no network code

        return download_zoo(repo_id, revision=revision, token=token)

    def _record_paths(self) -> list[Path]:
        """All `<task>/<run>/run.json`, but none in a temporary or hidden folder."""
        return [self.folder / task / run / RECORD_FILE for task in self.tasks for run in self._run_names(task)]

    def _run_names(self, task: str) -> Iterator[str]:
        """The runs in a task's folder, if it is one, in no order."""
        path = self.folder / task
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), readable(path), os.scandir(path) as entries:
            for entry in entries:
                hidden = task.startswith(".") or entry.name.startswith(".")
                whole = not hidden and os.path.isfile(os.path.join(entry.path, RECORD_FILE))
                if whole and self._is_selected(task, entry.name):
                    yield entry.name

    def _is_selected(self, task: str, run: str) -> bool:
        return self._selected is None or run in self._selected.get(task, ())

    def _check_new_run(self, record: RunRecord, snapshots: Tensor, extra_files: Mapping[str, str]) -> None:
        where = f"{record.task}/{record.run}"
        base = (self.layout.base_model, self.layout.base_revision)
        if (record.base_model, record.base_revision) != base:
            raise LoraFactoryError(
                f"{where} is for {record.base_model} ({record.base_revision}), the zoo {self.folder} for "
                f"{base[0]} ({base[1]}); choose another zoo folder"
            )
        expected = (len(record.snapshot_steps), self.layout.size)
        if tuple(snapshots.shape) != expected:
            raise LoraFactoryError(f"{where}: snapshots have shape {tuple(snapshots.shape)}, expected {expected}")
        bad = (~torch.isfinite(snapshots)).any(dim=1).nonzero().flatten().tolist()
        if bad or not snapshots.is_floating_point():
            raise LoraFactoryError(
                f"{where}: snapshots {bad} hold NaN or infinity, or integers; lower the learning rate"
            )
        if (self.folder / where).exists():
            raise LoraFactoryError(
                f"{self.folder / where} is already there; delete that folder to collect the run again"
            )
        for name in extra_files:
            if safe_name(name) in (*REQUIRED_FILES, RECORD_FILE):
                raise LoraFactoryError(
                    f"{where}: {name} is written by the zoo itself; give the extra file another name"
                )

    def _state(self, task: str, run: str) -> tuple[int, int] | None:
        """What changes when a run is replaced; None where there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), readable(self.folder / task / run):
            status = (self.folder / safe_name(task) / safe_name(run) / RECORD_FILE).stat()
            return status.st_ino, status.st_mtime_ns
        return None

    def _read_run(self, task: str, run: str, name: str, rows: slice | None, verify: bool) -> Tensor:
        """Read vectors of a run; once more where another process has replaced the run meanwhile."""
        while True:
            state = self._state(task, run)
            try:
                return self._read_vectors(self.record(task, run), name, rows, verify)
            except LoraFactoryError:
                if self._state(task, run) in (state, None):
                    raise

    def _read_vectors(self, record: RunRecord, name: str, rows: slice | None, verify: bool) -> Tensor:
        path = self._whole_file(record, name) if verify else self.file(record, name)
        leading = () if rows is None else (len(record.snapshot_steps),)
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
                shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in keys}
                self.layout.check_shapes(shapes, leading)  # the header fits before a weight is read
                tensors = {key: file.get_tensor(key) if rows is None else file.get_slice(key)[rows] for key in keys}
            return self.layout.flatten(tensors).float()
        except (SafetensorError, LoraFactoryError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise LoraFactoryError(f"{path}: {error}; {remedy(path.parent)}") from error

    def file(self, record: RunRecord, name: str) -> Path:
        """The path of a run's file.

        Raises:
            LoraFactoryError: if it is missing, larger than expected, no ordinary file, or a link out of the run.
        """
        path = self.folder / record.task / record.run / name
        with readable(path):
            there = path.exists()
        if not there:
            raise LoraFactoryError(f"{path} is missing; {remedy(path.parent)}")
        return checked_file(path.parent, name, self.limit(record, name))

    def limit(self, record: RunRecord, name: str) -> int:
        """The most bytes that a run's file may have; a number of its weights has 8 at most."""
        weights = _HEADER_BYTES + 8 * self.layout.size * len(record.snapshot_steps)
        return weights if name.endswith(".safetensors") else MAX_CONFIG_BYTES

    def _whole_file(self, record: RunRecord, name: str) -> Path:
        """The path of a run's file, whose SHA-256 was found right since it last changed."""
        path = self.file(record, name)
        with readable(path):
            status = path.stat()
            state = (status.st_size, status.st_mtime_ns)
            if self._whole_files.get(path) == state:
                return path
            digest = sha256_file(path)
        if digest != record.sha256[name]:
            raise LoraFactoryError(
                f"{path} was cut short or altered: its SHA-256 is {digest[:12]}..., {RECORD_FILE} says "
                f"{record.sha256[name][:12]}...; {remedy(path.parent)}"
            )
        self._whole_files[path] = state
        return path


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 (hex) of a base model's weights, however they are split into files; None where no folder has any.

    Raises:
        LoraFactoryError: if a file is damaged.
    """
    paths = sorted(local_path(folder).glob("model*.safetensors")) if str(folder) else []
    digest = hashlib.sha256()
    with contextlib.ExitStack() as opened, reading(folder, "restore the base model"):
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
        places = {name: file for file in files for name in file.keys()}
        for name in sorted(places):
            weight = places[name].get_tensor(name)
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if paths else None


def _located(path: Path, error: LoraFactoryError) -> str:
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"


def remedy(run_folder: Path, otherwise: str | None = None) -> str:
    """What mends a damaged run.

    Args:
        run_folder: The run's folder.
        otherwise: What to do with one outside of the Hub's cache, unless it is to be collected again.
    """
    zoo_folder = run_folder.parents[1]
    if name := _pulled(zoo_folder):
        return (
            f"the copy in the repository {name} is damaged at commit {zoo_folder.name[:12]}; pull another revision of "
            "it, or ask its author to push it again"
        )
    return otherwise or f"delete the folder {run_folder} and collect that run again"


def _pulled(zoo_folder: Path) -> str | None:
    """The repository that a folder in the Hub's cache (``datasets--user--name/snapshots/<commit>``) comes from."""
    kind, _, name = zoo_folder.parent.parent.name.partition("--")
    return name.replace("--", "/") if kind == "datasets" and zoo_folder.parent.name == "snapshots" else None
