"""The state of a training, kept on disk so that one that was cut off ends bit for bit as if it had not been.

The folder holds a JSON and a safetensors file, no pickle, and is replaced in one rename.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.utils.files import atomic_folder, write_json
from lora_factory.utils.folders import STATE
from lora_factory.utils.paths import sha256_file
from lora_factory.utils.safe_files import read_json

State = TypeVar("State")
_STATE_FILE, _TENSORS_FILE = "state.json", "state.safetensors"
_LOGGER = logging.getLogger(__name__)


class Checkpoint:
    """A folder with the latest state of one training.

    Args:
        folder: Made with the first save.
        key: What the training depends on, as a fingerprint: the state of another one is not taken up.
        every: Steps between saves; 0: the number of steps leads to no save.
        every_seconds: Seconds after which the next save is due; None: time leads to no save.
        shared: Whether all processes train together: all must call each method, the main one writes.
    """

    def __init__(
        self, folder: str | Path, key: str, *, every: int = 0, every_seconds: float | None = None, shared: bool = False
    ) -> None:
        """Nothing is read or written yet."""
        self.folder, self.key, self.every, self.every_seconds = Path(folder), key, every, every_seconds
        self.shared, self._last = shared, time.monotonic()

    def restore(
        self,
        read: Callable[[dict[str, Any], dict[str, torch.Tensor]], State],
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> State | None:
        """Put a training where it was cut off.

        Args:
            read: Makes the state of the values and tensors of `save`; ``tensors["random"]`` is of this process.
            optimizer: Is put into the saved state.
            accelerator: Says which process this is.

        Returns:
            What ``read`` returns; None where there is no state to go on from, or a damaged one, which is logged.
        """
        if not self.folder.is_dir():
            return None
        try:
            values, tensors = self._read()
            rows = tensors["random"]
            if values["key"] != self.key or len(rows) != (accelerator.num_processes if self.shared else 1):
                return None
            tensors["random"] = rows[accelerator.process_index if self.shared else 0].clone()
            state = read(values, tensors)
            restore_optimizer(optimizer, tensors)
        except (LoraFactoryError, SafetensorError, OSError, KeyError, TypeError) as error:
            _LOGGER.warning("%s is damaged, the run starts over: %s", self.folder, error)
            return None
        _LOGGER.warning("%s: the run continues at step %d", self.folder.name, values["step"])
        return state

    def is_due(self, step: int, accelerator: Accelerator) -> bool:
        """Whether the state is to be saved after this step."""
        if self.every_seconds is not None:
            late = time.monotonic() - self._last >= self.every_seconds
            if accelerator.reduce(torch.tensor([float(late)], device=accelerator.device), "sum").item() > 0:
                return True
        return self.every > 0 and step % self.every == 0

    def save(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        random: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> None:
        """Replace the state on disk.

        Args:
            values: JSON values, "step" among them.
            tensors: More of the state by name.
            random: State of this process's random numbers.
            optimizer: Its state is kept.
            accelerator: Gathers the random numbers of processes that train together.

        Raises:
            StorageError: When the folder cannot be written.
        """
        self._last, rows = time.monotonic(), random[None]
        if self.shared:
            rows = accelerator.gather(rows.to(accelerator.device)).cpu()
            if not accelerator.is_main_process:
                return
        everything = {**tensors, "random": rows, **optimizer_tensors(optimizer)}
        with writing_into(self.folder.parent), atomic_folder(self.folder, STATE, overwrite=True) as folder:
            path = folder / _TENSORS_FILE
            save_file({name: value.detach().cpu().contiguous() for name, value in everything.items()}, path)
            write_json(folder / _STATE_FILE, {"key": self.key, **values, "sha256": sha256_file(path)})

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        values, path = read_json(self.folder / _STATE_FILE), self.folder / _TENSORS_FILE
        content = path.read_bytes()  # not mapped into memory: the file is replaced while its tensors are in use
        digest = hashlib.sha256(content).hexdigest()
        if values.get("sha256", digest) != digest:  # older states of stage 2 have none
            raise LoraFactoryError(f"{path} was cut short or altered")
        return values, load(content)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state by names of the form ``optimizer/<parameter's number>/<entry>``."""
    states = optimizer.state_dict()["state"]
    return {f"optimizer/{index}/{name}": value for index, entries in states.items() for name, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put an optimizer of the same parameters into the state of ``optimizer_tensors``; other names are left alone."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in part_of(tensors, "optimizer").items():
        index, _, entry = name.partition("/")
        states.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def part_of(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The tensors with names of the form ``<kind>/<rest>``, by the rest."""
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn what the file system says about a write into one clear error.

    Raises:
        StorageError: When the block fails for the disk: full, read-only, gone.
    """
    try:
        yield
    except (OSError, SafetensorError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
        raise StorageError(
            f"cannot write into {folder}: {cause}; make room there or allow writing, then run the same command: it "
            "continues where it stopped"
        ) from error
