"""The modules that a LoRA adapts: keys, shapes, rank and scaling; whatever is not plain LoRA is refused."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import Tensor, nn

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.printable import natural_key

_PREFIX = "base_model.model."
_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_REFUSED_KEYS = (
    ("lora_magnitude_vector", "DoRA's magnitude vector: train with LoraConfig(use_dora=False)"),
    ("modules_to_save", "a fully trained module: train with LoraConfig(modules_to_save=None)"),
    (".bias", 'a bias: train with LoraConfig(bias="none", lora_bias=False)'),
    (".lora_", "named after its adapter: take the state dict from peft.get_peft_model_state_dict(model)"),
    ("", "no LoRA weight: use peft.get_peft_model_state_dict(model, save_embedding_layers=False)"),
)
_REFUSED_OPTIONS = {
    "use_dora": "DoRA trains a magnitude vector besides A and B; train with use_dora=False",
    "modules_to_save": "it stores whole modules, which are no LoRA weights; train with modules_to_save=None",
    "trainable_token_indices": "it stores embedding rows, which are no LoRA weights; train without it",
    "target_parameters": "it stacks the experts' weights in one tensor; use target_modules",
    "ensure_weight_tying": "it gives tied modules one A and B; train with ensure_weight_tying=False",
    "lora_bias": "it trains a bias in B; train with lora_bias=False",
    "use_qalora": "it pools the input of A; train with use_qalora=False",
    "use_bdlora": "it makes A or B block-diagonal; train without it",
    "arrow_config": "it routes between adapters; train without it",
    "kasa_config": "it trains singular values besides A and B; train without it",
    "monteclora_config": "it trains a distribution besides A and B; train without it",
    "alora_invocation_tokens": "it acts only after certain tokens; train without it",
    "layer_replication": "it copies layers of the base model; train without it",
    "megatron_config": "it makes PEFT import a module that the configuration names; train without it",
}
_TYPES: dict[str, tuple[type, ...]] = {  # of a LoraConfig's options as JSON, beside None
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "fan_in_fan_out": (bool,),
    "use_rslora": (bool,),
    "bias": (str,),
    "task_type": (str,),
    "init_lora_weights": (bool, str),
}
_MAX_PATH = 300  # characters
_MAX_PATTERNS = 1 << 16
_MAX_RANK = 1 << 20
_SPECIAL = frozenset(chr(92) + "*+?{}[]()|^$")  # what makes a regular expression of a name
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class AdaptedModule:
    """One module of the base model that carries LoRA.

    Attributes:
        path: the module's name in the base model, for example "model.layers.0.self_attn.q_proj".
        key_a: full PEFT state dict key of A, ending in ".lora_A.weight" or ".lora_embedding_A".
        key_b: full PEFT state dict key of B.
        shape_a: (rank, in); embeddings (rank, vocabulary); convolutions (rank, in, *kernel).
        shape_b: (out, rank); embeddings (width, rank); convolutions (out, rank, 1, ...).
        scaling: what PEFT multiplies B A with: lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA.

    Raises:
        LoraFactoryError: if keys, shapes or scaling do not fit together.
    """

    path: str
    key_a: str
    key_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    scaling: float

    def __post_init__(self) -> None:
        """Check the module at birth."""
        name = _PREFIX + self.path
        if (self.key_a, self.key_b) not in [(name + a, name + b) for a, b in _SUFFIXES]:
            raise LoraFactoryError(f"{self.key_a!r} and {self.key_b!r} are not the LoRA keys of {self.path!r} in PEFT")
        if len(self.path) > _MAX_PATH:
            raise LoraFactoryError(f"{self.path[:50]!r}... is no module: its name has {len(self.path)} characters")
        sizes = (*self.shape_a, *self.shape_b)
        if min(len(self.shape_a), len(self.shape_b)) < 2 or any(type(n) is not int or n < 1 for n in sizes):
            raise LoraFactoryError(f"{self.path}: shapes {self.shape_a} and {self.shape_b} are no LoRA pair")
        if self.shape_b[1] != self.rank:
            raise LoraFactoryError(
                f"{self.path}: A has rank {self.rank}, B {self.shape_b[1]} (shapes {self.shape_a}, {self.shape_b}); "
                "grouped convolutions are not supported"
            )
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise LoraFactoryError(f"{self.path}: scaling {self.scaling} must be finite and above 0")

    @property
    def rank(self) -> int:
        """The LoRA rank r."""
        return self.shape_a[0]

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of A and B without the rank."""
        return self.shape_a[1:], (self.shape_b[0], *self.shape_b[2:])

    def with_rank(self, rank: int) -> AdaptedModule:
        """This module with another rank and the same scaling."""
        shape_b = (self.shape_b[0], rank, *self.shape_b[2:])
        return replace(self, shape_a=(rank, *self.shape_a[1:]), shape_b=shape_b)


