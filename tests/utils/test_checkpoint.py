"""A run that was cut off ends bit for bit as one that was not, whatever became of its state."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.runs import SMALL, text_task

from lora_factory.collection.scheduler import Failures
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.utils import checkpoint as training_state
from lora_factory.utils.checkpoint import RunCheckpoint, read_state, write_state
from lora_factory.zoo.run_record import RunRecord

SETTINGS = replace(SMALL, steps=8, snapshots=6, gradient_accumulation=2)
TASK = text_task("prose")


class Cut(Exception):
    """What ends a run too early."""


@pytest.fixture
def trainer(pico_model, pico_tokenizer) -> LoRATrainer:
    for layer in pico_model.model.layers:
        layer.self_attn.attention_dropout = 0.3  # so that random numbers are drawn
    return LoRATrainer.attach(pico_model, pico_tokenizer, SETTINGS, "pico/llama", Accelerator(cpu=True))


def train(
    trainer: LoRATrainer, folder: Path | None = None, *, cut: int = 0, key: str = "key", seed: int = 3
) -> tuple[RunRecord, torch.Tensor, list[int]]:
    steps = []

    def on_step(step: int, total: int, loss: float) -> None:
        steps.append(step)
        assert total == SETTINGS.steps and loss > 0
        if step == cut:
            raise Cut

    checkpoint = RunCheckpoint(folder, key, every=3) if folder else None
    torch.rand(cut + 1)  # what others draw is of no effect
    return *trainer.train(TASK, seed, "prose", checkpoint=checkpoint, on_step=on_step), steps


@pytest.mark.parametrize(("cut", "left"), [(2, 8), (3, 8), (5, 5), (8, 2)])
def test_a_run_that_was_cut_off_continues_exactly(trainer: LoRATrainer, tmp_path: Path, cut: int, left: int) -> None:
    record, snapshots, _ = train(trainer)
    with pytest.raises(Cut):
        train(trainer, tmp_path / "state", cut=cut)
    train(trainer, seed=4)  # another run in the same slot in between
    again, resumed, steps = train(trainer, tmp_path / "state")
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


def alter(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))


@pytest.mark.parametrize("damage", [truncate, flip, spoil, lose, alter])
def test_a_damaged_state_is_named_and_not_used(
    trainer: LoRATrainer, tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Cut):
        train(trainer, tmp_path / "state", cut=5)
    damage(tmp_path / "state")
    _, resumed, steps = train(trainer, tmp_path / "state")
    assert f"{tmp_path / 'state'} is damaged, the run starts over" in caplog.text
    assert len(steps) == SETTINGS.steps
    assert torch.equal(resumed, train(trainer)[1])


def test_a_state_with_bytes_altered_at_random_is_whole_or_not_there(tmp_path: Path) -> None:
    folder, chance = tmp_path / "state", random.Random(0)
    values, weights = {"step": 3, "losses": [0.5, None], "schedule": {"rate": 1e-4}}, torch.arange(20.0)
    for number in range(200):
        write_state(folder, "key", values, {"weights": weights})
        path = folder / chance.choice(["state.json", "state.safetensors"])
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            content = content[: chance.randrange(len(content))]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        if found := read_state(folder, "key"):
            assert found[0] == values and torch.equal(found[1]["weights"], weights)
        assert read_state(folder, "another") is None


def test_a_note_of_failures_that_was_altered_is_named(tmp_path: Path) -> None:
    failures = Failures(tmp_path, "launch")
    failures.add("a@seed-0", ValueError("too long"))
    assert failures.reasons(["a@seed-0"]) == {"a@seed-0": "ValueError: too long"}
    for text in ("{", "[]", "{}", '{"attempts": 3}', '{"attempts": [3]}', '{"attempts": [{}]}'):
        (tmp_path / "a@seed-0.json").write_text(text)
        with pytest.raises(LoraFactoryError, match=r"a@seed-0\.json"):
            failures.reasons(["a@seed-0"])


def test_the_state_of_other_settings_is_not_taken_up(trainer: LoRATrainer, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(trainer, tmp_path / "state", cut=5)
    assert len(train(trainer, tmp_path / "state", key="other")[2]) == SETTINGS.steps


def test_the_folder_holds_no_pickle(trainer: LoRATrainer, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(trainer, tmp_path / "state", cut=7)
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"state.json", "state.safetensors"}


def test_a_full_disk_is_named_and_leaves_the_last_state(
    trainer: LoRATrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Cut):
        train(trainer, tmp_path / "state", cut=5)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"cannot write.*No space left.*make room"):
        patch.setattr(training_state, "save_file", full)
        train(trainer, tmp_path / "state")
    _, resumed, steps = train(trainer, tmp_path / "state")
    assert steps[0] == 4
    assert torch.equal(resumed, train(trainer)[1])
