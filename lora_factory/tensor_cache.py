"""Tensors on disk by what they were computed from, so that none is computed twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from lora_factory.errors import LoraFactoryError
from lora_factory.files import atomic_file, sha256_text
from lora_factory.safe_files import reading


class TensorCache:
    """Tensors in a folder, one safetensors file a key.

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

    def _file(self, key: tuple[str, ...]) -> Path:
        return self.folder / f"{sha256_text(chr(0).join(key))}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()
