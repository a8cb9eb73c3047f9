"""PEFT adapters and models: attach one strictly, overwrite its slot in place, read one from a folder."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from lora_factory.adapted_modules import check_plain_lora, exact_targets, module_paths
from lora_factory.errors import LoraFactoryError
from lora_factory.files import read_json, write_json
from lora_factory.layout import AdapterLayout
from lora_factory.safe_files import MAX_CONFIG_BYTES, checked_file, is_hub_id, read_json_object

ADAPTER_FILE = "adapter_model.safetensors"
MAX_ADAPTER_BYTES = 16 << 30
_LOGGER = logging.getLogger(__name__)
_PRECISIONS = {"torch.float32", "torch.float16", "torch.bfloat16"}


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    layout: AdapterLayout,
    state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
) -> PeftModel:
    """Attach adapter weights to a base model, strictly.

    Raises:
        LoraFactoryError: When a module of the layout is missing in the model or has another size.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _warn_of_another_base(base, layout)
    modules = dict(base.named_modules())
    for adapted in layout.modules:
        weight = getattr(getattr(modules.get(adapted.path), "base_layer", modules.get(adapted.path)), "weight", None)
        if weight is None:
            raise LoraFactoryError(
                f"the base model has no module {adapted.path!r}; this adapter is for {layout.base_model}: "
                f"pass base_model={layout.base_model!r}"
            )
        expected = {adapted.shape_a[1], adapted.shape_b[0]}
        if set(weight.shape[:2]) != expected:
            raise LoraFactoryError(
                f"{adapted.path} of the base model has shape {tuple(weight.shape)}, the adapter fits sizes "
                f"{sorted(expected)}; it is for {layout.base_model}: pass base_model={layout.base_model!r}"
            )
    if not isinstance(model, PeftModel):
        model = wrap_base(model, layout.peft_config(), adapter_name)
    elif adapter_name not in model.peft_config:
        model.add_adapter(adapter_name, layout.peft_config())
    AdapterSlot(model, layout, adapter_name).load(state_dict)
    model.set_adapter(adapter_name)
    return model.eval()


def save_adapter_config(layout: AdapterLayout, folder: Path) -> None:
    """Write ``adapter_config.json`` as PEFT does, but with sets in alphabetical order: the same bytes every time."""
    config, path = layout.peft_config(), folder / "adapter_config.json"
    config.save_pretrained(str(folder))
    values = read_json(path)
    write_json(
        path,
        {
            name: sorted(value) if isinstance(getattr(config, name, None), set) else value
            for name, value in values.items()
        },
    )


