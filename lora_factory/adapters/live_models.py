"""Live base models as users have them: unwrapped, unmerged, with their adapters switched off or left out."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lora_factory.errors import LoraFactoryError

# What torch.compile and activation checkpointing of single modules put into the names of a model's modules.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)(\.|$)")


def plain_model(model: Any) -> Any:  # noqa: ANN401
    """The model inside ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and what Accelerate prepares.

    Args:
        model: A live base model or ``PeftModel``, in any number of such wrappers or in none.

    Raises:
        LoraFactoryError: When it is no model, or one whose weights FSDP 1 has joined and sharded.
    """
    if not isinstance(model, nn.Module):
        raise LoraFactoryError(
            f"the base model is a {type(model).__name__}; give a transformers model, a PeftModel, a folder or a Hub id"
        )
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        _refuse_joined_weights(model)
        model = inner
    _refuse_joined_weights(model)
    return model.base_model.model if isinstance(model, PeftMixedModel) else model


def base_of(model: Any) -> Any:  # noqa: ANN401
    """The transformers model under wrappers and a ``PeftModel``; its modules may carry adapters."""
    model = plain_model(model)
    return plain_model(model.get_base_model()) if isinstance(model, PeftModel) else model


def plain_name(name: str) -> str:
    """The name of a module or parameter without the parts that ``torch.compile`` of a part of the model adds."""
    return _WRAPPER.sub("", name).removesuffix(".")


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """A base model's modules by their name, whichever of them are compiled."""
    return {plain_name(name): module for name, module in model.named_modules()}


def carries_adapters(model: nn.Module) -> bool:
    """Return whether a model's modules hold adapters of PEFT or of transformers' ``add_adapter``."""
    return any(True for _ in _adapted_layers(model))


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:  # noqa: ANN401
    """A context in which a model is its base model alone, whoever attached adapters to it and whether they are merged.

    Afterwards the adapters are enabled, merged and trainable as they were.
    """
    layers = list(_adapted_layers(model))
    enabled = [layer for layer in layers if not layer.disable_adapters]
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    merged = [(layer, list(layer.merged_adapters)) for layer in _merged_layers(model)]
    prompts = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    for layer, _ in merged:
        layer.unmerge()
    try:
        for layer in enabled:
            layer.enable_adapters(False)
        with model.disable_adapter() if prompts else nullcontext():
            yield
    finally:
        for layer in enabled:
            layer.enable_adapters(True)
        for layer, names in merged:
            layer.merge(adapter_names=names)
        for parameter, requires_grad in trainable:  # PEFT freezes and thaws as it switches
            parameter.requires_grad_(requires_grad)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of a model's weights, and say so: a merged model ignores the others of its adapters."""
    layers = list(_merged_layers(model))
    names = sorted({name for layer in layers for name in layer.merged_adapters})
    for layer in layers:
        layer.unmerge()
    if names:
        warnings.warn(
            f"the model's merged adapters ({', '.join(names)}) were unmerged, since a merged model takes no other "
            "adapter; 16-bit weights may be rounded",
            stacklevel=3,
        )


def copy_without_adapters(model: Any) -> Any:  # noqa: ANN401
    """A copy of a model that shares no weight with it and has none of the adapters in its modules.

    It is what a second adapter is attached to, where a base model was given that carries a first one: PEFT puts
    adapters into the base model itself, so that the model which was made of it before would change.
    """
    layers = list(_adapted_layers(model))
    names = sorted({name for layer in layers for name in getattr(layer, "active_adapters", [])})
    warnings.warn(
        f"this base model already carries adapters ({', '.join(names) or 'none is active'}), which attaching has put "
        "into it; the new adapter is attached to a copy of the base model without them, which takes as much memory "
        "again. To share one base model, pass the PeftModel that was returned first, with another adapter_name=; to "
        "start anew, pass the base model's folder or Hub id",
        stacklevel=3,
    )
    model = copy.deepcopy(model)
    for layer in _merged_layers(model):
        layer.unmerge()
    _strip(model)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
    return model.requires_grad_(False)


def _strip(module: nn.Module) -> None:
    """Put the original modules back in the place of those with adapters."""
    for name, child in list(module.named_children()):
        inside: Any = child
        while isinstance(inside, BaseTunerLayer | AuxiliaryTrainingWrapper):
            tuned = isinstance(inside, BaseTunerLayer)
            inside = getattr(inside, "base_layer" if tuned else "original_module")
        if inside is not child:
            setattr(module, name, inside)
        _strip(inside)


def _adapted_layers(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper))


def _merged_layers(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and layer.merged)


def _refuse_joined_weights(model: nn.Module) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise LoraFactoryError(
            "FSDP 1 has joined and sharded the base model's weights, so that no adapter can be attached; attach it to "
            "the model first and wrap the PeftModel that is returned, or shard with FSDP 2 (fully_shard)"
        )
