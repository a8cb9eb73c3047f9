"""The state of a training, kept on disk so that one that was cut off ends as if it had not been."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load, save_file
from torch import nn

from lora_factory.errors import LoraFactoryError
from lora_factory.files import atomic_folder, sha256_file, sha256_text, write_json
from lora_factory.folders import STATE
from lora_factory.safe_files import read_json_object

_STATE_FILE, _TENSORS_FILE = "state.json", "state.safetensors"
_LOGGER = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Where a training is.

    Attributes:
        step: Optimizer steps taken.
        running: Moving average of the training loss.
        tokens: Tokens read, by all processes.
        best: Lowest validation loss so far.
        history: One record a validation.
        best_weights: The weights of the lowest validation loss.
    """

    step: int = 0
    running: float = 0.0
    tokens: int = 0
    best: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    best_weights: dict[str, torch.Tensor] | None = None

    def count(self, loss: float, tokens: int) -> None:
        """Take note of one step."""
        self.running = loss if self.step == 1 else self.running + 0.02 * (loss - self.running)
        self.tokens += tokens

    def record(self, validation: float, model: nn.Module) -> None:
        """Take note of a validation, and of the weights if they are the best so far."""
        losses = {"loss": round(self.running, 5), "validation": round(validation, 5)}
        self.history.append({"step": self.step, **losses, "tokens": self.tokens})
        self.keep_best(validation, model)

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
        every_seconds: Save when this long has passed since the last time.
    """

    def __init__(self, folder: str | Path, key: str, *, every_seconds: float = 300.0) -> None:
        """Nothing is read or written yet."""
        self.folder, self.key, self.every_seconds = Path(folder), key, every_seconds
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
        due = torch.tensor([float(time.monotonic() - self._last >= self.every_seconds)], device=accelerator.device)
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