def wrap_base(model: PreTrainedModel, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """``peft.get_peft_model`` with a clear error, and without the warnings that are about its own calls.

    Raises:
        LoraFactoryError: When none of the config's target modules is in the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        public_name = config.base_model_name_or_path
        try:
            wrapped = get_peft_model(model, config, adapter_name=adapter_name)
        except ValueError as error:
            raise LoraFactoryError(
                f"a LoRA on {config.target_modules} does not fit this {type(model).__name__}: {error}; "
                "name some of its modules, or use all-linear"
            ) from error
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
        LoraFactoryError: When the base model has not the layout's modules, or a batch cannot be split into ``n``.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = layout.unflatten(adapters)
    handles = []
    try:
        for adapted in layout.modules:
            try:
                module = base.get_submodule(adapted.path)
            except AttributeError:
                raise LoraFactoryError(
                    f"the base model has no module {adapted.path!r}; this adapter is for {layout.base_model}"
                ) from None
            target = module.base_layer if isinstance(module, LoraLayer) else module
            pair = weights[adapted.key_a], weights[adapted.key_b] * adapted.scaling
            handles.append(target.register_forward_hook(partial(_add_lora, *pair)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_adapters(model: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    """A context in which a model is its base model alone."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def _add_lora(factors_a: Tensor, factors_b: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ANN401
    """A module's output plus the LoRA of every share of the batch; ``factors_a`` is ``(n, *shape of A)``."""
    (values,) = inputs
    count = len(factors_a)
    if len(values) % count:
        raise LoraFactoryError(
            f"a batch of {len(values)} rows cannot be shared by {count} adapters; give each as many"
        )
    if isinstance(module, nn.Embedding):
        pairs = zip(values.chunk(count), factors_a, factors_b, strict=True)
        return output + torch.cat([functional.embedding(rows, a.T) @ b.T for rows, a, b in pairs]).to(output.dtype)
    values = values.to(factors_a.dtype)
    if isinstance(module, _ConvNd):
        convolution: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[factors_a.ndim - 4]
        geometry = (None, module.stride, module.padding, module.dilation)
        pairs = zip(values.chunk(count), factors_a, factors_b, strict=True)
        return output + torch.cat([convolution(convolution(x, a, *geometry), b) for x, a, b in pairs]).to(output.dtype)
    flat = values.reshape(count, -1, values.shape[-1])
    delta = flat @ factors_a.transpose(1, 2) @ factors_b.transpose(1, 2)
    return output + delta.reshape(output.shape).to(output.dtype)


class AdapterSlot:
    """The one LoRA slot of a model, overwritten in place with one adapter after another.

    Overwriting costs a copy of the weights; adding adapter after adapter slows the model down with their number.

    Args:
        model: A base model with a LoRA attached, as ``get_peft_model(base, layout.peft_config())`` makes it.
        layout: Names, shapes and scaling of the adapters to come.
        adapter_name: The slot's name in ``model``.

    Raises:
        LoraFactoryError: When the slot is not one for this layout: other modules, shapes or scaling.
    """

    def __init__(self, model: PeftModel, layout: AdapterLayout, adapter_name: str = "default") -> None:
        """Find the slot's parameters and check them against the layout."""
        self.model = model
        self.layout = layout
        self._parameters = adapter_parameters(model, adapter_name)
        layout.check(self._parameters)
        for module in layout.modules:
            layer = model.get_base_model().get_submodule(module.path)
            assert isinstance(layer, LoraLayer)  # its parameters were found above
            scaling = layer.scaling[adapter_name]
            if not math.isclose(scaling, module.scaling, rel_tol=1e-6):
                raise LoraFactoryError(
                    f"{module.path} scales its LoRA by {scaling}, the layout by {module.scaling}; "
                    "attach the slot with get_peft_model(base_model, layout.peft_config())"
                )

    @torch.no_grad()
    def load(self, adapter: Tensor | Mapping[str, Tensor]) -> None:
        """Overwrite the slot's weights; they keep their precision and device.

        Args:
            adapter: A vector of shape ``(D,)``, or a PEFT state dict.

        Raises:
            LoraFactoryError: When keys or shapes do not fit the layout, or a weight is not finite. Nothing is written.
        """
        if isinstance(adapter, Tensor):
            adapter = self.layout.unflatten(adapter)
        self.layout.check(adapter)
        for key, parameter in self._parameters.items():
            parameter.copy_(_placed_like(parameter, adapter[key]))

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
        slot.sub(r"\1", name): parameter for name, parameter in model.named_parameters() if slot.search(name)
    }
    if not parameters:
        raise LoraFactoryError(
            f"the model has no LoRA named {adapter_name!r}; attach one with "
            "get_peft_model(base_model, layout.peft_config())"
        )
    return parameters


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded, in one piece; all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_adapter(folder: str | Path, *, base_model: str | None = None) -> tuple[AdapterLayout, dict[str, Tensor]]:
    """Read a LoRA adapter's folder as PEFT writes it.

    Args:
        folder: The folder.
        base_model: The base model of an adapter whose configuration names none.

    Returns:
        The adapter's layout and its state dict.

    Raises:
        LoraFactoryError: When a file is missing or truncated, or the adapter is not a plain LoRA.
    """
    folder = Path(folder)
    try:
        values = read_json_object(
            checked_file(folder, "adapter_config.json", MAX_CONFIG_BYTES), limit=MAX_CONFIG_BYTES
        )
        check_plain_lora(values)
        path = checked_file(folder, ADAPTER_FILE, MAX_ADAPTER_BYTES)
        header = _header(path)
        values.pop("runtime_config", None)
        config = LoraConfig.from_peft_type(**exact_targets(values, module_paths(header)))
        assert isinstance(config, LoraConfig)  # check_plain_lora saw peft_type LORA
        name = config.base_model_name_or_path or base_model or ""
        if not name:
            raise LoraFactoryError("adapter_config.json names no base model; pass base_model= (--base-model)")
        # Names, shapes and ranks are checked before a weight is read.
        layout = AdapterLayout.from_state_dict(header, config, base_model=name, base_revision=config.revision)
        state_dict = load_file(path)
        layout.check(state_dict)
        _check_targets(config, layout)
    except LoraFactoryError as error:
        raise LoraFactoryError(f"cannot load an adapter from {folder}: {str(error)[:1000]}") from error
    except Exception as error:  # somebody else's files: whatever a parser raises, they cannot be loaded
        raise LoraFactoryError(
            f"{folder}: adapter_config.json or {ADAPTER_FILE} is damaged ({str(error)[:1000]}); "
            "write or download it again"
        ) from error
    if odd := sorted({str(tensor.dtype) for tensor in state_dict.values()} - _PRECISIONS):
        raise LoraFactoryError(f"the adapter in {folder} holds {odd}, expected one of {sorted(_PRECISIONS)}")
    return layout, state_dict


def _header(path: Path) -> dict[str, Tensor]:
    """Tensors on the meta device as the header of a safetensors file describes them; no weight is read."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _warn_of_another_base(model: nn.Module, layout: AdapterLayout) -> None:
    """Say so when a model from the Hub is another one, or at another commit, than an adapter was made for."""
    config: Any = model.config
    name, commit = config.name_or_path, getattr(config, "_commit_hash", None)  # known where load_base_model loaded it
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


def _check_targets(config: LoraConfig, layout: AdapterLayout) -> None:
    """Weights of a module that the configuration does not name would never be used."""
    if isinstance(config.target_modules, str) or not config.target_modules:
        return  # a pattern; attaching compares what it finds in the model with the weights
    strangers = [module.path for module in layout.modules if not check_target_module_exists(config, module.path)]
    if strangers:
        raise LoraFactoryError(
            f"{len(strangers)} adapted modules, first {strangers[0]!r}, are not among the target_modules "
            f"{sorted(config.target_modules)} of adapter_config.json; it belongs to another adapter"
        )
