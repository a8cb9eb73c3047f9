"""The state of one run of a collection, kept on disk so that a run that was cut off ends bit for bit as if it had not.

The folder holds a JSON and a safetensors file, no pickle, and is replaced in one rename.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.files import atomic_folder, write_json
from lora_factory.utils.folders import STATE, storage_errors
from lora_factory.utils.paths import sha256_file, sha256_text
from lora_factory.utils.safe_files import read_json_object

_STATE_FILE, _TENSORS_FILE = "state.json", "state.safetensors"
# A training through the base loses no more than this. A save takes 0.03 to 0.06 s with the grid's 1.5 million weights.
SAVE_EVERY_SECONDS = 300.0
_LOGGER = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """The progress of a training.

    Attributes:
        step: Optimizer steps taken.
        running: Moving average of the training loss.
        tokens: Tokens read, by all processes.
        best: Lowest validation loss so far.
        history: One record per validation.
        best_weights: The weights of the lowest validation loss.
    """

    step: int = 0
    running: float = 0.0
    tokens: int = 0
    best: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    best_weights: dict[str, torch.Tensor] | None = None

    def count(self, step: int, loss: float) -> None:
        """Take note of one step."""
        self.step, self.running = step, loss if step == 1 else self.running + 0.02 * (loss - self.running)

    def record(self, validation: float | None, model: nn.Module) -> None:
        """Take note of the loss, and of a validation and the weights if they are the best so far."""
        row = {"step": self.step, "loss": round(self.running, 5)}
        if validation is not None:
            row["validation"] = round(validation, 5)
            self.keep_best(validation, model)
        self.history.append(row | {"tokens": self.tokens})

    def keep_best(self, validation: float, model: nn.Module) -> None:
        """Keep the weights if they validate better than all before."""
        if validation < self.best:
            self.best = validation
            self.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


class TrainingCheckpoint:
    """A folder that holds the latest state of one training.

    Args:
        folder: Made with the first save; replaced in one rename.
        key: What the training depends on, as a fingerprint: the state of another one is not taken up.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        """Nothing is read or written yet."""
        self.folder, self.key = Path(folder), key
        self._last = time.monotonic()

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, source: torch.Generator, accelerator: Accelerator
    ) -> TrainingState | None:
        """Put model, optimizer and random numbers where the saved training was; None when there is no such state."""
        if (found := read_state(self.folder, f"{self.key} {accelerator.num_processes}")) is None:
            return None
        values, tensors = found
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind in parts:
                parts[kind][rest] = tensor
        model.load_state_dict(parts["model"])
        restore_optimizer(optimizer, tensors)
        source.set_state(tensors["random"][accelerator.process_index])
        values["best"] = math.inf if values["best"] is None else values["best"]
        return TrainingState(**values, best_weights=parts["best"] or None)

    def save_now_and_then(
        self,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        source: torch.Generator,
        accelerator: Accelerator,
    ) -> None:
        """Save the state when it is time to; all processes must call it."""
        due = torch.tensor([float(time.monotonic() - self._last >= SAVE_EVERY_SECONDS)], device=accelerator.device)
        if accelerator.reduce(due, "sum").item() == 0:
            return
        self._last = time.monotonic()
        random = accelerator.gather(source.get_state()[None].to(accelerator.device)).cpu()
        if not accelerator.is_main_process:
            return
        tensors = {"random": random}
        tensors |= {f"model/{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in (state.best_weights or {}).items()}
        tensors |= optimizer_tensors(optimizer)
        values = {"step": state.step, "running": state.running, "tokens": state.tokens, "history": state.history}
        values["best"] = state.best if math.isfinite(state.best) else None
        write_state(self.folder, f"{self.key} {accelerator.num_processes}", values, tensors)


def write_state(folder: Path, key: str, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the state in a folder, in one rename.

    Args:
        folder: Made when missing.
        key: What the state belongs to.
        values: JSON values.
        tensors: What else is kept.
    """
    with atomic_folder(folder, STATE, overwrite=True) as temporary:
        path = temporary / _TENSORS_FILE
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        digest = _digest(values, sha256_file(path))
        write_json(temporary / _STATE_FILE, {"key": key, "values": values, "sha256": digest})


def read_state(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """The values and tensors of a state.

    Returns:
        None when there is no state, when it belongs to another key, or when a file is damaged, which is said.
    """
    if not folder.is_dir():
        return None
    try:
        state = read_json_object(folder / _STATE_FILE)
        if state["key"] != key:
            return None
        # Not mapped into memory: the file is replaced while its tensors are in use.
        content = (folder / _TENSORS_FILE).read_bytes()
        if state["sha256"] != _digest(state["values"], hashlib.sha256(content).hexdigest()):
            raise LoraFactoryError(f"{_STATE_FILE} or {_TENSORS_FILE} was cut short or altered")
        return state["values"], load(content)
    except Exception as error:  # whatever has become of the files, the run can start over
        _LOGGER.warning("%s is damaged, the run starts over: %s", folder, error)
        return None


def _digest(values: Mapping[str, Any], tensors: str) -> str:
    """SHA-256 of all that a state holds; ``tensors`` is that of the tensors' file."""
    return sha256_text(json.dumps(values, sort_keys=True) + tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state by names of the form ``optimizer/<parameter's number>/<entry>``."""
    states = optimizer.state_dict()["state"]
    return {f"optimizer/{index}/{name}": value for index, entries in states.items() for name, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put an optimizer of the same parameters into the state of ``optimizer_tensors``; other names are left alone."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, entry = rest.partition("/")
            states.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        step: Optimizer steps taken; the data is at the batches that these have read.
        tokens: Tokens read.
        snapshots: The checkpoints so far, each of shape ``(D,)``.
        losses: Their validation losses.
    """

    step: int = 0
    tokens: int = 0
    snapshots: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class RunCheckpoint:
    """A folder with the latest state of one run.

    Args:
        folder: Made with the first save.
        key: What the run depends on, as a fingerprint: the state of another one is not taken up.
        every: Steps between saves; 0 saves nothing.
    """

    def __init__(self, folder: str | Path, key: str, every: int) -> None:
        """Nothing is read or written yet."""
        self.folder, self.key, self.every = Path(folder), key, every

    def restore(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        accelerator: Accelerator,
    ) -> tuple[RunState, torch.Tensor | None]:
        """Put optimizer, schedule and random numbers where the run was cut off.

        Returns:
            The state and the adapter's weights ``(D,)`` then; a new state and None where there is none to go on from.
        """
        if (found := read_state(self.folder, self.key)) is None:
            return RunState(), None
        values, tensors = found
        restore_optimizer(optimizer, tensors)
        schedule.load_state_dict(values["schedule"])
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        rows = tensors["random"]
        _set_random_state(rows[accelerator.process_index if len(rows) > 1 else 0], accelerator.device)
        snapshots = list(tensors["snapshots"]) if "snapshots" in tensors else []
        _LOGGER.warning("%s: the run continues at step %d", self.folder.name, values["step"])
        return RunState(values["step"], values["tokens"], snapshots, values["losses"]), tensors["weights"]

    def save(
        self,
        state: RunState,
        weights: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        accelerator: Accelerator,
        *,
        shared: bool,
    ) -> None:
        """Replace the state on disk.

        Args:
            state: Where the run is.
            weights: The adapter's weights, shape ``(D,)``.
            optimizer: Its state is kept.
            schedule: Its state is kept.
            accelerator: Device of the random numbers.
            shared: Whether all processes train this run together: all must call, the main one writes.

        Raises:
            StorageError: When the folder cannot be written.
        """
        random = _random_state(accelerator.device)[None]
        if shared:
            random = accelerator.gather(random.to(accelerator.device)).cpu()
            if not accelerator.is_main_process:
                return
        tensors = {"weights": weights, "random": random, **optimizer_tensors(optimizer)}
        if state.snapshots:
            tensors["snapshots"] = torch.stack(state.snapshots)
        values = {"step": state.step, "tokens": state.tokens, "losses": state.losses}
        values["schedule"] = schedule.state_dict()
        with writing_into(self.folder.parent):
            write_state(self.folder, self.key, values, tensors)

    def is_due(self, step: int) -> bool:
        """Return whether the state is to be saved after this step."""
        return self.every > 0 and step % self.every == 0


def writing_into(folder: Path) -> AbstractContextManager[None]:
    """As `storage_errors`, for writes of a command that continues where it stopped."""
    remedy = "make room there or allow writing, then run the same command: it continues where it stopped"
    return storage_errors(folder, "write into", remedy)


def _random_state(device: torch.device) -> torch.Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
