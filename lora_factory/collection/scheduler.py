"""The work of a collection: which run is next, what becomes of one that fails, and when all is done.

Processes take runs by leases on disk (filelock's), whichever launch they belong to, so that a slow run holds up
nobody's list and the runs of a dead process are taken over; nothing but the choice of a name for the launch and the
check of the tasks, both before the first run, needs the others to answer. A counter in the process group's store would
do for one launch, but not for two, nor after a death. A lease saves double work and no more: a run is the same whoever
makes it, and lands by one rename.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache
from filelock import SoftFileLease, Timeout

from lora_factory.arguments import CollectArguments
from lora_factory.collection.progress import Progress
from lora_factory.collection.trainer import LoRATrainer, TrainingTask, comparable_settings
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.tasks.task_file import check_tasks
from lora_factory.utils.checkpoint import RunCheckpoint, writing_into
from lora_factory.utils.files import write_json
from lora_factory.utils.paths import sha256_text
from lora_factory.utils.safe_files import read_json_object, reading
from lora_factory.utils.versions import versions
from lora_factory.zoo.store import HIDDEN_FOLDER, AdapterZoo

_LOOK_SECONDS = 0.5  # between two looks at what other processes have done
_EMPTY_SECONDS = 5.0  # after which a lease that nobody wrote a name into counts as left behind
_LEASE_SECONDS = 60.0  # without a sign of life, after which a process of another host counts as dead
_LOGGER = logging.getLogger(__name__)


class LeaseLostError(LoraFactoryError):
    """Another process has taken this run over."""


@dataclass(frozen=True)
class PlannedRun:
    """One task with one seed."""

    task: TrainingTask
    seed: int

    @property
    def run(self) -> str:
        """Its run's name in the zoo."""
        return f"seed-{self.seed}"

    @property
    def key(self) -> str:
        """Its name among the hidden files, which no other run has."""
        return f"{self.task.name}@{self.run}"

    def __str__(self) -> str:
        """The name of the run in messages: ``<task>/<run>``."""
        return f"{self.task.name}/{self.run}"


