"""Adapters in the forms that programs without PEFT read: a GGUF file for llama.cpp and Ollama, and a merged model."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedConfig, PreTrainedModel

from lora_factory.adapters.attach import attach_adapter
from lora_factory.adapters.folder import load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.modules import AdaptedModule
from lora_factory.errors import LoraFactoryError
from lora_factory.models.loading import base_source, load_base_config, load_base_model
from lora_factory.utils.files import atomic_file, atomic_folder, share_file
from lora_factory.utils.folders import storage_errors
from lora_factory.utils.paths import local_path

_ARCH = gguf.MODEL_ARCH
# The models whose linear layers llama.cpp's converter takes over one by one, by transformers' name: the architecture
# there, and whether it reorders the rows of q_proj and k_proj for its rotary embedding. Models with several modules
# in one tensor, such as experts, are missing. Each was compared with llama.cpp's own converter of adapters.
ARCHITECTURES = {
    "cohere": (_ARCH.COMMAND_R, False),
    "cohere2": (_ARCH.COHERE2, False),
    "gemma": (_ARCH.GEMMA, False),
    "gemma2": (_ARCH.GEMMA2, False),
    "gemma3_text": (_ARCH.GEMMA3, False),
    "granite": (_ARCH.GRANITE, True),
    "llama": (_ARCH.LLAMA, True),
    "mistral": (_ARCH.LLAMA, True),
    "olmo": (_ARCH.OLMO, True),
    "olmo2": (_ARCH.OLMO2, False),
    "phi": (_ARCH.PHI2, False),
    "phi3": (_ARCH.PHI3, False),
    "qwen2": (_ARCH.QWEN2, False),
    "qwen3": (_ARCH.QWEN3, False),
    "smollm3": (_ARCH.SMOLLM3, True),
    "stablelm": (_ARCH.STABLELM, False),
    "starcoder2": (_ARCH.STARCODER2, False),
}


def export_gguf(adapter: str | Path, output: str | Path, *, base_model: str | Path | None = None) -> Path:
    """Write an adapter as a GGUF file, for ``llama-cli --lora FILE`` and for ``ADAPTER FILE`` in Ollama's Modelfile.

    The file is what llama.cpp's own ``convert_lora_to_gguf.py`` writes: A and B as float32 under the names of
    llama.cpp's tensors, the rows of q_proj and k_proj in its order, and ``adapter.lora.alpha``. llama.cpp scales by
    alpha / rank; where an adapter scales otherwise (rsLoRA, ``alpha_pattern``), the difference is multiplied into B.
    No weight of the base model is read.

    Args:
        adapter: The adapter's folder, as PEFT or `CVAELoRAGenerator.save_adapter` writes it.
        output: The file to make.
        base_model: Hub id or folder of the base model, of which the configuration is read; default: the one that the
            adapter names.

    Returns:
        The file.

    Raises:
        LoraFactoryError: When the adapter cannot be read, its base model is none of `ARCHITECTURES`, it adapts
            embeddings or a module that llama.cpp does not have, or ``output`` is there already.
        StorageError: When the file cannot be written; it is a LoraFactoryError.
    """
    output = local_path(output)
    _check_free(output)
    layout, weights = load_adapter(adapter, base_model=base_model)
    name, revision = base_source(layout, base_model)
    config = load_base_config(name, revision=revision)
    architecture, tensors = gguf_tensors(layout, weights, config)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as temporary:
            writer = gguf.GGUFWriter(temporary, architecture)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(local_path(adapter).resolve().name)
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, layout.base_model.rstrip("/").rpartition("/")[2])
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(layout))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, values in tensors.items():
                writer.add_tensor(key, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            size = sum(file.tell() for file in writer.fout or ())
            writer.close()
            if temporary.stat().st_size != size:  # NumPy, which writes the tensors, is not told that the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _check_free(output)
        share_file(output)
    return output


def export_merged(adapter: str | Path, output: str | Path, *, base_model: str | Path | None = None) -> Path:
    """Write the base model with an adapter merged into its weights, as a Transformers folder with its tokenizer.

    Args:
        adapter: The adapter's folder.
        output: The folder to make; it appears by one rename, and is not replaced when it holds anything.
        base_model: Hub id or folder of the base model; default: the one that the adapter names.

    Returns:
        The folder.

    Raises:
        LoraFactoryError: When the adapter or the base model cannot be read or do not fit, or the folder is there.
        StorageError: When it cannot be written; it is a LoraFactoryError.
    """
    layout, weights = load_adapter(adapter, base_model=base_model)
    name, revision = base_source(layout, base_model)
    with atomic_folder(output, inputs=[adapter, name]) as folder:
        model, tokenizer = load_base_model(name, revision=revision)
        _untie(model, layout)
        try:
            merged: Any = attach_adapter(model, layout, weights).merge_and_unload(safe_merge=True)
        except ValueError as error:  # a weight is too large for the base model's 16 bits
            raise LoraFactoryError(f"cannot merge {adapter} into {name}: {error}; use it unmerged") from error
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return local_path(output)


def _untie(model: PreTrainedModel, layout: AdapterLayout) -> None:
    """Give the output a weight of its own where it is that of the embeddings and an adapter changes one of the two."""
    words: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or words.weight is not head.weight:
        return
    adapted = {module.path for module in layout.modules}
    changed = [path for path, module in model.named_modules() if module in (words, head) and path in adapted]
    if not changed:
        return
    if model.config.is_encoder_decoder:
        raise LoraFactoryError(
            f"{changed[0]} cannot be merged: its weight is also that of other modules of the base model, which the "
            "adapter leaves as they are; use the adapter unmerged"
        )
    head.weight = Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def gguf_tensors(
    layout: AdapterLayout, weights: Mapping[str, Tensor], config: PreTrainedConfig
) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
    """The tensors of an adapter's GGUF file.

    Args:
        layout: The adapter's layout.
        weights: Its weights, under PEFT's names.
        config: The base model's configuration.

    Returns:
        llama.cpp's name of the architecture, and by their names there ``(rank, in)`` for A and ``(out, rank)`` for B.

    Raises:
        LoraFactoryError: When llama.cpp takes no such adapter.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise LoraFactoryError(
            f"the base model {layout.base_model!r} is a {kind!r}; adapters of these can become GGUF files: "
            f"{', '.join(ARCHITECTURES)}; export others with --format merged and convert the merged model with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    architecture, reordered = ARCHITECTURES[kind]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    alpha, tensors = _alpha(layout), {}
    for module in layout.modules:
        name = names.get_name(f"{module.path}.weight", try_suffixes=(".weight",))
        _check_module(module, name, layout, config)
        a, b = weights[module.key_a].float(), weights[module.key_b].float()
        if not math.isclose(ratio := module.scaling * module.rank / alpha, 1):
            b = b * ratio
        last = module.path.rpartition(".")[2]
        if reordered and last in heads:
            b = _reordered(b, heads[last] or config.num_attention_heads, module)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a.numpy(), b.contiguous().numpy()
    return gguf.MODEL_ARCH_NAMES[architecture], tensors


def _alpha(layout: AdapterLayout) -> float:
    """The ``adapter.lora.alpha`` of a layout: its lora_alpha, or what fits with rsLoRA."""
    first = layout.modules[0]
    return first.scaling * first.rank if layout.lora_config.get("use_rslora") else layout.lora_config["lora_alpha"]


def _reordered(b: Tensor, heads: int, module: AdaptedModule) -> Tensor:
    """B with its rows in llama.cpp's order: in every head, rows that are rotated together stand together."""
    if len(b) % (2 * heads):
        raise LoraFactoryError(
            f"{module.path} has {len(b)} outputs, which the base model's {heads} heads cannot share; pass the base "
            "model that the adapter is for: base_model="
        )
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _check_module(module: AdaptedModule, name: str | None, layout: AdapterLayout, config: PreTrainedConfig) -> None:
    """Refuse a module whose adapter llama.cpp cannot load."""
    tied = module.path == "lm_head" and config.tie_word_embeddings
    if "lora_embedding" in module.key_a or tied:
        reason = "in llama.cpp embeddings that are also the output cannot be adapted"
    elif len(module.shape_a) > 2 or layout.lora_config.get("fan_in_fan_out"):
        reason = "it is no plain linear layer"
    elif name is None:
        reason = "llama.cpp has no such tensor in this kind of model"
    else:
        return
    raise LoraFactoryError(
        f"{module.path} cannot be exported: {reason}; export with --format merged, or train adapters of other "
        "modules: target_modules= (--target-modules)"
    )


def _check_free(path: Path) -> None:
    """Refuse to replace a file."""
    with storage_errors(path, "look at"):
        if os.path.lexists(path):
            raise LoraFactoryError(f"{path} is already there and is not replaced; name another file or remove it")
