"""The options of every stage, one frozen data class each; free of heavy imports, so that the CLI answers at once."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from lora_factory.errors import LoraFactoryError

TRACKERS = ("tensorboard", "wandb", "trackio")


def _option(default: Any, text: str) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": text})


REFINE_STEPS = 60  # at most, on a user's examples
MAX_SIZE, MAX_LAYERS = 1 << 20, 256  # of a generator's network; beyond these a config.json is not believed either


@dataclass(frozen=True, kw_only=True)
class CollectArguments:
    """How one LoRA a task and seed is fine-tuned and which of its snapshots are kept."""

    rank: int = _option(2, "LoRA rank r")
    lora_alpha: float = _option(4.0, "LoRA scaling numerator; weights count lora_alpha / rank")
    target_modules: str = _option("all-linear", "comma-separated module names, or all-linear")
    steps: int = _option(200, "optimizer steps a task; ignored when epochs is given")
    epochs: int = _option(0, "passes over the training split; the paper uses 150")
    snapshots: int = _option(10, "how many of the last snapshots are kept (K); the paper keeps 50")
    snapshot_every: int = _option(1, "steps between snapshots; with epochs, epochs between snapshots")
    seeds: tuple[int, ...] = _option((0,), "one run a task for each of these seeds")
    batch_size: int = _option(8, "sequences a step, of all processes together where they share a run")
    gradient_accumulation: int = _option(1, "batches accumulated before a step")
    sequence_length: int = _option(128, "tokens a sequence")
    packing: bool = _option(True, "fill sequences with consecutive text instead of padding one example each")
    max_tokens: int = _option(0, "tokens of each split of a task that are used, the first ones; 0: all")
    chat_template: bool = _option(False, "put prompt and completion into the tokenizer's chat template")
    learning_rate: float = _option(2e-3, "peak learning rate of AdamW")
    warmup_ratio: float = _option(0.1, "share of the steps with a rising learning rate, before the cosine")
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    validation_sequences: int = _option(32, "sequences scored at every kept snapshot")
    dtype: str = _option("auto", "the base model's precision: auto, float32, bfloat16 or float16")
    quantization: str = _option("", "load the base model in 4bit (NF4, as in QLoRA) or 8bit; needs bitsandbytes")
    parallel: str = _option("tasks", "processes take a run each (tasks), or train every run together (data)")
    state_every: int = _option(100, "steps between saves of a run's state, from which it continues; 0: no saves")
    retries: int = _option(1, "how often a run that ran out of memory, or that the machine stopped, is tried again")
    gradient_checkpointing: bool = _option(False, "compute activations twice instead of keeping them")
    compile: bool = _option(False, "compile the model with torch.compile")
    report_to: tuple[str, ...] = _option((), "comma-separated trackers: tensorboard, wandb, trackio")

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _positive(self, "rank", "snapshots", "snapshot_every", "batch_size", "gradient_accumulation")
        _positive(self, "sequence_length", "learning_rate", "lora_alpha", "max_grad_norm", "validation_sequences")
        if not self.seeds:
            raise LoraFactoryError("seeds is empty; give at least one, for example seeds=(0,)")
        _check_seeds(self, *self.seeds)
        if self.max_tokens < 0:
            raise LoraFactoryError(f"max_tokens={self.max_tokens} may not be below 0; 0 means all")
        if self.epochs < 0 or (self.epochs == 0 and self.steps < 1):
            raise LoraFactoryError(f"steps={self.steps}, epochs={self.epochs}: one of them must be at least 1")
        unit, available = ("epochs", self.epochs) if self.epochs else ("steps", self.steps)
        if self.snapshots * self.snapshot_every > available:
            raise LoraFactoryError(
                f"snapshots={self.snapshots}, one in {self.snapshot_every} {unit}, do not fit into {unit}={available}"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise LoraFactoryError(f"warmup_ratio={self.warmup_ratio} must be at least 0 and below 1")
        if min(self.state_every, self.retries) < 0:
            raise LoraFactoryError(f"state_every={self.state_every}, retries={self.retries}: none may be below 0")
        _one_of(self, "parallel", "tasks", "data")
        _one_of(self, "quantization", "", "4bit", "8bit")
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            raise LoraFactoryError(f"report_to names {unknown}; choose among {', '.join(TRACKERS)}")


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Which adapters a zoo takes in, and in which form."""

    base_model: str = _option(
        "", "Hub id of the base model; taken as the base of adapters that name a local folder (default: the first's)"
    )
    base_revision: str = _option("", "commit of the base model (default: the first that an adapter names)")
    rank: int = _option(0, "rank of a new zoo; 0: the largest of the adapters; smaller ones are padded with zeros")
    canonical: bool = _option(
        False, "rewrite all adapters in canonical form, even if they share ranks and scaling and fit as they are"
    )
    snapshots: int = _option(0, "how many of the last checkpoint-* folders of an adapter are taken; 0: all")
    run_name: str = _option("imported", "name of the runs")

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        if min(self.rank, self.snapshots) < 0:
            raise LoraFactoryError(f"rank={self.rank}, snapshots={self.snapshots}: neither may be below 0")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """How the generator is trained on a zoo."""

    decoder: str = _option("token", "token (default) or conv1d (the paper's 12-layer CNN)")
    steps: int = _option(200, "optimizer steps")
    batch_size: int = _option(12, "snapshots a step")
    learning_rate: float = _option(1.5e-3, "peak learning rate of AdamW")
    warmup_ratio: float = _option(0.05, "share of the steps with a rising learning rate, before the cosine")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    seed: int = _option(0, "seed of the weights, of the order of the data and of the latent noise")
    text_encoder: str = _option("sentence-transformers/all-MiniLM-L6-v2", "Hub id or folder, or open_clip:<model>")
    image_encoder: str = _option(
        "", "with images: Hub id or folder of an image model, or open_clip:<model> (default: the base model)"
    )
    width: int = _option(384, "hidden size of the token decoder")
    depth: int = _option(2, "residual blocks of the token decoder")
    conv_depth: int = _option(12, "layers of the conv1d network; the paper tries 10 to 20")
    base_steps: int = _option(0, "steps through the frozen base model (stage 2); needs the tasks' examples")
    multitask_steps: int = _option(
        0, "steps of a multi-task LoRA that stage 2's bias adapter starts from; 0: the LoRA initialisation"
    )
    multitask_learning_rate: float = _option(5e-3, "peak learning rate of this multi-task LoRA")
    specialist_steps: int = _option(
        0, "steps that stage 2 ends with for every task alone, for the network to write what each has of its own"
    )
    specialist_learning_rate: float = _option(3e-3, "peak learning rate of these steps")
    base_rank: int = _option(0, "rank of the adapters that stage 2 learns to write; 0: that of the zoo")
    base_tasks: int = _option(4, "tasks a step of stage 2")
    base_sequences: int = _option(2, "query sequences a task and step of stage 2")
    base_mixtures: float = _option(0.2, "share of stage 2's adapters that serve a mixture of tasks, not one")
    base_stretches: float = _option(
        0.3, "share that serve a stretch of one task's examples, from two neighbours to all"
    )
    base_learning_rate: float = _option(1e-3, "peak learning rate of stage 2")
    base_bias_learning_rate: float = _option(3e-3, "peak learning rate of the bias adapter in stage 2")
    base_checkpointing: bool = _option(False, "stage 2 computes activations twice, not keeping them")
    base_noise: float = _option(0.05, "noise on text vectors in stage 2, as a share of a vector's length")
    base_label_smoothing: float = _option(0.0, "share of a label's probability that stage 2 spreads over all tokens")
    base_l2: float = _option(0.0, "penalty on the mean square of the generated residual in standard units in stage 2")

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _check_seeds(self, self.seed)
        _positive(self, "steps", "batch_size", "learning_rate", "max_grad_norm", "width", "depth", "conv_depth")
        _at_most(self, MAX_SIZE, "width")
        _at_most(self, MAX_LAYERS, "depth", "conv_depth")
        _positive(self, "base_tasks", "base_sequences", "base_learning_rate", "base_bias_learning_rate")
        _positive(self, "multitask_learning_rate", "specialist_learning_rate")
        _not_negative(self, "multitask_steps", "base_steps", "specialist_steps", "base_noise", "base_l2")
        if not 0 <= self.base_label_smoothing < 1:
            raise LoraFactoryError(f"base_label_smoothing={self.base_label_smoothing} must be at least 0 and below 1")
        if min(self.base_mixtures, self.base_stretches) < 0 or self.base_mixtures + self.base_stretches > 1:
            raise LoraFactoryError(
                f"base_mixtures={self.base_mixtures}, base_stretches={self.base_stretches}: two shares of one whole"
            )
        if self.decoder not in ("token", "conv1d"):
            raise LoraFactoryError(f"decoder={self.decoder!r}: choose 'token' or 'conv1d'")


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """How methods are compared."""

    seeds: tuple[int, ...] = _option((0,), "seeds of everything that samples or trains")
    max_tokens: int = _option(2000, "tokens scored a task")
    max_examples: int = _option(100, "test examples answered a task, where a task has a metric")
    window: int = _option(256, "tokens of context a forward pass")
    examples: int = _option(16, "examples a condition is made of, where a method is conditioned on examples")
    refine_steps: int = _option(REFINE_STEPS, "steps at most on the examples of the methods that are refined on them")
    multitask_rank: int = _option(0, "rank of the multi-task LoRA; 0: that of the zoo")
    multitask_learning_rate: float = _option(0.0, "learning rate of the multi-task LoRA; 0: that of the zoo")

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _positive(self, "max_tokens", "max_examples", "examples")
        _check_seeds(self, *self.seeds)
        if not self.seeds or self.window < 4:
            raise LoraFactoryError(f"seeds={self.seeds}, window={self.window}: give a seed, and a window of 4 or more")


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """The whole pipeline on an embedded real model and on text found in the running Python environment."""

    output_dir: str = _option("demo-output", "folder for zoo, generator, adapters and results")
    base_model: str = _option("", "Hub id or folder of another base model (default: SmolLM2-135M-Instruct)")
    fast: bool = _option(False, "a two-minute tour: fewer tasks and steps")

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)