class Collection:
    """The runs that one launch is to add to a zoo, seen from one of its processes.

    Args:
        zoo: Where runs go.
        trainer: Trains them.
        runs: All of them, those that are in the zoo already too.

    Raises:
        LoraFactoryError: When the zoo holds one of the runs with other settings, or runs of other weights of the base.
    """

    def __init__(self, zoo: AdapterZoo, trainer: LoRATrainer, runs: Sequence[PlannedRun]) -> None:
        """Look at what is there; nothing is written yet."""
        zoo.check_base()
        self.zoo, self.trainer, self.runs = zoo, trainer, runs
        self.accelerator: Accelerator = trainer.accelerator
        self.folder = zoo.folder / HIDDEN_FOLDER
        (launch,) = broadcast_object_list([secrets.token_hex(8)])
        self.failures = Failures(self.folder / "failures", launch)
        self._empty: dict[str, tuple[tuple[int, int], float]] = {}
        self.leases = {run.key: SoftFileLease(self._lease(run), lease_duration=_LEASE_SECONDS) for run in runs}
        self.left = []
        for run in runs:
            if self._is_finished(run):
                self._forget(run)  # what a process left that died just after it had landed the run
            else:
                self.left.append(run)
        done = len(runs) - len(self.left)
        self.progress = Progress(self.accelerator, trainer.arguments, len(runs), done)
        self._looked = time.monotonic()

    def check(self) -> None:
        """Encode what the runs that are left will read; the processes of a launch share the tasks.

        Raises:
            LoraFactoryError: When a chat template or a length does not fit a task; names all such tasks.
        """
        tasks = list({run.task.name: run.task for run in self.runs}.values())
        left = {run.task.name for run in self.left}
        share = tasks[self.accelerator.process_index :: self.accelerator.num_processes]
        fault = []
        try:
            check_tasks([task for task in share if task.name in left], self._encode)
        except LoraFactoryError as error:
            fault = [str(error)]
        if faults := gather_object(fault):
            raise LoraFactoryError("\n".join(faults))

    def _encode(self, task: TrainingTask) -> None:
        self.trainer.encode(task.examples("train"))
        self.trainer.validation(task)

    def collect(self) -> None:
        """Train until every run is in the zoo or given up, by this process or another.

        Raises:
            CollectionError: When a run is given up; the others are in the zoo then.
            StorageError: When the zoo cannot be written.
        """
        try:
            while (choice := self._choose()) is not None:
                run, lease = choice
                if run is None:
                    time.sleep(_LOOK_SECONDS)
                else:
                    try:
                        self._attempt(run, lease)
                    finally:
                        if lease:
                            lease.release()
        finally:
            self.progress.close()
        names = {run.key: str(run) for run in self.runs}
        if reasons := self.failures.reasons(names):
            raise CollectionError({names[key]: reason for key, reason in reasons.items()}, len(self.runs))

    def _choose(self) -> tuple[PlannedRun | None, SoftFileLease | None] | None:
        """A run and its lease, two times None while other processes hold all that is left, or None at the end.

        Processes that share runs follow the main one, which alone holds leases.
        """
        if not self.trainer.shares_runs:
            return self._claim()
        choice = self._claim() if self.accelerator.is_main_process else None
        shown = [None if choice is None else "" if choice[0] is None else choice[0].key]
        (key,) = broadcast_object_list(shown)
        if self.accelerator.is_main_process or key is None:
            return choice
        return next((run for run in self.runs if run.key == key), None), None

    def _claim(self) -> tuple[PlannedRun | None, SoftFileLease | None] | None:
        self._look()
        if not self.left:
            return None
        with writing_into(self.zoo.folder):
            for run in self.left:
                if self._acquire(run):
                    if not self.zoo.has_run(run.task.name, run.run):
                        return run, self.leases[run.key]
                    self.leases[run.key].release()  # landed between the look and the claim
        return None, None

    def _acquire(self, run: PlannedRun) -> bool:
        """Take the lease of a run, unless a living process holds it."""
        lease = self.leases[run.key]
        self._lease(run).parent.mkdir(parents=True, exist_ok=True)
        earlier = lease.pid
        try:
            lease.acquire(blocking=False)
        except Timeout:
            self._drop_empty(run)
            return False
        if earlier is not None:
            _LOGGER.warning("taking over %s from process %d, which is gone", run, earlier)
        return True

    def _drop_empty(self, run: PlannedRun) -> None:
        """Remove a lease that has been empty for a while: its process was killed before it wrote into the file.

        filelock takes an empty file for a lock of an early version of its own, and waits for it without end.
        """
        path = self._lease(run)
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            file = state.st_ino, state.st_mtime_ns
            if state.st_size or self._empty.get(run.key, (None, 0.0))[0] != file:
                self._empty[run.key] = file, time.monotonic()
            elif time.monotonic() - self._empty[run.key][1] >= _EMPTY_SECONDS:
                _LOGGER.warning("%s: nobody has written into its lease, which is removed", run)
                path.unlink()

    def _look(self) -> None:
        """Drop from what is left the runs that have landed and those that were given up, whoever did it."""
        self._looked, before, self.left = time.monotonic(), self.left, []
        for run in before:
            if self._is_finished(run):
                self.progress.landed(self.zoo.record(run.task.name, run.run))
            elif self.failures.given_up(run.key, self.trainer.arguments.retries):
                self.progress.failed()
            else:
                self.left.append(run)

    def _attempt(self, run: PlannedRun, lease: SoftFileLease | None) -> None:
        writes = not self.trainer.shares_runs or self.accelerator.is_main_process
        if writes:
            self._sweep(run)
        try:
            record, snapshots = self.trainer.train(
                run.task, run.seed, str(run), checkpoint=self._checkpoint(run), on_step=partial(self._on_step, lease)
            )
        except StorageError:
            raise
        except LeaseLostError:
            _LOGGER.warning("%s was taken over by another process while this one stood still", run)
        except Exception as error:
            self._note_failure(run, error, writes)
        else:
            if writes:
                with writing_into(self.zoo.folder):
                    if not self.zoo.has_run(run.task.name, run.run):
                        self.zoo.add_run(record, snapshots)
                    self._forget(run)

    def _note_failure(self, run: PlannedRun, error: Exception, writes: bool) -> None:
        if writes:
            with writing_into(self.zoo.folder):
                reason = self.failures.add(run.key, error)
            count, allowed = self.failures.count(run.key), self.trainer.arguments.retries + 1
            if not may_pass(error):
                allowed = count  # it would come again
            _LOGGER.warning("%s failed, attempt %d of %d: %s", run, count, allowed, reason)
        if self.trainer.shares_runs and not isinstance(error, LoraFactoryError):
            raise error  # it may have struck one process alone, and the others wait for it
        error.__traceback__ = None  # its frames hold the tensors of the failed run
        clear_device_cache(garbage_collection=True)

    def _on_step(self, lease: SoftFileLease | None, step: int, steps: int, loss: float) -> None:
        if lease and lease.compromise and not self.trainer.shares_runs:  # the others would wait for one that stops
            raise LeaseLostError("the lease is lost")
        self.progress.step(step, steps, loss)
        if self.accelerator.is_main_process and time.monotonic() - self._looked > 10 * _LOOK_SECONDS:
            self._look()

    def _checkpoint(self, run: PlannedRun) -> RunCheckpoint:
        trainer = self.trainer
        facts = [comparable_settings(trainer.arguments), run.seed, run.task.fingerprint(), versions()]
        facts += [trainer.layout.fingerprint(), self.accelerator.num_processes if trainer.shares_runs else 1]
        facts += ["batches by length"] * trainer.pads  # a state of an earlier version has read others
        key = sha256_text(json.dumps([*facts, self.accelerator.device.type]))
        return RunCheckpoint(self._state(run), key, trainer.arguments.state_every)

    def _state(self, run: PlannedRun) -> Path:
        return self.folder / "state" / run.key

    def _lease(self, run: PlannedRun) -> Path:
        return self.folder / "leases" / run.key

    def _forget(self, run: PlannedRun) -> None:
        """Remove what is hidden about a run that has landed."""
        shutil.rmtree(self._state(run), ignore_errors=True)
        self.failures.remove(run.key)
        if self._lease(run).exists() and not self.leases[run.key].is_locked and self._acquire(run):
            self.leases[run.key].release()

    def _sweep(self, run: PlannedRun) -> None:
        """Remove what dead processes left half written of this run, whose lease is held."""
        for folder, name in ((self.zoo.folder / run.task.name, run.run), (self.folder / "state", run.key)):
            for leftover in folder.glob(f".tmp-{name}-{'?' * 12}"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _is_finished(self, planned: PlannedRun) -> bool:
        """Return whether the zoo holds this run, made with these settings on this text."""
        task, run = planned.task, planned.run
        if not self.zoo.has_run(task.name, run):
            return False
        record = self.zoo.record(task.name, run)
        if record.descriptions != task.descriptions:
            with writing_into(self.zoo.folder):
                self.zoo.describe(record, task.descriptions)
            if self.accelerator.is_main_process:
                _LOGGER.warning("%s: its descriptions in the zoo are now those of the task file", planned)
        defaults = comparable_settings(CollectArguments())  # what an old run does not name
        wanted = {**comparable_settings(self.trainer.arguments), "data_fingerprint": task.fingerprint()}
        found = {**defaults, **record.arguments, "data_fingerprint": record.data_fingerprint}
        different = sorted(name for name in wanted if wanted[name] != found[name])
        if different:
            changes = ", ".join(f"{name}: {found[name]} there, {wanted[name]} now" for name in different)
            raise LoraFactoryError(
                f"{self.zoo.folder / task.name / run} was collected with other settings ({changes}); "
                "choose another output_dir, or delete that run folder to collect it again"
            )
        return True


def may_pass(error: Exception) -> bool:
    """Return whether a failed run may succeed when tried again: the machine failed, not the input.

    Memory, devices and disks fail with a RuntimeError, MemoryError or OSError; a wrong setting, damaged data or a loss
    that is not finite comes again with the same seed.
    """
    return isinstance(error, RuntimeError | MemoryError | OSError)


class CollectionError(LoraFactoryError):
    """Some runs of a collection failed; the others are in the zoo.

    Attributes:
        reasons: The last reason of every run that failed, by ``<task>/<run>``.
    """

    def __init__(self, reasons: Mapping[str, str], total: int) -> None:
        self.reasons = dict(reasons)
        first, reason = next(iter(self.reasons.items()))
        super().__init__(
            f"{len(self.reasons)} of {total} runs failed, first {first}: {reason}. The others are in the zoo; mend "
            "the cause and run the same command: it tries the failed ones alone"
        )


class Failures:
    """A folder with one JSON file for every run that failed and has not succeeded since.

    Args:
        folder: Made with the first failure.
        launch: Names this launch, the same in all of its processes: only its own attempts count against ``retries``.
    """

    def __init__(self, folder: str | Path, launch: str) -> None:
        """Nothing is read or written yet."""
        self.folder, self.launch = Path(folder), launch

    def add(self, name: str, error: Exception) -> str:
        """Write down that an attempt failed; only who holds the run's lease may call this.

        Args:
            name: The run's name, a file name.
            error: What happened.

        Returns:
            The reason, in one line.
        """
        kind = "" if isinstance(error, LoraFactoryError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())[:2000]
        attempt: dict[str, Any] = {"launch": self.launch, "time": datetime.now(UTC).isoformat(), "reason": reason}
        attempt["final"] = not may_pass(error)
        attempt |= {"host": socket.gethostname(), "pid": os.getpid()}
        write_json(self._path(name), {"attempts": [*self._attempts(name), attempt]})
        return reason

    def count(self, name: str) -> int:
        """Count the failed attempts at a run in this launch."""
        return sum(attempt.get("launch") == self.launch for attempt in self._attempts(name))

    def given_up(self, name: str, retries: int) -> bool:
        """Return whether this launch gives a run up: it failed too often, or would fail again."""
        return self.count(name) > retries or any(
            attempt.get("launch") == self.launch and attempt.get("final") for attempt in self._attempts(name)
        )

    def reasons(self, names: Iterable[str]) -> dict[str, str]:
        """The last reason of those runs that failed in this launch."""
        return {name: self._attempts(name)[-1]["reason"] for name in names if self.count(name)}

    def remove(self, name: str) -> None:
        """Forget the failures of a run that has landed."""
        self._path(name).unlink(missing_ok=True)

    def _attempts(self, name: str) -> list[dict[str, Any]]:
        path = self._path(name)
        if not path.is_file():
            return []
        with reading(path, "delete it"):
            attempts = read_json_object(path)["attempts"]
            return [{**attempt, "reason": str(attempt["reason"])} for attempt in attempts]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
