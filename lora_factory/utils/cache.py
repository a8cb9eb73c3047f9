"""Results on disk by what they were computed from, so that none is computed twice: tensors, and cells of tables."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.files import atomic_file
from lora_factory.utils.folders import storage_errors
from lora_factory.utils.paths import sha256_text
from lora_factory.utils.safe_files import reading


class TensorCache:
    """Tensors in a folder, one safetensors file per key.

    Args:
        folder: Made on the first write. Several processes may share it.
    """

    def __init__(self, folder: str | Path) -> None:
        """Remember the folder."""
        self.folder = Path(folder)

    def read(self, *key: str) -> dict[str, Tensor] | None:
        """The tensors of a key; None when there are none, or when their file is damaged and will be written anew."""
        try:
            with reading(self._file(key)), safe_open(self._file(key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                digest = (file.metadata() or {}).get("sha256")
        except LoraFactoryError:
            return None
        return tensors if digest == _digest(tensors) else None

    def write(self, tensors: Mapping[str, Tensor], *key: str) -> None:
        """Store the tensors of a key.

        Raises:
            OSError: When the folder cannot be written; SafetensorError when the file cannot.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._file(key)) as path:
            save_file(dict(tensors), path, metadata={"sha256": _digest(tensors)})

    def get_or_compute(self, identifier: str, texts: Sequence[str], function: Callable[[list[str]], Tensor]) -> Tensor:
        """Read the vectors of texts, one small file each, computing those that are missing.

        Args:
            identifier: Names the encoder, as ``TextEncoder.identifier`` does; other encoders, other vectors.
            texts: At least one text.
            function: Encodes the missing texts, each once, in their order: shape ``(missing, width)``.

        Returns:
            The vectors in the order of the texts, shape ``(texts, width)``.
        """
        cached = ((text, self.read(identifier, text)) for text in dict.fromkeys(texts))
        known = {text: tensors["vector"] for text, tensors in cached if tensors is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            for text, vector in zip(missing, function(missing).cpu(), strict=True):
                self.write({"vector": vector.contiguous()}, identifier, text)
                known[text] = vector
        return torch.stack([known[text] for text in texts])

    def _file(self, key: tuple[str, ...]) -> Path:
        return self.folder / f"{sha256_text(chr(0).join(key))}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()


_LOGGER = logging.getLogger(__name__)


class CellLog:
    """A file with one JSON object per finished cell, keyed by a fingerprint of everything that the cell depends on.

    A line that a crash cut off is dropped when the file is opened; a cell counts once its whole line is on disk. A
    damaged line is passed over, so that its cell is computed again.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the finished cells of ``path``; it is made with the first new one.

        Raises:
            StorageError: When the file cannot be read, or not be cut to whole lines.
        """
        self.path = Path(path)
        self._cells: dict[str, dict[str, Any]] = {}
        whole = b""
        with storage_errors(self.path, "read"):
            if self.path.is_file():
                raw = self.path.read_bytes()
                whole = raw[: raw.rfind(b"\n") + 1]
                if len(whole) < len(raw):
                    with self.path.open("r+b") as file:
                        file.truncate(len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                cell = json.loads(line)
                if cell.pop("sha256") != _json_digest(cell):
                    raise ValueError("it was altered")
                self._cells[cell["key"]] = cell
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                _LOGGER.warning("%s, line %d is damaged, its cell is computed again: %s", self.path, number, error)

    def get_or_compute(self, facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of these facts, from the file or computed now.

        Args:
            facts: JSON values that fix the result: task, method, seeds, fingerprints of data and weights.
            compute: Makes the cell's figures when it is not there.

        Raises:
            StorageError: When the file cannot be written.
        """
        key = _json_digest(facts)
        if key not in self._cells:
            cell = {"key": key, **facts, **compute()}
            line = json.dumps({**cell, "sha256": _json_digest(cell)}) + "\n"
            with storage_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            self._cells[key] = cell
        return self._cells[key]


def _json_digest(value: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(value, sort_keys=True))
