"""PEFT adapters and models: attach one strictly, overwrite its slot in place, read one from a folder."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.live_models import (
    base_of,
    carries_adapters,
    copy_without_adapters,
    modules_by_path,
    plain_model,
    plain_name,
    unmerge,
    without_adapters,
)
from lora_factory.adapters.modules import check_adapter_name, check_plain_lora, lora_weights, plain_json
from lora_factory.adapters.targets import last_names, linear_modules
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.printable import few
from lora_factory.utils.safe_files import is_hub_id

_LOGGER = logging.getLogger(__name__)
_SINGLE_EXPERT = re.compile(r"(?:^|\.)experts\.[^.]+\.")


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    layout: AdapterLayout,
    state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
) -> PeftModel:
    """Attach adapter weights to a base model, strictly.

    A base model in a wrapper, such as ``torch.compile``'s or ``DataParallel``, is taken out of it. A ``PeftModel``
    gets one more adapter, or has the one of this name overwritten; its merged adapters are unmerged. PEFT puts
    adapters into the base model itself: a base model that carries some already is left as it is, and a copy of it
    without them gets this one.

    Returns:
        A ``PeftModel`` in evaluation mode, with this adapter alone active.

    Raises:
        LoraFactoryError: When a module of the layout is missing in the model or has another size, the slot of this
            name is no plain LoRA, or ``adapter_name`` is no name for an adapter.
    """
    check_adapter_name(adapter_name)
    model = plain_model(model)
    _check_base(base_of(model), layout)
    if not isinstance(model, PeftModel):
        base = copy_without_adapters(model) if carries_adapters(model) else model
        model = wrap_base(base, layout.peft_config(), adapter_name)
    elif adapter_name not in model.peft_config:
        try:
            model.add_adapter(adapter_name, layout.peft_config())
        except ValueError as error:  # such as beside prompt tuning
            raise LoraFactoryError(f"PEFT adds no LoRA to this PeftModel: {error}; pass its base model") from error
    overwrite_adapter(model, layout, state_dict, adapter_name)
    tuner: Any = model.base_model
    tuner.enable_adapter_layers()
    model.set_adapter(adapter_name)
    return model.eval()


def overwrite_adapter(
    model: PeftModel, layout: AdapterLayout, state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Overwrite one adapter of a model in place; the others, and which of them are active, stay as they are.

    Nothing is added to the model and no parameter is replaced, so that a compiled model is not compiled again. The
    slot may have a higher rank than the adapter, such as after
    ``peft.utils.hotswap.prepare_model_for_compiled_hotswap``; the rest of it is zero then. PEFT's own
    ``hotswap_adapter_from_state_dict`` writes the same weights, but takes no embeddings and no sharded weights, and
    gives modules of ``rank_pattern`` and ``alpha_pattern`` the scaling of all others.

    Args:
        model: A ``PeftModel``, possibly compiled.
        layout: The adapter's layout.
        state_dict: Its weights, under PEFT's names.
        adapter_name: The adapter to overwrite.

    Raises:
        LoraFactoryError: When the model has no adapter of this name, or one with other modules, sizes or scaling, a
            lower rank, or more than A and B. Nothing is written.
    """
    model = plain_model(model)
    config = model.peft_config.get(adapter_name) if isinstance(model, PeftModel) else None
    if config is None:
        named = f"has adapters named {', '.join(model.peft_config)}" if isinstance(model, PeftModel) else "has none"
        raise LoraFactoryError(
            f"adapter_name is {adapter_name!r}, and this {type(model).__name__} {named}; attach the first adapter of "
            f"this name: model = generator.generate_adapter(text, model, adapter_name={adapter_name!r})"
        )
    check_plain_lora(plain_json(config.to_dict()))
    AdapterSlot(model, layout, adapter_name).load(state_dict)