def converted(name: str, kind: Any, value: Any) -> Any:  # noqa: ANN401
    """A value as an option of this type keeps it, whoever wrote it: the command line, a file or a Python program.

    Numbers of other libraries and numbers written as text become Python's; one value counts as a list of one; lists,
    sets and text with commas become tuples, and comma-separated text where an option is text.

    Args:
        name: The option's, for the error.
        kind: ``bool``, ``int``, ``float``, ``str`` or a tuple of one of them.
        value: Anything.

    Raises:
        LoraFactoryError: When the value has no meaning of this type.
    """
    try:
        if get_origin(kind) is tuple:
            return tuple(converted(name, get_args(kind)[0], part) for part in _parts(value))
        return _SCALARS[kind](value)
    except LoraFactoryError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError):
        raise LoraFactoryError(f"{name}={value!r:.100} {_EXPECTED[get_origin(kind) or kind]}") from None


def _convert(arguments: Any) -> None:  # noqa: ANN401
    """Give every field a value of its type."""
    kinds = get_type_hints(type(arguments))
    for one in fields(arguments):
        object.__setattr__(arguments, one.name, converted(one.name, kinds[one.name], getattr(arguments, one.name)))


def _parts(value: Any) -> Iterable[Any]:  # noqa: ANN401
    """The values of a list, as people write one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if value is None or isinstance(value, Mapping | bytes):
        raise TypeError
    if isinstance(value, Set):
        return sorted(value)
    listed = value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors
    return listed if isinstance(listed, Iterable) else [listed]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A number of numpy or torch as Python has it."""
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value


