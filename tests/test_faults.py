"""The fault drill, small: whatever happens to a collection, the same command ends with the undisturbed zoo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from test_collect import SMALL, text_task
from test_collection import contents

from lora_factory.collect import collect_adapters
from lora_factory.errors import StorageError
from lora_factory.tasks import save_tasks
from lora_factory.zoo import AdapterZoo

SETTINGS = replace(SMALL, steps=60, snapshots=4, state_every=10, seeds=(0, 1))
TASKS = ("code", "letters", "prose")
# A server that has imported everything, and trained nothing, makes new processes at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["test_faults"])


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    save_tasks([text_task(name, f"This is about {name}, and goes on for a while.") for name in TASKS], path)
    return path


@pytest.fixture(scope="module")
def calm(task_file: Path, pico_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed collection."""
    folder = tmp_path_factory.mktemp("calm") / "zoo"
    collect_adapters(task_file, pico_model_folder, folder, SETTINGS)
    return contents(folder)


def start(*arguments: object, small_files: bool = False) -> BaseProcess:
    process = CONTEXT.Process(target=collect_quietly, args=(*arguments, small_files))
    process.start()
    return process


def collect_quietly(task_file: Path, model: Path, folder: Path, small_files: bool) -> None:
    with open(folder.parent / "log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if small_files:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    collect_adapters(task_file, model, folder, SETTINGS)


def test_kills_at_random_change_nothing(
    task_file: Path, pico_model_folder: Path, tmp_path: Path, calm: dict[str, bytes]
) -> None:
    folder, source = tmp_path / "zoo", random.Random(0)
    killed = 0
    while killed < 12:
        process = start(task_file, pico_model_folder, folder)
        wait_for(process, folder / ".collection" / "leases")
        process.join(source.uniform(0, 0.3))
        if process.exitcode is not None:
            break  # all is collected
        process.kill()
        process.join()
        killed += 1
    assert killed >= 3, "it went on for long enough to be killed a few times"
    zoo = collect_adapters(task_file, pico_model_folder, folder, SETTINGS)
    log = (tmp_path / "log").read_text()
    assert contents(folder) == calm
    assert zoo.verify() == []
    assert "taking over" in log and "which is gone" in log
    assert "the run continues at step" in log
    assert not [*(folder / ".collection" / "leases").iterdir(), *(folder / ".collection" / "state").iterdir()]


def test_files_that_cannot_grow_are_named(
    task_file: Path, pico_model_folder: Path, tmp_path: Path, calm: dict[str, bytes]
) -> None:
    process = start(task_file, pico_model_folder, tmp_path / "zoo", small_files=True)
    process.join(120)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 1
    assert "StorageError: cannot write into" in log and "File too large" in log
    assert AdapterZoo(tmp_path / "zoo").tasks == []
    collect_adapters(task_file, pico_model_folder, tmp_path / "zoo", SETTINGS)
    assert contents(tmp_path / "zoo") == calm


def test_a_truncated_file_is_named_and_its_run_made_again(
    task_file: Path, pico_model_folder: Path, tmp_path: Path, calm: dict[str, bytes]
) -> None:
    zoo = collect_adapters(task_file, pico_model_folder, tmp_path / "zoo", SETTINGS)
    path = zoo.folder / "code" / "seed-1" / "checkpoints.safetensors"
    os.truncate(path, path.stat().st_size - 9)
    (problem,) = zoo.verify()
    assert str(path) in problem and f"delete the folder {path.parent} and collect that run again" in problem
    path.parent.rename(tmp_path / "damaged")
    collect_adapters(task_file, pico_model_folder, zoo.folder, SETTINGS)
    assert contents(zoo.folder) == calm


def test_a_read_only_folder_is_named(task_file: Path, pico_model_folder: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write into a read-only folder")
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        collect_adapters(task_file, pico_model_folder, tmp_path / "zoo", SETTINGS)
    tmp_path.chmod(0o700)


def wait_for(process: BaseProcess, folder: Path) -> None:
    """Until a process holds a lease, so that it is at work, or has ended."""
    end = time.monotonic() + 120
    while process.is_alive() and not any(f'"pid": {process.pid},' in text for text in texts(folder)):
        assert time.monotonic() < end, "it does not start to work"
        time.sleep(0.005)


def texts(folder: Path) -> list[str]:
    """What the files of a folder hold, whose files come and go."""
    found = []
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.read_text())
    return found
