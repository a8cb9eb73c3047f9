"""Base models: any language or image-text-to-text model of the Hub or a folder, and a real one of a Python package."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.hub.errors import explain
from lora_factory.models.embedded import (
    _BASE_MODEL_PACKAGE,
    EMBEDDED_BASE_MODEL,
    INSTALL_EMBEDDED_MODELS,
    _embedded_folder,
    _package_folder,
    embedded_base_model,
)
from lora_factory.utils.extras import require
from lora_factory.utils.paths import local_path
from lora_factory.utils.quiet import quiet_transformers
from lora_factory.utils.safe_files import folder_here

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_REQUEST_SECONDS = 10.0
_LOGGER = logging.getLogger(__name__)


def load_base_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantization: str = "",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model and its tokenizer, frozen and in evaluation mode.

    It may be a causal one, an encoder-decoder, or an image-text-to-text model such as Florence-2.

    Only safetensors weights are read, and no code that comes with a model is run. `EMBEDDED_BASE_MODEL` comes from
    `embedded_base_model` when that is on this machine and no revision is asked for, else from the Hub. A tokenizer
    without a padding token pads with its end token.

    Args:
        name: Hub id, or a folder that `save_pretrained` wrote.
        revision: Branch, tag or commit on the Hub.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16", or the torch dtype.
        device: Where the model goes; default: the CPU.
        quantization: "4bit" (NF4) or "8bit" to load it so with bitsandbytes; default: as saved.

    Raises:
        LoraFactoryError: The model is unknown, cannot be reached or read, or is no language model.
    """
    source = _local_source(str(name), revision)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise LoraFactoryError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
    options = _quantized(quantization, dtype, device or "cpu") if quantization else {}
    model, tokenizer = load_pretrained(
        source,
        (None, AutoTokenizer),
        "base model",
        "a language model that transformers knows, with safetensors weights and a tokenizer",
        revision=revision,
        dtype=dtype,
        **options,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if quantization:
        _keep_gradients(model)
        return model, tokenizer
    return model.to(device or "cpu"), tokenizer


def load_base_config(name: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a base model; its weights are not read.

    Args:
        name: Hub id, or a folder that `save_pretrained` wrote.
        revision: Branch, tag or commit on the Hub.

    Raises:
        LoraFactoryError: The model is unknown, cannot be reached, or its configuration cannot be read.
    """
    source = _local_source(str(name), revision)
    if not Path(source).is_dir():
        check_on_hub(source, revision, "base model")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise LoraFactoryError(f"cannot read the configuration of the base model {source!r}: {error}") from error


def base_source(layout: AdapterLayout, base_model: str | Path | None = None) -> tuple[str, str | None]:
    """The base model to load for adapters: a Hub id or folder, and its commit if known.

    Args:
        layout: The adapters' layout, which names a base model and its commit.
        base_model: Hub id or folder of another copy, whose commit is not known.
    """
    name = str(base_model or layout.base_model)
    return name, layout.base_revision if name == layout.base_model else None


def load_processor(name: str | Path, *, revision: str | None = None) -> ProcessorMixin:
    """Load the processor of an image-text-to-text model; no code that comes with it is run.

    Args:
        name: Hub id, or a folder that `save_pretrained` wrote.
        revision: Branch, tag or commit on the Hub.

    Raises:
        LoraFactoryError: It cannot be read, or the model has none, since it reads texts alone.
    """
    source = _local_source(str(name), revision)
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        raise LoraFactoryError(f"cannot load the processor of {source!r}: {error}") from error
    if not isinstance(processor, ProcessorMixin):
        raise LoraFactoryError(
            f"{source!r} reads texts alone (it has a {type(processor).__name__}, no processor); for tasks with images"
            " give an image-text-to-text model, for example florence-community/Florence-2-base"
        )
    return processor


def load_pretrained(
    source: str,
    classes: tuple[Any, Any],
    noun: str,
    expected: str,
    *,
    revision: str | None,
    spare: str | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[Any, Any]:
    """Load a model, frozen and in evaluation mode, and its tokenizer or processor; only safetensors, and no code.

    The commit of a model of the Hub is kept as its configuration's ``_commit_hash``.

    Args:
        source: Hub id or folder.
        classes: The classes that load the model (None: a language model's, by its configuration) and its reader.
        noun: What errors call it.
        expected: What errors say that it must be.
        revision: Branch, tag or commit on the Hub.
        spare: Weights with this in their name may be missing.
        options: More for the model's ``from_pretrained``, such as ``dtype``.

    Raises:
        LoraFactoryError: The model is unknown, cannot be reached or read, lacks weights, or is not what is expected.
    """
    local, common = Path(source).is_dir(), {"revision": revision, "trust_remote_code": False}
    if not local:
        check_on_hub(source, revision, noun)
    try:
        with quiet_transformers(keep_bars=not local):
            reader = classes[1].from_pretrained(source, **common)
            auto = classes[0] or _auto_class(AutoConfig.from_pretrained(source, **common))
            model, report = auto.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, **common, **options
            )
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise LoraFactoryError(
            f"cannot load the {noun} {source!r}: {error}\nIt must be {expected}; a damaged folder must be written or"
            " downloaded again"
        ) from error
    absent = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    if absent := [key for key in absent if spare is None or spare not in key]:
        raise LoraFactoryError(
            f"the {noun} {source!r} lacks {len(absent)} weights, first {absent[0]}; give the complete model,"
            f" {expected}"
        )
    folder = None if local else folder_here(source, revision)
    commit = folder.name if folder else None
    model.config._commit_hash = commit  # transformers itself forgets it; a local folder has none
    if commit and revision and re.fullmatch("[0-9a-f]{40}", revision) and commit != revision:
        raise LoraFactoryError(f"the {noun} {source!r} came at commit {commit}, expected {revision}; try again")
    return model.requires_grad_(False).eval(), reader


def check_on_hub(name: str, revision: str | None, noun: str) -> None:
    """Ask the Hub once for a model that is not in its cache: loading itself would try for a minute and say less.

    What is about to be downloaded is announced, with its commit.

    Raises:
        LoraFactoryError: When it is unknown, gated, or the Hub cannot be asked.
    """
    try:
        if folder_here(name, revision) is not None:
            return
        url = hf_hub_url(name, "config.json", revision=revision)
        commit = get_hf_file_metadata(url, timeout=_REQUEST_SECONDS).commit_hash
        _LOGGER.warning("downloading the %s %s at commit %s", noun, name, commit)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise LoraFactoryError(
            f"cannot load the {noun} {name!r}: it is neither a folder nor in the Hub's cache, and"
            f" {explain(error, name)}. What comes without the Hub, a language model and a text encoder:\n"
            f"    {INSTALL_EMBEDDED_MODELS}"
        ) from error


def _auto_class(config: PreTrainedConfig) -> Any:  # noqa: ANN401
    """Choose the class that loads a model; some models that read images are causal language models as well."""
    ways = [
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    ]
    # A part of an encoder-decoder (of BART, for one) may be a causal model of its own.
    fitting = ways[1:] if config.is_encoder_decoder else ways
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (
        config.is_encoder_decoder or getattr(config, "is_decoder", False)
    ):
        raise ValueError(
            "it is a masked language model: each token sees those behind it, so it cannot continue a text"
        )
    return next((auto for mapping, auto in fitting if type(config) in mapping), AutoModelForCausalLM)


def _local_source(name: str, revision: str | None) -> str:
    """The folder behind a name, if there is one, else the name."""
    if name == EMBEDDED_BASE_MODEL and revision is None and not Path(name).is_dir():
        if _embedded_folder().is_dir() or _package_folder(_BASE_MODEL_PACKAGE):
            return str(embedded_base_model())
    folder = local_path(name) if name else Path()
    if not name or not folder.is_dir():
        if not name or folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise LoraFactoryError(f"no base model folder {name!r}; give an existing folder or a Hub id")
        return name
    if not (folder / "config.json").is_file():
        raise LoraFactoryError(f"folder {name!r} has no config.json; give a folder that save_pretrained wrote")
    return str(folder)


def _quantized(bits: str, dtype: str | torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """The options of `from_pretrained` that quantise a model while it is read."""
    if bits not in ("4bit", "8bit"):
        raise LoraFactoryError(f"quantization={bits!r}: choose '4bit' or '8bit'")
    require("quantization", f"quantization={bits!r}", "bitsandbytes")
    # Its 8-bit layers say at every step that they round their inputs.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    compute = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    config = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if compute == "auto" else compute,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _keep_gradients(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on a CPU from packing themselves at the first validation: packed ones pass no gradient on."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
