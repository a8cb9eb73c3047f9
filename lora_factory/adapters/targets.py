"""Find the modules of a base model that get a LoRA, by the names that a user gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_factory.errors import LoraFactoryError

ALL_LINEAR = "all-linear"
_LINEAR = (nn.Linear, Conv1D)
# State space models read these weights in fused kernels, past the modules, so that PEFT refuses a LoRA on them.
_STATE_SPACE_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_REFUSED_IN_THEM = ("out_proj", "conv1d")


def find_targets(model: nn.Module, given: str) -> list[str]:
    """The ``target_modules`` of a LoraConfig.

    Args:
        model: The base model.
        given: Comma-separated names as PEFT takes them, whole or their last parts, or ``all-linear``: all linear
            modules but the output layer. Where PEFT cannot adapt some of a model's linear weights as modules, as in
            mixtures of experts and in Mamba, a warning names them.

    Raises:
        LoraFactoryError: When a name is none of the model's, or PEFT cannot adapt the module; names those that work.
    """
    modules, linear = dict(model.named_modules()), linear_modules(model)
    if given.strip().lower() == ALL_LINEAR:
        return _all_linear(model, linear)
    names = [name.strip() for name in given.split(",") if name.strip()]
    advice = f"name some of {', '.join(sorted(last_names(linear)))}, or all-linear"
    if not names:
        raise LoraFactoryError(f"target_modules={given!r} names no module; {advice}")
    for name in names:
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            near = get_close_matches(name, sorted(last_names(modules) | modules.keys()), n=3)
            meant = f" (nearest: {', '.join(near)})" if near else ""
            raise LoraFactoryError(
                f"target_modules: {name!r} does not fit this {type(model).__name__}, which has no such module{meant}; "
                f"{advice}"
            )
        if not any(_is_plain(model, path, modules[path]) for path in found):
            raise LoraFactoryError(
                f"target_modules: PEFT cannot adapt {name!r} of this {type(model).__name__} as a module; {advice}"
            )
    return names


def linear_modules(model: nn.Module) -> set[str]:
    """The paths of the linear modules that a LoRA can adapt, without the output layer of a language model."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, _LINEAR) and module is not head and _is_plain(model, path, module)
    }


def last_names(paths: Iterable[str]) -> set[str]:
    """The last parts of modules' paths."""
    return {path.rpartition(".")[2] for path in paths if path}


def _all_linear(model: nn.Module, linear: set[str]) -> list[str]:
    """The linear modules, by their last names where no other module has such a name."""
    if not linear:
        raise LoraFactoryError(
            f"target_modules={ALL_LINEAR!r}: this {type(model).__name__} has no linear module that PEFT adapts; "
            "name its modules, for example of convolutions"
        )
    modules = dict(model.named_modules())
    refused = {path for path, module in modules.items() if isinstance(module, _LINEAR) and _is_refused(model, path)}
    stacked = {
        name
        for path, parameter in model.named_parameters()
        if parameter.ndim > 2 and not isinstance(modules[(name := path).rpartition(".")[0]], _ConvNd)
    }
    if left := sorted(last_names(refused | stacked)):
        warnings.warn(
            f"all-linear adapts {', '.join(sorted(last_names(linear)))} of this {type(model).__name__}; "
            f"{', '.join(left)} stay as they are, since PEFT cannot adapt them as modules",
            stacklevel=3,
        )
    alone = last_names(linear).isdisjoint(last_names(modules.keys() - linear))
    return sorted(last_names(linear) if alone else linear)


def _is_plain(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Return whether PEFT adapts a module of this type."""
    return isinstance(module, (*_LINEAR, nn.Embedding, _ConvNd)) and not _is_refused(model, path)


def _is_refused(model: nn.Module, path: str) -> bool:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in _STATE_SPACE_MODELS and path.rpartition(".")[2] in _REFUSED_IN_THEM
