"""The fault drill, small: whatever happens to a collection, the same command ends with the undisturbed zoo."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from filelock import SoftFileLease
from helpers.fault_worker import collect_quietly
from helpers.runs import SMALL, contents, text_task

from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import StorageError
from lora_factory.tasks.task_file import save_tasks

SETTINGS = replace(SMALL, steps=60, snapshots=4, state_every=10, seeds=(0, 1))
TASKS = ("code", "letters", "prose")
# A server that has imported everything, and trained nothing, makes new processes at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lora_factory.collection.collect"])


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    save_tasks([text_task(name, f"This is about {name}, and goes on for a while.") for name in TASKS], path)
    return path


@pytest.fixture(scope="module")
def calm(task_file: Path, pico_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed collection."""
    folder = tmp_path_factory.mktemp("calm") / "zoo"
    collect_adapters(task_file, pico_model_folder, folder, SETTINGS)
    return folder


def test_kills_at_random_change_nothing(
    task_file: Path, pico_model_folder: Path, tmp_path: Path, calm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, log, source, killed = tmp_path / "zoo", tmp_path / "log", random.Random(0), 0
    log.touch()
    while killed < 10:
        process = CONTEXT.Process(
            target=collect_quietly, args=(task_file, pico_model_folder, folder, SETTINGS, log), daemon=True
        )
        process.start()
        if killed == 0:
            wait_until(process, lambda: list(folder.glob(".collection/state/[!.]*@*/state.json")))
        else:
            wait_until(process, lambda: process.pid in holders(folder))  # noqa: B023
            process.join(source.uniform(0, 0.3))
        if process.exitcode is not None:
            break  # all is collected
        process.kill()
        process.join()
        killed += 1
    assert killed >= 3, "it went on for long enough to be killed a few times"
    zoo = collect_adapters(task_file, pico_model_folder, folder, SETTINGS)
    said = log.read_text() + caplog.text
    assert contents(folder) == contents(calm)
    assert zoo.verify() == []
    assert "taking over" in said and "which is gone" in said
    assert "the run continues at step" in said
    assert not [*(folder / ".collection" / "leases").iterdir(), *(folder / ".collection" / "state").iterdir()]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_file_is_named_and_its_run_made_again(
    damage: Callable[[Path], None], task_file: Path, pico_model_folder: Path, tmp_path: Path, calm: Path
) -> None:
    zoo = collect_adapters(task_file, pico_model_folder, tmp_path / "zoo", SETTINGS)
    path = zoo.folder / "code" / "seed-1" / "checkpoints.safetensors"
    damage(path)
    (problem,) = zoo.verify()
    assert str(path) in problem and f"delete the folder {path.parent} and collect that run again" in problem
    path.parent.rename(tmp_path / "damaged")
    collect_adapters(task_file, pico_model_folder, zoo.folder, SETTINGS)
    assert contents(zoo.folder) == contents(calm)


def test_a_read_only_folder_is_named(task_file: Path, pico_model_folder: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write into a read-only folder")
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        collect_adapters(task_file, pico_model_folder, tmp_path / "zoo", SETTINGS)
    tmp_path.chmod(0o700)


def wait_until(process: BaseProcess, condition: Callable[[], object]) -> None:
    """Until it is so, or the process has ended."""
    end = time.monotonic() + 300
    while process.is_alive() and not condition():
        assert time.monotonic() < end, "it does not get to work"
        time.sleep(0.005)


def holders(folder: Path) -> set[int | None]:
    """The processes that the lease files name."""
    return {SoftFileLease(path).pid for path in (folder / ".collection" / "leases").glob("*")}