def wrap_base(model: PreTrainedModel, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """``peft.get_peft_model`` with a clear error, and without the warnings that are about its own calls.

    Raises:
        LoraFactoryError: When none of the config's target modules is in the model, or one is no module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        public_name = config.base_model_name_or_path
        advice = f"name some of its modules: target_modules={','.join(sorted(last_names(linear_modules(model))))!r}"
        try:
            wrapped = get_peft_model(model, config, adapter_name=adapter_name)
        except ValueError as error:
            raise LoraFactoryError(
                f"a LoRA on {config.target_modules} does not fit this {type(model).__name__}: {error}; {advice}"
            ) from error
    if config.target_parameters:
        raise LoraFactoryError(
            f"{sorted(config.target_parameters)} of this {type(model).__name__} are weights that PEFT adapts stacked, "
            f"and no modules; {advice}"
        )
    config.base_model_name_or_path = public_name  # PEFT puts the folder there that the base was loaded from
    return wrapped


@contextmanager
def adapters_in_batch(model: PreTrainedModel | PeftModel, layout: AdapterLayout, adapters: Tensor) -> Iterator[None]:
    """A context in which every share of a batch runs with an adapter of its own, in one forward pass.

    The first ``rows / n`` rows of a batch go through the first adapter, the next through the second, and so on. The
    LoRA is added by forward hooks on the base model's modules, ``y + scaling * B(A(x))`` as PEFT does it, and
    gradients flow back into ``adapters``; the base model's own parameters are left as they are. Adapters that PEFT has
    attached to the model are active beside it: switch them off.

    Args:
        model: The base model.
        layout: Where the weights belong.
        adapters: Shape ``(n, D)``.

    Raises:
        LoraFactoryError: When the base model has not the layout's modules, a batch cannot be split into ``n``, or the
            rows of a module do not stay in the order of the batch.
    """
    check_order(layout, len(adapters))
    weights, hooks = layout.unflatten(adapters), {}
    for adapted in layout.modules:
        hooks[adapted.path] = partial(_add_lora, weights[adapted.key_a], weights[adapted.key_b] * adapted.scaling)
    with hooked(model, layout, hooks):
        yield


def check_order(layout: AdapterLayout, count: int) -> None:
    """Refuse several adapters in one batch where a router hands out its tokens: nobody knows whose they are then.

    Raises:
        LoraFactoryError: When the layout has modules of single experts.
    """
    if count > 1 and (single := single_experts(layout)):
        raise LoraFactoryError(
            f"{single[0]} belongs to one expert of a mixture, which gets tokens of several adapters in any order; "
            f"adapt other modules: target_modules= (--target-modules), without {single[0].rpartition('.')[2]}"
        )


def single_experts(layout: AdapterLayout) -> list[str]:
    """The modules of a layout that belong to one expert of a mixture, by path."""
    return [module.path for module in layout.modules if _SINGLE_EXPERT.search(module.path)]


@contextmanager
def hooked(
    model: nn.Module, layout: AdapterLayout, hooks: Mapping[str, Callable[[nn.Module, Any, Tensor], Tensor]]
) -> Iterator[None]:
    """A context in which forward hooks change the outputs of modules of the base model, below PEFT's own adapters.

    Args:
        model: The base model.
        layout: Whose modules these are.
        hooks: By the module's path; see ``torch.nn.Module.register_forward_hook``.

    Raises:
        LoraFactoryError: When the base model has not one of the modules.
    """
    modules, handles = modules_by_path(base_of(model)), []
    try:
        for path, hook in hooks.items():
            module: Any = modules.get(path)
            if module is None:
                raise LoraFactoryError(_missing_module(base_of(model), layout, path))
            target = module.base_layer if isinstance(module, LoraLayer) else module
            handles.append(target.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_lora(factors_a: Tensor, factors_b: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ANN401
    """A module's output plus the LoRA of every share of the batch; ``factors_a`` is ``(n, *shape of A)``."""
    (values,) = inputs
    count = len(factors_a)
    _check_shares(values, count)
    if not isinstance(module, nn.Embedding | _ConvNd):
        flat = values.to(factors_a.dtype).reshape(count, -1, values.shape[-1])
        delta = flat @ factors_a.transpose(1, 2) @ factors_b.transpose(1, 2)
        return output + delta.reshape(output.shape).to(output.dtype)
    pairs = zip(values.chunk(count), factors_a, factors_b, strict=True)
    delta = torch.cat([_out(module, _low(module, rows, a), b.flatten(1)) for rows, a, b in pairs])
    return output + delta.to(output.dtype)


def add_shared_lora(
    factor_a: Tensor,
    cores: Tensor,
    factor_b: Tensor,
    module: nn.Module,
    inputs: Any,  # noqa: ANN401
    output: Tensor,
) -> Tensor:
    """A module's output plus ``B K A`` of its input, with a core of its own for every share of the batch.

    Args:
        factor_a: Of A's shape.
        cores: Shape ``(n, R, R)``.
        factor_b: Shape ``(out, R)``, times the scaling.
        module: Linear, embedding or convolution.
        inputs: The module's; their rows are shared out evenly.
        output: The module's own.
    """
    (values,) = inputs
    _check_shares(values, len(cores))
    low = _low(module, values, factor_a)
    mixed = (low.reshape(len(cores), -1, low.shape[-1]) @ cores.mT).view_as(low)
    return output + _out(module, mixed, factor_b).to(output.dtype)


def _low(module: nn.Module, values: Tensor, factor_a: Tensor) -> Tensor:
    """``A`` of a module's input, the R values last."""
    if isinstance(module, nn.Embedding):
        return functional.embedding(values, factor_a.mT) * getattr(module, "embed_scale", 1.0)  # Gemma's, as in PEFT
    values = values.to(factor_a.dtype)
    if isinstance(module, _ConvNd):
        convolution: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[factor_a.ndim - 3]
        return convolution(values, factor_a, None, module.stride, module.padding, module.dilation).movedim(1, -1)
    return functional.linear(values, factor_a)


def _out(module: nn.Module, low: Tensor, factor_b: Tensor) -> Tensor:
    """``B`` of ``(..., R)``, in the form of the module's output."""
    delta = functional.linear(low, factor_b)
    return delta.movedim(-1, 1) if isinstance(module, _ConvNd) else delta


def _check_shares(values: Tensor, count: int) -> None:
    if len(values) % count:
        raise LoraFactoryError(
            f"a module gets {len(values)} rows for {count} adapters, which cannot be told apart; give each adapter as "
            "many, and adapt modules that keep the rows of the batch: target_modules= (--target-modules)"
        )


class AdapterSlot:
    """The one LoRA slot of a model, overwritten in place with one adapter after another.

    Overwriting costs a copy of the weights; adding adapter after adapter slows the model down with their number.

    Args:
        model: A base model with a LoRA attached, as ``get_peft_model(base, layout.peft_config())`` makes it; the slot
            may have a higher rank.
        layout: Names, shapes and scaling of the adapters to come.
        adapter_name: The slot's name in ``model``.

    Raises:
        LoraFactoryError: When the slot is not one for this layout: other modules, sizes or scaling, or a lower rank.
    """

    def __init__(self, model: PeftModel, layout: AdapterLayout, adapter_name: str = "default") -> None:
        """Find the slot's parameters and check them against the layout."""
        self.model = model = plain_model(model)
        self.layout = layout
        self._parameters = adapter_parameters(model, adapter_name)
        if misfits := _misfits(self._parameters, layout):
            raise LoraFactoryError(
                f"the adapter does not fit the slot {adapter_name!r}: {few(misfits)}; give a model whose slot is made "
                "for it, as get_peft_model(base_model, layout.peft_config()) and generate_adapter make one"
            )
        modules = modules_by_path(base_of(model))
        for module in layout.modules:
            layer = modules[module.path]
            assert isinstance(layer, LoraLayer)  # its parameters were found above
            scaling = float(layer.scaling[adapter_name])  # a tensor where PEFT has prepared the model for compilation
            if not math.isclose(scaling, module.scaling, rel_tol=1e-6):
                raise LoraFactoryError(
                    f"{module.path} scales its LoRA by {scaling}, the layout by {module.scaling}; "
                    "attach the slot with get_peft_model(base_model, layout.peft_config())"
                )

    @torch.no_grad()
    def load(self, adapter: Tensor | Mapping[str, Tensor]) -> None:
        """Overwrite the slot's weights; they keep their precision and device. Merged adapters are unmerged first.

        Args:
            adapter: A vector of shape ``(D,)``, or a PEFT state dict.

        Raises:
            LoraFactoryError: When keys or shapes do not fit the layout, or a weight is not finite. Nothing is written.
        """
        if isinstance(adapter, Tensor):
            adapter = self.layout.unflatten(adapter)
        adapter = lora_weights(adapter)
        self.layout.check(adapter)
        unmerge(self.model)  # the base weights hold the adapter that is overwritten here
        for key, parameter in self._parameters.items():
            parameter.copy_(_placed_like(parameter, _filled_up(adapter[key], parameter.shape)))

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the model is its base model alone."""
        return without_adapters(self.model)


def adapter_parameters(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The LoRA parameters of one adapter slot by their PEFT state dict key.

    Raises:
        LoraFactoryError: When the model has no LoRA of this name.
    """
    slot = re.compile(rf"(\.lora_(?:embedding_)?[AB])\.{re.escape(adapter_name)}(?=\.|$)")
    parameters: dict[str, Tensor] = {
        plain_name(slot.sub(r"\1", name)): parameter
        for name, parameter in model.named_parameters()
        if slot.search(name)
    }
    if not parameters:
        raise LoraFactoryError(
            f"the model has no LoRA named {adapter_name!r}; attach one with "
            "get_peft_model(base_model, layout.peft_config())"
        )
    return parameters


def _misfits(slot: Mapping[str, Tensor], layout: AdapterLayout) -> list[str]:
    """Say why adapters of a layout cannot be written into a slot's parameters, a sentence for each reason."""
    own = {key for module in layout.modules for key in (module.key_a, module.key_b)}
    found = [f"the slot has {key}, the adapter does not" for key in sorted(slot.keys() - own)]
    for module in layout.modules:
        a, b = slot.get(module.key_a), slot.get(module.key_b)
        if a is None or b is None:
            found.append(f"the slot has no {module.path}")
            continue
        sizes = (tuple(a.shape[1:]), (b.shape[0], *b.shape[2:]))
        if sizes != module.sizes:
            found.append(f"{module.path} has sizes {sizes} in the slot, {module.sizes} in the adapter")
        elif a.shape[0] < module.rank:
            found.append(f"{module.path} has rank {a.shape[0]} in the slot, {module.rank} in the adapter")
    return found


def _filled_up(value: Tensor, shape: torch.Size) -> Tensor:
    """A factor of an adapter with zeros up to the rank of its slot."""
    if value.shape == shape:
        return value
    filled = value.new_zeros(shape)
    filled[tuple(slice(size) for size in value.shape)] = value
    return filled


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded, in one piece; all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check_base(base: nn.Module, layout: AdapterLayout) -> None:
    """Refuse a base model without a layout's modules, or with modules of other sizes."""
    _warn_of_another_base(base, layout)
    modules = modules_by_path(base)
    for adapted in layout.modules:
        module = modules.get(adapted.path)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if weight is None:
            raise LoraFactoryError(_missing_module(base, layout, adapted.path))
        expected = {adapted.shape_a[1], adapted.shape_b[0]}
        if set(weight.shape[:2]) != expected:
            raise LoraFactoryError(
                f"{adapted.path} of the base model has shape {tuple(weight.shape)}, the adapter fits sizes "
                f"{sorted(expected)}; it is for {layout.base_model}: {_remedy(base, layout)}"
            )


def _missing_module(base: nn.Module, layout: AdapterLayout, path: str) -> str:
    """Explain that a base model lacks a module of an adapter."""
    modules, expert = modules_by_path(base), re.search(r"(?:^|\.)experts\.\d+\.", path)
    stacked = [
        name
        for name, module in modules.items()
        if name.endswith("experts") and not any(child.isdecimal() for child, _ in module.named_children())
    ]
    if expert and stacked:
        return (
            f"the adapter is for single experts, such as {path!r}; in this base model the experts of a layer are one "
            f"module, {stacked[0]!r}, with stacked weights, which are not supported here: load the adapter with "
            "PEFT, which converts it: PeftModel.from_pretrained(base_model, folder)"
        )
    return f"the base model has no module {path!r}; this adapter is for {layout.base_model}: {_remedy(base, layout)}"


def _remedy(base: nn.Module, layout: AdapterLayout) -> str:
    """Name the base model to pass instead; a model with the adapter's base name must be another version of it."""
    if getattr(getattr(base, "config", None), "name_or_path", None) != layout.base_model:
        return f"pass base_model={layout.base_model!r}"
    return (
        f"the model that was given has this name too, but is another version of it or was changed; its class is "
        f"{type(base).__name__}. Load it as it was when the adapter was trained"
    )


def _warn_of_another_base(model: nn.Module, layout: AdapterLayout) -> None:
    """Say so when a model from the Hub is another one, or at another commit, than an adapter was made for."""
    config: Any = getattr(model, "config", None)
    name, commit = (
        getattr(config, "name_or_path", ""),
        getattr(config, "_commit_hash", None),
    )  # known where load_base_model loaded it
    if not all(is_hub_id(one) and not Path(one).exists() for one in (name, layout.base_model)):
        return
    if name != layout.base_model or (commit and layout.base_revision and commit != layout.base_revision):
        _LOGGER.warning(
            "the adapter is for %s at commit %s, the base model is %s at commit %s; pass base_model=%r",
            *(layout.base_model, layout.base_revision or "unknown", name, commit or "unknown", layout.base_model),
        )


def _placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A value as a parameter can take it: sharded, where that is."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
