"""Snapshots in memory and on disk: the same numbers, and no more is read than is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import attach
from helpers.zoos import layout_of, record_of, snapshots_of
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TrainArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.training.train import train_generator
from lora_factory.zoo import checkpoints as snapshots_module
from lora_factory.zoo import store as zoo_module
from lora_factory.zoo.checkpoints import StoredRows, open_checkpoints, zoo_statistics
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import AdapterZoo

RUN_FILE = "checkpoints.safetensors"


@pytest.fixture(scope="module")
def layout() -> AdapterLayout:
    return layout_of()


@pytest.fixture
def zoo(tmp_path: Path, layout: AdapterLayout) -> AdapterZoo:
    """Task "a" has runs of 3, 1 and 2 snapshots, "b" has one of 3."""
    zoo = AdapterZoo.create(tmp_path / "zoo", layout)
    for number, count in enumerate((3, 1, 2)):
        zoo.add_run(record_of("a", f"seed-{number}", count), snapshots_of(layout, count, seed=number))
    zoo.add_run(record_of("b"), snapshots_of(layout, seed=7))
    return zoo


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Path]:
    """The paths that a function of the zoo's module is called with from now on."""
    calls: list[Path] = []
    function: Callable[..., Any] = getattr(owner, name)

    def counted(path: Path) -> Any:
        calls.append(Path(path))
        return function(path)

    monkeypatch.setattr(owner, name, counted)
    return calls


def spoil_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_rows_on_disk_are_those_of_a_tensor(zoo: AdapterZoo) -> None:
    everything, rows = zoo.snapshots("a"), StoredRows(zoo, "a")
    assert len(rows) == 6
    for index in range(-6, 6):
        assert torch.equal(rows[index], everything[index])
    for start in range(6):
        for stop in range(start + 1, 8):
            assert torch.equal(rows[start:stop], everything[start:stop])
    with pytest.raises(IndexError):
        rows[6]


def test_only_zoos_beyond_the_budget_stay_on_disk(zoo: AdapterZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 9 * zoo.layout.size * 4
    monkeypatch.setattr(snapshots_module, "HELD_BYTES", size)
    assert all(isinstance(rows, torch.Tensor) for rows in open_checkpoints(zoo).values())
    monkeypatch.setattr(snapshots_module, "HELD_BYTES", size - 1)
    assert all(isinstance(rows, StoredRows) for rows in open_checkpoints(zoo).values())


def test_statistics_do_not_depend_on_the_chunks(zoo: AdapterZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {task: zoo.snapshots(task).double() for task in zoo.tasks}
    mean = torch.stack([rows.mean(0) for rows in weights.values()]).mean(0)
    deviation = (torch.cat(list(weights.values())) - mean).square().mean(0)
    for chunk in (1, 2 * 4 * zoo.layout.size, 1 << 30):
        monkeypatch.setattr(snapshots_module, "_CHUNK_BYTES", chunk)
        found = zoo_statistics({task: StoredRows(zoo, task) for task in zoo.tasks})
        torch.testing.assert_close(found.mean, mean.float())
        torch.testing.assert_close(found.deviation, deviation.float())


def test_a_generator_trained_from_disk_is_the_one_trained_in_memory(
    tmp_path: Path, pico_model_folder: Path, pico_encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    zoo = AdapterZoo.create(tmp_path / "zoo", layout)
    base = {"base_model": layout.base_model, "base_revision": None}
    for number, (task, run) in enumerate((("a", "seed-0"), ("a", "seed-1"), ("b", "seed-0"))):
        record: RunRecord = record_of(task, run, **base)
        zoo.add_run(record, 0.1 * snapshots_of(layout, seed=number))
    arguments = TrainArguments(steps=3, batch_size=4, width=32, text_encoder=str(pico_encoder_folder))
    train_generator(zoo, tmp_path / "held", arguments)
    monkeypatch.setattr(snapshots_module, "HELD_BYTES", 0)
    train_generator(AdapterZoo(zoo.folder), tmp_path / "stored", arguments)
    held, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("held", "stored"))
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], stored[name]) for name in held)


def test_a_row_is_read_without_the_rest(zoo: AdapterZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zoo.snapshots("b")
    path = zoo.folder / "b" / "seed-0" / RUN_FILE
    spoil_last_byte(path)  # in the last snapshot of the last tensor
    opened, hashed = AdapterZoo(zoo.folder), calls_of(monkeypatch, zoo_module, "sha256_file")
    assert torch.equal(opened.snapshots("b", rows=slice(0, 2)), expected[:2])
    assert not hashed
    for call in (lambda: opened.snapshots("b"), lambda: opened.snapshots("b", rows=slice(0, 1), verify=True)):
        with pytest.raises(LoraFactoryError, match="cut short or altered"):
            call()
    with pytest.raises(LoraFactoryError, match="cut short or altered"):
        StoredRows(opened, "b")[0]


def test_a_file_is_hashed_once_and_again_after_it_has_changed(
    zoo: AdapterZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, opened = calls_of(monkeypatch, zoo_module, "sha256_file"), AdapterZoo(zoo.folder)
    view = opened.select(["b"])
    for reader in (opened, opened, view):
        reader.snapshots("b")
    path = zoo.folder / "b" / "seed-0" / RUN_FILE
    assert hashed == [path]
    os.utime(path, ns=(0, 0))
    view.snapshots("b")
    assert hashed == [path, path]
    spoil_last_byte(path)
    with pytest.raises(LoraFactoryError, match="cut short or altered"):
        opened.snapshots("b")


def test_the_cost_of_looking_at_every_task_is_linear(
    tmp_path: Path, layout: AdapterLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = AdapterZoo.create(tmp_path, layout)
    for number in range(12):
        zoo.add_run(record_of(f"task-{number}", count=1), snapshots_of(layout, 1))
    looked = calls_of(monkeypatch, zoo_module.os, "scandir")
    for task in zoo.tasks:
        zoo.snapshots(task, rows=slice(0, 1))
        zoo.descriptions(task)
        assert zoo.has_run(task, "seed-0")
    folders = [path.relative_to(tmp_path) for path in looked if path.is_relative_to(tmp_path)]
    assert len(folders) <= 2 + 12 * 3  # the zoo and zoo.json once; every task for tasks, snapshots and descriptions


def test_another_process_may_add_runs_at_any_time(zoo: AdapterZoo, layout: AdapterLayout) -> None:
    opened = AdapterZoo(zoo.folder)
    assert opened.tasks == ["a", "b"]
    for task, run in (("c", "seed-0"), ("a", "seed-9")):
        zoo.add_run(replace(record_of(task, run), seed=1), snapshots_of(layout))
        assert run in opened.runs(task)
    assert opened.tasks == ["a", "b", "c"]
