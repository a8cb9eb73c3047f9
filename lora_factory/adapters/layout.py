"""The geometry of a LoRA adapter: PEFT state dict and flat vector, each turned into the other bit-exactly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_factory.adapters.modules import (
    AdaptedModule,
    check_plain_lora,
    exact_targets,
    find_modules,
    lora_weights,
    module_paths,
    name_targets,
    own_patterns,
    plain_json,
    ranks_and_scalings,
)
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.paths import sha256_text
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
        if not isinstance(self.base_revision, str | None):
            raise LoraFactoryError(f"base_revision is {self.base_revision!r}; give a branch, tag or commit, or None")
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
    def rank(self) -> int:
        """The highest rank of a module."""
        return max(module.rank for module in self.modules)

    @cached_property
    def size(self) -> int:
        """D, the number of weights of one adapter."""
        return sum(map(math.prod, self._shapes.values()))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its key, in the order of the vector."""
        return {
            key: shape
            for module in self.modules
            for key, shape in ((module.key_a, module.shape_a), (module.key_b, module.shape_b))
        }

    @classmethod
    def union(cls, layouts: Sequence[AdapterLayout], rank: int | None = None) -> AdapterLayout:
        """Build the layout that adapters of all these layouts can be turned into with `widen`.

        Base model, revision and configuration are those of the first layout. Every module has the scaling that its r,
        lora_alpha and use_rslora give without patterns; rank_pattern and alpha_pattern are dropped.

        Args:
            layouts: layouts for one base model; a module that several have has the same sizes in each.
            rank: rank of every module; default: the highest rank of a module of the layouts.

        Raises:
            LoraFactoryError: if a module has other sizes in another layout, or the rank is below 1.
        """
        first = layouts[0]
        modules: dict[str, AdaptedModule] = {}
        for module in (module for layout in layouts for module in layout.modules):
            if modules.setdefault(module.path, module).sizes != module.sizes:
                raise LoraFactoryError(
                    f"{module.path} has sizes {module.sizes} in one layout, {modules[module.path].sizes} in another; "
                    "give layouts for one base model"
                )
        rank = max(layout.rank for layout in layouts) if rank is None else rank
        if rank < 1:
            raise LoraFactoryError(f"rank={rank}, expected at least 1; give a higher one")
        config = dict(first.lora_config) | {"rank_pattern": {}, "alpha_pattern": {}}
        paths = sorted(modules, key=natural_key)
        ((_, scaling),) = ranks_and_scalings(config, paths[:1])
        config |= {"r": rank, "lora_alpha": scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)}
        if len(paths) > len(first.modules):
            config = name_targets(config, paths)
        wide = tuple(replace(modules[path].with_rank(rank), scaling=scaling) for path in paths)
        return cls(first.base_model, first.base_revision, wide, config)

    def with_rank(self, rank: int) -> AdapterLayout:
        """Return the same modules, all with one rank, higher or lower than now.

        Every module has the scaling that the configuration's r, lora_alpha and use_rslora give without patterns;
        rank_pattern and alpha_pattern are dropped.

        Raises:
            LoraFactoryError: if the rank is below 1.
        """
        return self.union([self], rank)

    def misfits(self, wider: AdapterLayout) -> list[str]:
        """Say which modules keep adapters of this layout from being widened to `wider`, a sentence each."""
        room, found = {module.path: module for module in wider.modules}, []
        for module in self.modules:
            if (there := room.get(module.path)) is None:
                found.append(f"{module.path} is not among the {len(room)} modules there")
            elif there.sizes != module.sizes:
                found.append(f"{module.path} has sizes {module.sizes}, expected {there.sizes}")
            elif there.rank < module.rank:
                found.append(f"{module.path} has rank {module.rank}, expected at most {there.rank}")
        return found

    def widen(self, vector: Tensor, wider: AdapterLayout) -> Tensor:
        """Turn vectors of this layout into those of another one for the same base, which do the same.

        Rank slices and modules that this layout does not have are zero. Where scalings differ, B is multiplied by
        their ratio; all else stays bit for bit.

        Args:
            vector: shape (..., D).
            wider: a layout with at least these modules and ranks, see `union` and `with_rank`.

        Returns:
            Shape (..., D of `wider`), in the precision of `vector`. Differentiable.

        Raises:
            LoraFactoryError: if a module is missing in `wider`, has other sizes or a higher rank.
        """
        if misfits := self.misfits(wider):
            raise LoraFactoryError(
                f"{len(misfits)} of {len(self.modules)} modules have no room: {few(misfits)}; widen to a layout that "
                "AdapterLayout.union or with_rank makes for them"
            )
        weights, own = self.unflatten(vector), {module.path: module for module in self.modules}
        parts = {}
        for wide in wider.modules:
            if (module := own.get(wide.path)) is None:
                parts[wide.key_a] = vector.new_zeros(*vector.shape[:-1], *wide.shape_a)
                parts[wide.key_b] = vector.new_zeros(*vector.shape[:-1], *wide.shape_b)
                continue
            a, b, spare = weights[module.key_a], weights[module.key_b], wide.rank - module.rank
            if module.scaling != wide.scaling:
                b = b * (module.scaling / wide.scaling)
            parts[wide.key_a] = pad(a, (*(0, 0) * (len(wide.shape_a) - 1), 0, spare))
            parts[wide.key_b] = pad(b, (*(0, 0) * (len(wide.shape_b) - 2), 0, spare))
        return wider.flatten(parts, check=False)

    def facts(self) -> dict[str, object]:
        """What people want to know of adapters of this layout, by name."""
        ranks = sorted({module.rank for module in self.modules})
        return {
            "base model": self.base_model,
            "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            "modules": len(self.modules),
            "weights of an adapter": f"{self.size:,}",
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of what fixes the geometry: the modules and the base model's name."""
        geometry = {"base_model": self.base_model, "modules": [plain_json(asdict(module)) for module in self.modules]}
        return sha256_text(json.dumps(geometry, sort_keys=True))

    def check(self, state_dict: Mapping[str, Tensor], leading: tuple[int, ...] = ()) -> None:
        """Check that a state dict is an adapter of this layout, or several at once after ``leading`` dimensions.

        Raises:
            LoraFactoryError: for missing or unknown keys, other shapes, integers, 8-bit floats, NaN or infinity; names
                the first.
        """
        self.check_shapes(state_dict, leading)
        bad = [key for key in self._shapes if not _is_finite(state_dict[key])]
        if bad:
            raise LoraFactoryError(
                f"{len(bad)} of {len(self._shapes)} tensors hold NaN, infinity, integers or 8-bit floats: {few(bad)}"
            )

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
            self.check(state_dict, leading)
        parts = [state_dict[key].flatten(len(leading)) for key in self._shapes]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split vectors (..., D) into a state dict of contiguous tensors (..., *shape), views where possible."""
        return {key: part.contiguous() for key, part in self.views(vector).items()}

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Split vectors (..., D) into a state dict of views (..., *shape)."""
        if vector.ndim < 1 or vector.shape[-1] != self.size:
            raise LoraFactoryError(f"vector has shape {tuple(vector.shape)}, expected (..., {self.size})")
        parts = vector.split([math.prod(shape) for shape in self._shapes.values()], dim=-1)
        return {key: part.unflatten(-1, shape) for (key, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def peft_config(self) -> LoraConfig:
        """Return the PEFT configuration of adapters of this layout, for inference, naming base model and commit."""
        from peft import LoraConfig

        try:
            config = LoraConfig.from_peft_type(**self.inference_config())
        except (TypeError, ValueError) as error:
            raise LoraFactoryError(
                f"PEFT takes no LoRA with the settings of this layout: {error}; correct its lora_config"
            ) from error
        assert isinstance(config, LoraConfig)  # check_plain_lora saw peft_type LORA
        return config

    def inference_config(self) -> dict[str, Any]:
        """Return the JSON form of `peft_config`, which is what ``adapter_config.json`` holds; PEFT is not needed."""
        base = {"base_model_name_or_path": self.base_model, "revision": self.base_revision, "auto_mapping": None}
        return {**plain_json(self.lora_config), **base, "inference_mode": True}

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

    def check_shapes(self, state_dict: Mapping[str, Tensor], leading: tuple[int, ...] = ()) -> None:
        """Check keys and shapes, those of several adapters at once after ``leading`` dimensions; reads no number."""
        count, made_with = len(self._shapes), f"make adapters of {self.base_model} with AdapterLayout.peft_config()"
        missing = [key for key in self._shapes if key not in state_dict]
        unknown = sorted(set(state_dict) - set(self._shapes))
        if missing or unknown:
            raise LoraFactoryError(
                f"not an adapter of this layout: {len(missing)} of {count} keys are missing ({few(missing)}), "
                f"{len(unknown)} are unknown ({few(unknown)}); {made_with}"
            )
        shapes = [
            f"{key} has {tuple(state_dict[key].shape)}, expected {(*leading, *shape)}"
            for key, shape in self._shapes.items()
            if tuple(state_dict[key].shape) != (*leading, *shape)
        ]
        if shapes:
            raise LoraFactoryError(f"{len(shapes)} tensors have another shape: {few(shapes)}; {made_with}")


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, from their extremes, which is many times as fast as one by one."""
    return tensor.dtype in PRECISIONS and (not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all()))
