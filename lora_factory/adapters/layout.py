"""The geometry of a LoRA adapter: PEFT state dict and flat vector, each turned into the other bit-exactly."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_factory.adapters.modules import (
    AdaptedModule,
    check_plain_lora,
    exact_targets,
    find_modules,
    lora_weights,
    module_paths,
    own_patterns,
    plain_json,
    ranks_and_scalings,
)
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.printable import few, natural_key
from lora_factory.utils.versions import check_format

if TYPE_CHECKING:
    from peft import LoraConfig

FORMAT_VERSION = 1
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class AdapterLayout:
    """The weights of an adapter, their order in the flat vector, and their base model.

    The flat vector holds the modules in natural order (numbers compared as numbers), A before B, each row-major.

    Attributes:
        base_model: Hub id (or folder) that adapters name as their base.
        base_revision: commit of the base model, or None.
        modules: the adapted modules in natural order.
        lora_config: JSON form of the PEFT LoraConfig, without base model and revision.

    Raises:
        LoraFactoryError: if modules and LoRA configuration contradict each other, or an option is not plain LoRA.
    """

    base_model: str
    base_revision: str | None
    modules: tuple[AdaptedModule, ...]
    lora_config: Mapping[str, Any] = field(hash=False)

    def __post_init__(self) -> None:
        """Check the layout at birth."""
        if not (isinstance(self.base_model, str) and self.base_model):
            raise LoraFactoryError(
                f"base_model is {self.base_model!r}; name the Hub id or folder that the adapters belong to"
            )
        paths = [module.path for module in self.modules]
        if not paths or paths != sorted(set(paths), key=natural_key):
            raise LoraFactoryError("the modules of a layout must be at least one, distinct and in natural order")
        check_plain_lora(self.lora_config)
        object.__setattr__(self, "lora_config", exact_targets(self.lora_config, paths))
        expected = ranks_and_scalings(self.lora_config, paths)
        for module, (rank, scaling) in zip(self.modules, expected, strict=True):
            if module.rank != rank or not math.isclose(module.scaling, scaling):
                raise LoraFactoryError(
                    f"{module.path}: the weights have rank {module.rank} and scaling {module.scaling:g}, but r, "
                    f"lora_alpha and their patterns in the LoraConfig say {rank} and {scaling:g}; "
                    "pass the LoraConfig that the weights were trained with"
                )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        lora_config: LoraConfig,
        *,
        base_model: str,
        base_revision: str | None = None,
    ) -> AdapterLayout:
        """Read the layout off one adapter.

        Args:
            state_dict: what `peft.get_peft_model_state_dict` returns.
            lora_config: the LoraConfig that made it.
            base_model: Hub id or folder of the base model.
            base_revision: commit of the base model.

        Raises:
            LoraFactoryError: for any key that is not half of a LoRA pair, with the reason.
        """
        base_names = ("base_model_name_or_path", "revision")
        config = {name: value for name, value in plain_json(lora_config.to_dict()).items() if name not in base_names}
        weights = lora_weights(state_dict)
        config = own_patterns(config, module_paths(weights))
        return cls(base_model, base_revision, find_modules(weights, config), config)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterLayout:
        """Rebuild a layout from `to_dict`'s JSON.

        Raises:
            LoraFactoryError: for an unknown format version, missing entries or entries that contradict each other.
        """
        check_format(values.get("format_version"), FORMAT_VERSION, "the layout")
        try:
            modules = tuple(
                AdaptedModule(
                    path=str(module["path"]),
                    key_a=str(module["key_a"]),
                    key_b=str(module["key_b"]),
                    shape_a=tuple(module["shape_a"]),
                    shape_b=tuple(module["shape_b"]),
                    scaling=module["scaling"],
                )
                for module in values["modules"]
            )
            return cls(values["base_model"], values["base_revision"], modules, dict(values["lora_config"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LoraFactoryError(
                f"the layout is damaged ({type(error).__name__}: {error}); take it from AdapterLayout.to_dict()"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as JSON values, for `from_dict`."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "modules": [plain_json(asdict(module)) for module in self.modules],
            "lora_config": plain_json(self.lora_config),
        }

    @cached_property
    def size(self) -> int:
        """D, the number of weights of one adapter."""
        return sum(math.prod(module.shape_a) + math.prod(module.shape_b) for module in self.modules)

    def with_rank(self, rank: int) -> AdapterLayout:
        """Return the same modules, every one with this rank and with the scaling of the layout's own ``r``.

        Ranks and scalings of single modules (``rank_pattern``, ``alpha_pattern``) are gone.
        """
        config = dict(self.lora_config)
        growth = rank / config["r"]
        alpha = config["lora_alpha"] * (math.sqrt(growth) if config.get("use_rslora") else growth)
        config |= {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules = tuple(replace(module.with_rank(rank), scaling=scaling) for module in self.modules)
        return AdapterLayout(self.base_model, self.base_revision, modules, config)

    def widen(self, vector: Tensor, wider: AdapterLayout) -> Tensor:
        """Turn vectors (..., D) into those of another layout (..., D of `wider`) that do the same.

        Rank slices and modules that only `wider` has are zero; B makes up for another scaling.

        Raises:
            LoraFactoryError: if `wider` lacks a module, or has it in another size or of a lower rank.
        """
        weights, padded = self.unflatten(vector), {}
        theirs = {module.path: module for module in wider.modules}
        own = {module.path: module for module in self.modules}
        for module in self.modules:
            room = theirs.get(module.path)
            if room is None or module.with_rank(room.rank).shapes != room.shapes or room.rank < module.rank:
                there = "none" if room is None else f"rank {room.rank}, sizes {room.shapes}"
                raise LoraFactoryError(
                    f"{module.path} has rank {module.rank} and sizes {module.shapes}, the other layout {there}; "
                    "make it with with_rank of the highest rank"
                )
        for room in wider.modules:
            shapes = [(*vector.shape[:-1], *shape) for shape in room.shapes]
            a, b = padded[room.key_a], padded[room.key_b] = [vector.new_zeros(shape) for shape in shapes]
            if (module := own.get(room.path)) is not None:
                a.narrow(vector.ndim - 1, 0, module.rank).copy_(weights[module.key_a])
                change = module.scaling / room.scaling
                values = weights[module.key_b] if math.isclose(change, 1) else change * weights[module.key_b]
                b.narrow(vector.ndim, 0, module.rank).copy_(values)
        return wider.flatten(padded, check=False)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of what fixes the geometry: the modules and the base model's name."""
        geometry = {"base_model": self.base_model, "modules": [plain_json(asdict(module)) for module in self.modules]}
        return hashlib.sha256(json.dumps(geometry, sort_keys=True).encode()).hexdigest()

    def check(self, state_dict: Mapping[str, Tensor]) -> None:
        """Check that a state dict is an adapter of this layout.

        Raises:
            LoraFactoryError: for missing or unknown keys, other shapes, integers, 8-bit floats, NaN or infinity; names
                the first.
        """
        self._check(state_dict, ())

    def flatten(self, state_dict: Mapping[str, Tensor], check: bool = True) -> Tensor:
        """Join a state dict into one vector.

        Args:
            state_dict: tensors of the layout's shapes, all with the same leading dimensions, for example checkpoints.
            check: whether to check keys, shapes and finiteness first.

        Returns:
            (..., D) in the tensors' dtype (bit-exact); float32 where they have several.
        """
        first = state_dict.get(self.modules[0].key_a)
        leading = () if first is None else tuple(first.shape[: first.ndim - len(self.modules[0].shape_a)])
        if check:
            self._check(state_dict, leading)
        parts = [state_dict[segment.key].reshape(*leading, segment.size) for segment in self._segments]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split vectors (..., D) into a state dict of contiguous tensors (..., *shape), views where possible."""
        parts = self._split(vector)
        return {
            segment.key: part.unflatten(-1, segment.shape).contiguous()
            for segment, part in zip(self._segments, parts, strict=True)
        }

    def peft_config(self) -> LoraConfig:
        """Return the PEFT configuration of adapters of this layout, for inference, naming base model and commit."""
        from peft import LoraConfig

        base = {"base_model_name_or_path": self.base_model, "revision": self.base_revision, "auto_mapping": None}
        config = LoraConfig.from_peft_type(**(plain_json(self.lora_config) | base | {"inference_mode": True}))
        assert isinstance(config, LoraConfig)  # check_plain_lora saw peft_type LORA
        return config

    def training_config(self) -> LoraConfig:
        """Return a PEFT configuration that puts a trainable LoRA on just these modules, with their ranks and scalings.

        It names every module by its whole path, so that neither patterns nor names that occur elsewhere in the base
        model add or drop one.
        """
        from peft import LoraConfig

        config = self.lora_config
        rslora = bool(config.get("use_rslora"))
        alphas = {m.path: m.scaling * (math.sqrt(m.rank) if rslora else m.rank) for m in self.modules}
        return LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules=[module.path for module in self.modules],
            rank_pattern={re.escape(m.path): m.rank for m in self.modules if m.rank != config["r"]},
            alpha_pattern={re.escape(p): a for p, a in alphas.items() if not math.isclose(a, config["lora_alpha"])},
            use_rslora=rslora,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            task_type=config.get("task_type"),
        )

    @cached_property
    def _segments(self) -> tuple[_Segment, ...]:
        """Both factors of all modules, in the order of the vector."""
        return tuple(_Segment(module, factor) for module in self.modules for factor in "AB")

    def _split(self, vector: Tensor) -> tuple[Tensor, ...]:
        if vector.ndim < 1 or vector.shape[-1] != self.size:
            raise LoraFactoryError(f"vector has shape {tuple(vector.shape)}, expected (..., {self.size})")
        return vector.split([segment.size for segment in self._segments], dim=-1)

    def check_shapes(self, state_dict: Mapping[str, Tensor], leading: tuple[int, ...] = ()) -> None:
        """Check keys and shapes, those of several adapters at once after ``leading`` dimensions; reads no number."""
        keys = [segment.key for segment in self._segments]
        made_with = f"make adapters of {self.base_model} with AdapterLayout.peft_config()"
        missing, unknown = [key for key in keys if key not in state_dict], sorted(set(state_dict) - set(keys))
        if missing or unknown:
            raise LoraFactoryError(
                f"not an adapter of this layout: {len(missing)} of {len(keys)} keys are missing ({few(missing)}), "
                f"{len(unknown)} are unknown ({few(unknown)}); {made_with}"
            )
        shapes = [
            f"{segment.key} has {tuple(state_dict[segment.key].shape)}, expected {(*leading, *segment.shape)}"
            for segment in self._segments
            if tuple(state_dict[segment.key].shape) != (*leading, *segment.shape)
        ]
        if shapes:
            raise LoraFactoryError(f"{len(shapes)} tensors have another shape: {few(shapes)}; {made_with}")

    def _check(self, state_dict: Mapping[str, Tensor], leading: tuple[int, ...]) -> None:
        self.check_shapes(state_dict, leading)
        keys = [segment.key for segment in self._segments]
        bad = [key for key in keys if not _is_finite(state_dict[key])]
        if bad:
            raise LoraFactoryError(
                f"{len(bad)} of {len(keys)} tensors hold NaN, infinity, integers or 8-bit floats: {few(bad)}"
            )


@dataclass(frozen=True)
class _Segment:
    """One factor of one module: a stretch of the vector."""

    module: AdaptedModule
    factor: str

    @cached_property
    def key(self) -> str:
        return self.module.key_a if self.factor == "A" else self.module.key_b

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.module.shape_a if self.factor == "A" else self.module.shape_b

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, from their extremes, which is many times as fast as one by one."""
    return tensor.dtype in PRECISIONS and (not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all()))