def _bool(value: Any) -> bool:  # noqa: ANN401
    value = _plain(value)
    if not isinstance(value, bool):
        raise TypeError
    return value


def _int(value: Any) -> int:  # noqa: ANN401
    value = _plain(value)
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) else operator.index(value)


def _float(value: Any) -> float:  # noqa: ANN401
    value = _plain(value)
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise TypeError
    return number


def _str(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if not isinstance(value, list | tuple | Set):
        raise TypeError
    if not all(isinstance(part, str) for part in value):
        raise TypeError
    return ",".join(sorted(value) if isinstance(value, Set) else value)


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}
_EXPECTED = {
    bool: "must be True or False",
    int: "must be a whole number",
    float: "must be a finite number",
    str: "must be text",
    tuple: "must be a value, or a list of values, of the right type",
}


def _positive(arguments: object, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if not value > 0:
            raise LoraFactoryError(f"{name}={value} must be above 0")


def _not_negative(arguments: object, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value < 0:
            raise LoraFactoryError(f"{name}={value} must not be below 0")


def _at_most(arguments: object, most: int, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) > most:
            raise LoraFactoryError(f"{name}={value} must be {most:,} or less")


def _check_seeds(arguments: object, *seeds: int) -> None:
    name = "seeds" if hasattr(arguments, "seeds") else "seed"
    if large := [seed for seed in seeds if not -(2**63) <= seed < 2**63]:
        raise LoraFactoryError(f"{name} holds {large[0]}; a seed has 64 bits, so give a smaller number")


def _one_of(arguments: object, name: str, *values: str) -> None:
    value = getattr(arguments, name)
    if value not in values:
        raise LoraFactoryError(f"{name}={value!r}: choose one of {', '.join(map(repr, values))}")