def check_adapter_name(name: object) -> None:
    """Check that PEFT can give an adapter a name: the names of PyTorch modules hold no dot.

    Raises:
        LoraFactoryError: When it cannot.
    """
    if not isinstance(name, str) or not name.strip() or "." in name:
        raise LoraFactoryError(
            f"adapter_name is {name!r}; PEFT takes a name without dots, for example "
            f"{str(name).replace('.', '_').strip() or 'default'!r}"
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise LoraFactoryError(f"adapter_name is {name!r}, which PyTorch uses itself; choose another one")


def find_modules(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[AdaptedModule, ...]:
    """Find the adapted modules of a PEFT state dict, in natural order.

    Args:
        state_dict: what `peft.get_peft_model_state_dict` returns.
        config: JSON form of the LoraConfig that made it.

    Raises:
        LoraFactoryError: for an option or a key that is not plain LoRA, with the reason.
    """
    check_plain_lora(config)
    state_dict, modules = lora_weights(state_dict), []
    pairs = _pair_keys(state_dict)
    scalings = ranks_and_scalings(config, list(pairs))
    for (path, (key_a, key_b)), (_, scaling) in zip(pairs.items(), scalings, strict=True):
        shape_a, shape_b = tuple(state_dict[key_a].shape), tuple(state_dict[key_b].shape)
        modules.append(AdaptedModule(path, key_a, key_b, shape_a, shape_b, scaling))
    return tuple(sorted(modules, key=lambda module: natural_key(module.path)))


def lora_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the base model's embeddings and head, which PEFT saves beside a LoRA on them.

    A LoRA leaves these weights as they are, so that the base model has them already. They are needed where its
    vocabulary was resized; then the adapter's own shapes do not fit another base model either.
    """
    adapted = {key.removesuffix(suffix) for key in state_dict for suffix, _ in _SUFFIXES if key.endswith(suffix)}
    copies = [key for key in state_dict if key.rpartition(".base_layer.")[0] in adapted]
    if copies:
        warnings.warn(
            f"{', '.join(copies)} of the adapter: left out, PEFT saves the base model's own embeddings beside a LoRA "
            "on them; save with save_embedding_layers=False to keep the file small",
            stacklevel=3,
        )
    return {key: tensor for key, tensor in state_dict.items() if key not in copies}


def module_paths(state_dict: Mapping[str, Tensor]) -> list[str]:
    """The adapted modules of a PEFT state dict."""
    return list(_pair_keys(state_dict))


def check_plain_lora(config: Mapping[str, Any]) -> None:
    """Check that a configuration describes LoRA and nothing besides A and B.

    Args:
        config: JSON form of a PEFT LoraConfig.

    Raises:
        LoraFactoryError: for another PEFT method or an option that needs more than A and B, with the reason.
    """
    if config.get("peft_type") != "LORA":
        raise LoraFactoryError(f"peft_type is {config.get('peft_type')!r}, expected 'LORA'; train with LoraConfig")
    for name, reason in _REFUSED_OPTIONS.items():
        if config.get(name):
            raise LoraFactoryError(f"LoraConfig({name}={config[name]!r}) is not supported: {reason}")
    if config.get("bias", "none") != "none":
        raise LoraFactoryError(
            f'LoraConfig(bias={config["bias"]!r}) is not supported: biases are no LoRA weights; train with bias="none"'
        )
    _check_patterns(config)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise LoraFactoryError(
            f"LoraConfig(init_lora_weights={init!r}) is not supported: it changes the base model's own weights; train "
            "with init_lora_weights=True, or convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def check_types(config: Mapping[str, Any]) -> None:
    """Check that PEFT can make a LoraConfig of JSON values, without importing it.

    Raises:
        LoraFactoryError: When an option that an adapter acts by is of another type than PEFT's.
    """
    for name, kinds in _TYPES.items():
        value = config.get(name)
        items = value if isinstance(value, list) else []
        if value is not None and (type(value) not in kinds or any(type(item) not in (str, int) for item in items)):
            raise LoraFactoryError(
                f"LoraConfig({name}={str(value)[:80]!r}) is none of PEFT's; save the adapter or generator again"
            )


def ranks_and_scalings(config: Mapping[str, Any], paths: Sequence[str]) -> list[tuple[int, float]]:
    """Return the rank and the scaling that PEFT gives each of some modules.

    The scaling is lora_alpha / rank, with rsLoRA lora_alpha / sqrt(rank); `rank_pattern` and `alpha_pattern` count.

    Raises:
        LoraFactoryError: if a value is missing or no positive number, or if several patterns contradict each other.
    """
    ranks = _pattern_values(config, "rank_pattern", paths, "r")
    alphas = _pattern_values(config, "alpha_pattern", paths, "lora_alpha")
    found = []
    for path, rank, alpha in zip(paths, ranks, alphas, strict=True):
        if type(rank) is not int or type(alpha) not in (int, float) or not 1 <= rank <= _MAX_RANK:
            raise LoraFactoryError(
                f"{path}: r={rank!r} and lora_alpha={alpha!r} in the LoraConfig must be positive numbers"
            )
        found.append((rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank))
    return found


def plain_json(value: Any) -> Any:  # noqa: ANN401
    """Turn a configuration into JSON values: sets into sorted lists, tuples into lists, enums into their values."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [plain_json(item) for item in value] if isinstance(value, list | tuple) else value


def literal_name(pattern: str) -> tuple[str, bool]:
    """The module that a key of ``rank_pattern`` or ``alpha_pattern`` names, and whether that is its whole path.

    PEFT takes these keys for regular expressions that match the end of a path, after a dot. Here they are names, plain
    or escaped as ``re.escape`` does it, with a ``^`` in front for a whole path; no foreign expression is ever run.

    Raises:
        LoraFactoryError: When it is any other regular expression.
    """
    anchored = pattern.startswith("^")
    inner = pattern.removeprefix("^")
    inner = inner[:-1] if inner.endswith("$") and not inner.endswith(chr(92) + "$") else inner
    name, position = [], 0
    while position < len(inner):
        character = inner[position]
        if character == chr(92) and position + 1 < len(inner) and not inner[position + 1].isalnum():
            position += 1
            character = inner[position]
        elif character in _SPECIAL:
            break
        name.append(character)
        position += 1
    if not name or position < len(inner) or len(name) > _MAX_PATH:
        raise LoraFactoryError(
            f"the pattern {pattern[:100]!r} is a regular expression, which is not run; name the modules instead, as "
            "in 'q_proj' or 'layers.0.self_attn.q_proj'"
        )
    return "".join(name), anchored


def own_patterns(config: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """A user's own configuration with the regular expressions of its patterns replaced by the modules they match.

    Args:
        config: JSON form of a LoraConfig that is in memory, never one that was read from a file.
        paths: The adapted modules.
    """
    changed = dict(config)
    for option in ("rank_pattern", "alpha_pattern"):
        named: dict[str, Any] = {}
        for pattern, value in (config.get(option) or {}).items():
            try:
                literal_name(pattern)
                keys = [pattern]
            except LoraFactoryError:
                keys = [re.escape(path) for path in paths if re.match(rf"(.*\.)?({pattern})$", path)]
            for key in keys:
                if named.setdefault(key, value) != value:
                    raise LoraFactoryError(
                        f"{key} matches several entries of {option}: {config[option]}; "
                        "give patterns that do not overlap"
                    )
        if named or config.get(option):
            changed[option] = named
    return changed


def exact_targets(config: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """A configuration that names the adapted modules one by one where it names them by a regular expression.

    PEFT runs ``target_modules`` and ``exclude_modules`` that are texts, and ``layers_pattern``, as expressions. The
    weights say which modules they stand for.
    """
    runs = any(isinstance(config.get(name), str) for name in ("target_modules", "exclude_modules"))
    return name_targets(config, paths) if runs or config.get("layers_pattern") else dict(config)


def name_targets(config: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """A configuration that names the adapted modules one by one, and leaves none of them out."""
    names = {"target_modules": list(paths), "exclude_modules": None}
    return dict(config) | names | {"layers_to_transform": None, "layers_pattern": None}


def _check_patterns(config: Mapping[str, Any]) -> None:
    """Refuse patterns that are no names."""
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = {} if config.get(option) is None else config[option]
        if not isinstance(patterns, Mapping) or len(patterns) > _MAX_PATTERNS:
            raise LoraFactoryError(f"{option} must map at most {_MAX_PATTERNS:,} modules to numbers")
        for pattern in patterns:
            literal_name(pattern)


def _pair_keys(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Find the LoRA pairs of a state dict: {path: (key of A, key of B)}; any other key is an error with its reason."""
    pairs = {
        key.removeprefix(_PREFIX).removesuffix(suffix_a): (key, key.removesuffix(suffix_a) + suffix_b)
        for key in state_dict
        for suffix_a, suffix_b in _SUFFIXES
        if key.startswith(_PREFIX) and key.endswith(suffix_a)
    }
    if not pairs:
        raise LoraFactoryError("no LoRA weights; pass what peft.get_peft_model_state_dict(model) returns")
    expected = {key for pair in pairs.values() for key in pair}
    for key in sorted(set(state_dict) ^ expected):
        if key in expected or key.endswith(tuple(suffix_b for _, suffix_b in _SUFFIXES)):
            raise LoraFactoryError(f"{key} {'is missing' if key in expected else 'has no A'}; A and B come in pairs")
        reason = next(reason for part, reason in _REFUSED_KEYS if part in key)
        raise LoraFactoryError(f"{key} cannot be part of an adapter here; it is {reason}")
    return pairs


def _pattern_values(config: Mapping[str, Any], patterns: str, paths: Sequence[str], default: str) -> list[Any]:
    """PEFT takes the first pattern that matches, but sorts them when it saves: several must agree."""
    named: dict[str, list[tuple[str, Any]]] = {}  # by a whole path after "^", by the end of one else
    for pattern, value in (config.get(patterns) or {}).items():
        name, anchored = literal_name(pattern)
        named.setdefault(f"^{name}" if anchored else name, []).append((pattern, value))
    values = []
    for path in paths:
        parts = path.split(".") if named else []
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        found = {pattern: value for name in (f"^{path}", *ends) for pattern, value in named.get(name, ())}
        if any(value != next(iter(found.values())) for value in found.values()):
            raise LoraFactoryError(
                f"{path} matches several entries of {patterns}: {found}; PEFT changes their order when it saves a "
                "LoraConfig, so give patterns that do not overlap"
            )
        values.append(next(iter(found.values()), config.get(default)))
    return values
