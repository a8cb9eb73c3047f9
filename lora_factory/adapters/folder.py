"""The folder of one adapter as PEFT writes it, and the record of how a generated one was made."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.modules import check_plain_lora, check_types, exact_targets, lora_weights, module_paths
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.files import write_json
from lora_factory.utils.paths import local_path
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, checked_file, other_kind, read_json_object

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
GENERATION_FILE, CONDITION_FILE = "generation.json", "condition.safetensors"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The record of how an adapter was generated; ``generation.json``.

    Attributes:
        text: What it is for, as it was given; of a combination, the texts with their weights in one.
        texts: The texts of a combination, and the weight of each.
        conditions: The modalities of task vectors that were given beside or instead of a text; they are kept in
            ``condition.safetensors``.
        seed: Seed of the sample.
        temperature: 0 for the most likely adapter.
        chat_template: Whether it expects texts in the tokenizer's chat template.
        rank: Its rank; null where it is the generator's.
        rank_error: Share of the squared norm of ΔW that a lower rank has lost.
        refined_on: On how many examples it was refined; 0 when it is as the network wrote it.
        nearest_tasks: The training tasks nearest to the condition, best first: ``{"task", "similarity"}``.
        distance: Cosine distance of the condition from the nearest task.
        zoo_distance: The median of the training tasks' own distances from their nearest neighbour.
        generator: Hub id of the generator, or the name of its folder.
        generator_commit: Its commit on the Hub, if it came from there.
        base_model: Hub id (or folder) of the base model.
        base_revision: Its commit, if known.
        sha256: SHA-256 of ``adapter_model.safetensors``.
        versions: Versions of the packages that made it.
    """

    text: str | None
    texts: Mapping[str, float] | None = None
    conditions: tuple[str, ...]
    seed: int
    temperature: float
    chat_template: bool = False
    rank: int | None = None
    rank_error: float = 0.0
    refined_on: int = 0
    nearest_tasks: tuple[Mapping[str, Any], ...]
    distance: float | None
    zoo_distance: float | None
    generator: str | None
    generator_commit: str | None
    base_model: str
    base_revision: str | None
    sha256: str
    versions: Mapping[str, str]


MAX_ADAPTER_BYTES = 16 << 30
_HASHED_ASIDE = 1 << 20  # bytes from which a second thread pays
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_adapter_config(layout: AdapterLayout, folder: Path) -> None:
    """Write ``adapter_config.json`` as PEFT does, but with sets in alphabetical order: the same bytes every time.

    PEFT itself is not needed: the layout holds its configuration.
    """
    write_json(folder / CONFIG_FILE, dict(sorted(layout.inference_config().items())), durable=False)


def save_adapter_weights(state_dict: Mapping[str, Tensor], folder: Path) -> str:
    """Write ``adapter_model.safetensors``, the same bytes as ``safetensors.torch.save_file``.

    The weights are hashed while the disk writes them, and are not copied.

    Args:
        state_dict: Float32 tensors on the CPU under PEFT's names.
        folder: An existing folder, without this file.

    Returns:
        The SHA-256 of the file, in hex.
    """
    names, end = sorted(state_dict), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        start, end = end, end + 4 * state_dict[name].numel()
        header[name] = {"dtype": "F32", "shape": list(state_dict[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    values: list[Any] = [state_dict[name].contiguous().numpy() for name in names]
    parts: list[Any] = [struct.pack("<Q", len(text)) + text, *(memoryview(value).cast("B") for value in values)]
    digest = hashlib.sha256()

    def read() -> None:
        for part in parts:
            digest.update(part)

    with (folder / ADAPTER_FILE).open("xb") as file:
        if end < _HASHED_ASIDE:
            content = b"".join(parts)
            file.write(content)
            digest.update(content)
        else:
            with ThreadPoolExecutor(1) as hasher:
                hashed = hasher.submit(read)
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
                hashed.result()
    return digest.hexdigest()


def load_adapter(
    folder: str | Path, *, base_model: str | Path | None = None
) -> tuple[AdapterLayout, dict[str, Tensor]]:
    """Read a LoRA adapter's folder as PEFT writes it.

    Args:
        folder: The folder.
        base_model: The base model of an adapter whose configuration names none.

    Returns:
        The adapter's layout and its state dict.

    Raises:
        LoraFactoryError: When a file is missing or truncated, or the adapter is not a plain LoRA.
    """
    from peft import LoraConfig

    folder = local_path(folder)
    try:
        if not (folder / CONFIG_FILE).exists() and (kind := other_kind(folder)):
            raise LoraFactoryError(f"it is {kind}, not an adapter; name a folder that PEFT or lora-factory wrote")
        values = read_json_object(checked_file(folder, CONFIG_FILE, MAX_CONFIG_BYTES), limit=MAX_CONFIG_BYTES)
        check_types(values)
        check_plain_lora(values)
        path = checked_file(folder, ADAPTER_FILE, MAX_ADAPTER_BYTES)
        header = lora_weights(_header(path))
        values.pop("runtime_config", None)
        config = LoraConfig.from_peft_type(**exact_targets(values, module_paths(header)))
        assert isinstance(config, LoraConfig)  # check_plain_lora saw peft_type LORA
        name = config.base_model_name_or_path or str(base_model or "")
        if not name:
            raise LoraFactoryError("adapter_config.json names no base model; pass base_model= (--base-model)")
        # Names, shapes and ranks are checked before a weight is read.
        layout = AdapterLayout.from_state_dict(header, config, base_model=name, base_revision=config.revision)
        with safe_open(path, framework="pt") as file:
            state_dict = {key: file.get_tensor(key) for key in header}
        if torch.float64 in {tensor.dtype for tensor in state_dict.values()}:
            warnings.warn(f"the adapter in {folder} holds float64; it is read as float32", stacklevel=2)
            state_dict = {k: v.float() if v.dtype == torch.float64 else v for k, v in state_dict.items()}
        layout.check(state_dict)
        _check_targets(config, layout)
    except LoraFactoryError as error:
        raise LoraFactoryError(f"cannot load an adapter from {folder}: {str(error)[:1000]}") from error
    except Exception as error:  # somebody else's files: whatever a parser raises, they cannot be loaded
        raise LoraFactoryError(
            f"{folder}: adapter_config.json or {ADAPTER_FILE} is damaged ({str(error)[:1000]}); "
            "write or download it again"
        ) from error
    return layout, state_dict


def _header(path: Path) -> dict[str, Tensor]:
    """Tensors on the meta device as the header of a safetensors file describes them; no weight is read."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
    if odd := sorted({one.get_dtype() for one in slices.values()} - _DTYPES.keys()):
        raise LoraFactoryError(f"it holds {', '.join(odd)}; expected one of {', '.join(_DTYPES)}")
    return {
        name: torch.empty(tuple(one.get_shape()), dtype=_DTYPES[one.get_dtype()], device="meta")
        for name, one in slices.items()
    }


def _check_targets(config: LoraConfig, layout: AdapterLayout) -> None:
    """Weights of a module that the configuration does not name would never be used."""
    if isinstance(config.target_modules, str) or not config.target_modules:
        return  # a pattern; attaching compares what it finds in the model with the weights
    from peft.tuners.tuners_utils import check_target_module_exists

    strangers = [module.path for module in layout.modules if not check_target_module_exists(config, module.path)]
    if strangers:
        raise LoraFactoryError(
            f"{len(strangers)} adapted modules, first {strangers[0]!r}, are not among the target_modules "
            f"{sorted(config.target_modules)} of adapter_config.json; it belongs to another adapter"
        )
