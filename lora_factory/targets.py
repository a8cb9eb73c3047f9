"""Which modules of a base model a LoRA goes into, by the names that a user gives."""

from __future__ import annotations

import warnings
from difflib import get_close_matches

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, _maybe_include_all_linear_layers
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from lora_factory.errors import LoraFactoryError

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, given: str) -> str | list[str]:
    """The ``target_modules`` of a LoraConfig.

    Args:
        model: The base model.
        given: Comma-separated names as PEFT takes them, or ``all-linear``: all linear modules but the head. Of a
            mixture of experts or a Mamba, these are the ones that PEFT adapts as modules; a warning names the rest.

    Raises:
        LoraFactoryError: When a name is none of the model's, or PEFT cannot adapt the module; names those that work.
    """
    every = LoraConfig(target_modules=ALL_LINEAR)
    _maybe_include_all_linear_layers(every, model)  # replaces the shorthand by the paths
    paths = {path: path.rpartition(".")[2] for path in sorted(every.target_modules or ())}
    plain = {name for name in set(paths.values()) if _is_plain(model, name)}
    if given.strip().lower() == ALL_LINEAR:
        return _all_linear(model, paths, plain)
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise LoraFactoryError(f"target_modules={given!r} names no module; {_advice(plain)}")
    known = [path for path, _ in model.named_modules() if path]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in known):
            near = get_close_matches(name, sorted({path.rpartition(".")[2] for path in known} | set(known)), n=3)
            meant = f" (nearest: {', '.join(near)})" if near else ""
            raise LoraFactoryError(
                f"target_modules: {name!r} does not fit this {type(model).__name__}, which has no such module{meant}; "
                f"{_advice(plain)}"
            )
        if not _is_plain(model, name.rpartition(".")[2]):
            raise LoraFactoryError(
                f"target_modules: PEFT cannot adapt {name!r} of this {type(model).__name__} as a module; "
                f"{_advice(plain)}"
            )
    return names


def _all_linear(model: nn.Module, paths: dict[str, str], plain: set[str]) -> str | list[str]:
    """``all-linear`` where PEFT adapts all of them, else the paths of those that it does."""
    if not plain:
        raise LoraFactoryError(
            f"target_modules={ALL_LINEAR!r}: this {type(model).__name__} has no linear module that PEFT adapts; "
            "name its modules, for example of convolutions"
        )
    config = LoraConfig(target_modules=ALL_LINEAR)
    convert_peft_config_for_transformers(config, model, None)
    if not config.target_parameters and plain == set(paths.values()):
        return ALL_LINEAR
    left = sorted({*map(str, config.target_parameters or ()), *(set(paths.values()) - plain)})
    warnings.warn(
        f"all-linear adapts {', '.join(sorted(plain))} of this {type(model).__name__}; {', '.join(left)} stay as they "
        "are, since PEFT cannot adapt them as modules",
        stacklevel=3,
    )
    return [path for path, name in paths.items() if name in plain]


def _is_plain(model: nn.Module, name: str) -> bool:
    """Whether PEFT adapts modules of this name as modules, and neither refuses them nor takes parameters instead."""
    config = LoraConfig(target_modules=[name])
    try:
        _check_lora_target_modules_mamba(config, model, name)
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return False
    return not config.target_parameters


def _advice(plain: set[str]) -> str:
    return f"name some of {', '.join(sorted(plain))}, or all-linear" if plain else "name modules that it has"
