"""A run that was cut off ends bit for bit as one that was not, whatever became of its state."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_collect import SMALL, text_task

from lora_factory.collection.trainer import AdapterFactory
from lora_factory.errors import StorageError
from lora_factory.utils import checkpoint as run_state
from lora_factory.utils.checkpoint import Checkpoint
from lora_factory.zoo.run_record import RunRecord

SETTINGS = replace(SMALL, steps=8, snapshots=6, gradient_accumulation=2)
TASK = text_task("prose")


class Cut(Exception):
    """What ends a run too early."""


@pytest.fixture
def factory(pico_model, pico_tokenizer) -> AdapterFactory:
    for layer in pico_model.model.layers:
        layer.self_attn.attention_dropout = 0.3  # so that random numbers are drawn
    return AdapterFactory.attach(pico_model, pico_tokenizer, SETTINGS, "pico/llama", Accelerator(cpu=True))


def train(
    factory: AdapterFactory, folder: Path | None = None, *, cut: int = 0, key: str = "key", seed: int = 3
) -> tuple[RunRecord, torch.Tensor, list[int]]:
    steps = []

    def on_step(step: int, total: int, loss: float) -> None:
        steps.append(step)
        assert total == SETTINGS.steps and loss > 0
        if step == cut:
            raise Cut

    checkpoint = Checkpoint(folder, key, every=3) if folder else None
    torch.rand(cut + 1)  # what others draw is of no effect
    return *factory.train(TASK, seed, "prose", checkpoint=checkpoint, on_step=on_step), steps


@pytest.mark.parametrize(("cut", "left"), [(2, 8), (3, 8), (5, 5), (8, 2)])
def test_a_run_that_was_cut_off_continues_exactly(
    factory: AdapterFactory, tmp_path: Path, cut: int, left: int
) -> None:
    record, snapshots, _ = train(factory)
    with pytest.raises(Cut):
        train(factory, tmp_path / "state", cut=cut)
    train(factory, seed=4)  # another run in the same slot in between
    again, resumed, steps = train(factory, tmp_path / "state")
    assert torch.equal(resumed, snapshots)
    assert again == record
    assert len(steps) == left, "as many steps as were missing since the last save"


def truncate(folder: Path) -> None:
    path = folder / "state.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def flip(folder: Path) -> None:
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def spoil(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 3}')


def lose(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, spoil, lose])
def test_a_damaged_state_is_named_and_not_used(
    factory: AdapterFactory, tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Cut):
        train(factory, tmp_path / "state", cut=5)
    damage(tmp_path / "state")
    _, resumed, steps = train(factory, tmp_path / "state")
    assert f"{tmp_path / 'state'} is damaged, the run starts over" in caplog.text
    assert len(steps) == SETTINGS.steps
    assert torch.equal(resumed, train(factory)[1])


def test_the_state_of_other_settings_is_not_taken_up(factory: AdapterFactory, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(factory, tmp_path / "state", cut=5)
    assert len(train(factory, tmp_path / "state", key="other")[2]) == SETTINGS.steps


def test_the_folder_holds_no_pickle(factory: AdapterFactory, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(factory, tmp_path / "state", cut=7)
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"state.json", "state.safetensors"}


def test_a_full_disk_is_named_and_leaves_the_last_state(
    factory: AdapterFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Cut):
        train(factory, tmp_path / "state", cut=5)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"cannot write.*No space left.*make room"):
        patch.setattr(run_state, "save_file", full)
        train(factory, tmp_path / "state")
    _, resumed, steps = train(factory, tmp_path / "state")
    assert steps[0] == 4
    assert torch.equal(resumed, train(factory)[1])
