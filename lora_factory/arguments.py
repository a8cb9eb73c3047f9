"""The options of every stage, one frozen data class per stage, in groups; free of heavy imports for a fast CLI.

Every field carries its ``help`` text and its ``group`` in its metadata. The command line shows the groups in
``--help``; the fields themselves are flat keywords.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lora_factory.errors import LoraFactoryError

TRACKERS = ("tensorboard", "wandb", "trackio")
LORA, OPTIMISER, DATA, RESOURCES, OUTPUT = "LoRA", "optimiser", "data", "resources", "output"
GENERATOR = "generator"

Options = TypeVar("Options")


def _option(default: Any, text: str, *, group: str) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": text, "group": group})


REFINE_STEPS = 60  # at most, on a user's examples
MAX_SIZE, MAX_LAYERS = 1 << 20, 256  # of a generator's network; beyond these a config.json is not believed either


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Settings for turning examples into token sequences.

    Attributes:
        sequence_length: Tokens per sequence at most.
        packing: Whether each sequence is filled with consecutive examples instead of holding one example.
        max_tokens: Tokens used of the examples, from the first on; 0: all.
        chat_template: Whether prompt and completion are put into the tokenizer's chat template.
    """

    sequence_length: int = 128
    packing: bool = True
    max_tokens: int = 0
    chat_template: bool = False


@dataclass(frozen=True, kw_only=True)
class CollectArguments:
    """Settings for fine-tuning one LoRA per task and seed, and for the checkpoints that are kept.

    LoRA: rank, lora_alpha, target_modules.
    Optimiser: steps, epochs, batch_size, gradient_accumulation, learning_rate, seeds.
    Data: sequence_length, packing, max_tokens, chat_template, validation_sequences.
    Resources: dtype, quantization, gradient_checkpointing, parallel, retries.
    Output: snapshots, snapshot_every, state_every, report_to.

    Raises:
        LoraFactoryError: When a value has the wrong type, is out of its range or contradicts another one.
    """

    rank: int = _option(2, "rank r of each LoRA", group=LORA)
    lora_alpha: float = _option(4.0, "LoRA scaling: each update is multiplied by lora_alpha / rank", group=LORA)
    target_modules: str = _option(
        "all-linear", "comma-separated names of the modules that get a LoRA, or all-linear", group=LORA
    )
    steps: int = _option(200, "optimizer steps per run; ignored when epochs is above 0", group=OPTIMISER)
    epochs: int = _option(
        0, "passes over the training split per run; 0: train for steps instead; the paper uses 150", group=OPTIMISER
    )
    batch_size: int = _option(
        8, "sequences per batch; processes that share a run divide the batch among them", group=OPTIMISER
    )
    gradient_accumulation: int = _option(1, "batches per optimizer step", group=OPTIMISER)
    learning_rate: float = _option(
        2e-3, "peak learning rate of AdamW, after a warm-up over a tenth of the steps", group=OPTIMISER
    )
    seeds: tuple[int, ...] = _option((0,), "comma-separated seeds; each task gets one run per seed", group=OPTIMISER)
    sequence_length: int = _option(128, "tokens per sequence at most", group=DATA)
    packing: bool = _option(
        True, "fill each sequence with consecutive examples, instead of padding one example", group=DATA
    )
    max_tokens: int = _option(0, "tokens used of each split of a task, from its start; 0: all", group=DATA)
    chat_template: bool = _option(
        False, "put prompt and completion into the chat template of the tokenizer", group=DATA
    )
    validation_sequences: int = _option(
        32, "sequences of the validation split that score each kept checkpoint", group=DATA
    )
    dtype: str = _option(
        "auto",
        "precision of the base model: float32, bfloat16, float16, or auto, which takes that of its files",
        group=RESOURCES,
    )
    quantization: str = _option(
        "",
        "load the base model in 4bit (NF4, as in QLoRA) or 8bit; needs bitsandbytes (default: no quantization)",
        group=RESOURCES,
    )
    gradient_checkpointing: bool = _option(
        False, "compute activations twice instead of keeping them, which saves memory", group=RESOURCES
    )
    parallel: str = _option(
        "tasks", "what processes share: each trains other runs (tasks), or all train each run (data)", group=RESOURCES
    )
    retries: int = _option(
        1, "further attempts at a run that ran out of memory or that the machine stopped", group=RESOURCES
    )
    snapshots: int = _option(10, "last checkpoints kept per run (K); the paper keeps 50", group=OUTPUT)
    snapshot_every: int = _option(1, "steps between two checkpoints, or epochs when epochs is above 0", group=OUTPUT)
    state_every: int = _option(
        100,
        "steps between two saves of a run's state, from which it continues after a stop; 0: no saves",
        group=OUTPUT,
    )
    report_to: tuple[str, ...] = _option(
        (), "comma-separated trackers: tensorboard, wandb, trackio (default: none)", group=OUTPUT
    )

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _positive(self, "rank", "snapshots", "snapshot_every", "batch_size", "gradient_accumulation")
        _positive(self, "sequence_length", "learning_rate", "lora_alpha", "validation_sequences")
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
        if min(self.state_every, self.retries) < 0:
            raise LoraFactoryError(f"state_every={self.state_every}, retries={self.retries}: none may be below 0")
        _one_of(self, "parallel", "tasks", "data")
        _one_of(self, "quantization", "", "4bit", "8bit")
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            raise LoraFactoryError(f"report_to names {unknown}; choose among {', '.join(TRACKERS)}")

    @property
    def tokens(self) -> TokenOptions:
        """The settings that turn examples into token sequences."""
        return TokenOptions(**{one.name: getattr(self, one.name) for one in fields(TokenOptions)})


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Settings for importing adapters into a zoo.

    LoRA: base_model, base_revision, rank.
    Output: snapshots, run_name.

    Raises:
        LoraFactoryError: When a value has the wrong type or is out of its range.
    """

    base_model: str = _option(
        "",
        "Hub id of the base model of adapters that name a local folder as their base (default: the base model that "
        "the first adapter names)",
        group=LORA,
    )
    base_revision: str = _option(
        "", "commit of the base model on the Hub (default: the first commit that an adapter names)", group=LORA
    )
    rank: int = _option(
        0, "rank of a new zoo; 0: the largest rank of the adapters; smaller ones are padded with zeros", group=LORA
    )
    snapshots: int = _option(
        0, "checkpoint-* folders taken per adapter, the last ones, each as a checkpoint; 0: all", group=OUTPUT
    )
    run_name: str = _option("imported", "name of the runs in the zoo", group=OUTPUT)

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        if min(self.rank, self.snapshots) < 0:
            raise LoraFactoryError(f"rank={self.rank}, snapshots={self.snapshots}: neither may be below 0")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Settings for training a generator on a zoo.

    Generator: decoder, width, depth, conv_depth, text_encoder, image_encoder.
    LoRA: base_rank.
    Optimiser: steps, batch_size, learning_rate, seed, multitask_steps, multitask_learning_rate, base_steps,
    base_tasks, base_mixtures, base_learning_rate, base_bias_learning_rate, base_label_smoothing, specialist_steps,
    specialist_learning_rate.
    Resources: gradient_checkpointing.

    Raises:
        LoraFactoryError: When a value has the wrong type or is out of its range.
    """

    decoder: str = _option("token", "network: token, or conv1d for the paper's 12-layer CNN", group=GENERATOR)
    width: int = _option(384, "hidden size of the token decoder", group=GENERATOR)
    depth: int = _option(2, "residual blocks of the token decoder", group=GENERATOR)
    conv_depth: int = _option(12, "layers of the conv1d network; the paper tries 10 to 20", group=GENERATOR)
    text_encoder: str = _option(
        "sentence-transformers/all-MiniLM-L6-v2",
        "model that reads descriptions: Hub id, folder or open_clip:<model>",
        group=GENERATOR,
    )
    image_encoder: str = _option(
        "",
        "model that reads images, where there are some: Hub id, folder or open_clip:<model> (default: the base model)",
        group=GENERATOR,
    )
    base_rank: int = _option(
        0, "rank of the adapters that stage 2 learns to write; 0: the rank of the zoo", group=LORA
    )
    steps: int = _option(200, "optimizer steps on the zoo's weights (stage 1)", group=OPTIMISER)
    batch_size: int = _option(12, "checkpoints per step", group=OPTIMISER)
    learning_rate: float = _option(
        1.5e-3, "peak learning rate of AdamW, after a warm-up over a twentieth of the steps", group=OPTIMISER
    )
    seed: int = _option(
        0, "seed of the initial weights, of the order of the data and of the latent noise", group=OPTIMISER
    )
    multitask_steps: int = _option(
        0,
        "optimizer steps of one LoRA on all tasks, from which stage 2 starts; 0: it starts from an untrained LoRA",
        group=OPTIMISER,
    )
    multitask_learning_rate: float = _option(5e-3, "peak learning rate of the multi-task LoRA", group=OPTIMISER)
    base_steps: int = _option(
        0,
        "optimizer steps on the tasks' own loss through the frozen base model (stage 2); needs the examples of the "
        "tasks",
        group=OPTIMISER,
    )
    base_tasks: int = _option(4, "tasks per step of base_steps", group=OPTIMISER)
    base_mixtures: float = _option(
        0.2, "share of the adapters of base_steps that serve a mixture of tasks instead of one task", group=OPTIMISER
    )
    base_learning_rate: float = _option(1e-3, "peak learning rate of the network in base_steps", group=OPTIMISER)
    base_bias_learning_rate: float = _option(
        3e-3, "peak learning rate of the adapter for all tasks in base_steps", group=OPTIMISER
    )
    base_label_smoothing: float = _option(
        0.0, "share of each label's probability that base_steps spread over all tokens", group=OPTIMISER
    )
    specialist_steps: int = _option(
        0,
        "optimizer steps per task that continue the multi-task LoRA on this task alone (stage 2), so that the "
        "generator learns the difference; needs the examples of the tasks; 0: no stage 2",
        group=OPTIMISER,
    )
    specialist_learning_rate: float = _option(3e-3, "peak learning rate of the specialists' steps", group=OPTIMISER)
    gradient_checkpointing: bool = _option(
        False,
        "compute the base model's activations twice in stage 2 instead of keeping them, which saves memory",
        group=RESOURCES,
    )

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _check_seeds(self, self.seed)
        _positive(self, "steps", "batch_size", "learning_rate", "width", "depth", "conv_depth")
        _at_most(self, MAX_SIZE, "width")
        _at_most(self, MAX_LAYERS, "depth", "conv_depth")
        _positive(self, "multitask_learning_rate", "specialist_learning_rate")
        _positive(self, "base_tasks", "base_learning_rate", "base_bias_learning_rate")
        _not_negative(self, "multitask_steps", "base_steps", "specialist_steps", "base_mixtures")
        if not 0 <= self.base_label_smoothing < 1:
            raise LoraFactoryError(f"base_label_smoothing={self.base_label_smoothing} must be at least 0 and below 1")
        if self.base_mixtures > 0.7:  # the rest serves single tasks and neighbouring examples
            raise LoraFactoryError(f"base_mixtures={self.base_mixtures} must be 0.7 or less")
        if self.decoder not in ("token", "conv1d"):
            raise LoraFactoryError(f"decoder={self.decoder!r}: choose 'token' or 'conv1d'")


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Settings for comparing methods.

    LoRA: multitask_rank.
    Optimiser: seeds, refine_steps, multitask_learning_rate.
    Data: max_tokens, max_examples, window, examples.

    Raises:
        LoraFactoryError: When a value has the wrong type or is out of its range.
    """

    multitask_rank: int = _option(0, "rank of the multi-task LoRA; 0: the rank of the zoo", group=LORA)
    seeds: tuple[int, ...] = _option(
        (0,),
        "comma-separated seeds of all that samples or trains; every method is scored once per seed",
        group=OPTIMISER,
    )
    refine_steps: int = _option(
        REFINE_STEPS, "optimizer steps at most that refine an adapter on examples; 0: none", group=OPTIMISER
    )
    multitask_learning_rate: float = _option(
        0.0, "peak learning rate of the multi-task LoRA; 0: the learning rate of the zoo", group=OPTIMISER
    )
    max_tokens: int = _option(2000, "tokens scored per task at most", group=DATA)
    max_examples: int = _option(100, "test examples answered per task at most, for tasks with a metric", group=DATA)
    window: int = _option(256, "tokens of context per forward pass", group=DATA)
    examples: int = _option(16, "examples per task that a method gets if it is conditioned on examples", group=DATA)

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _positive(self, "max_tokens", "max_examples", "examples")
        _check_seeds(self, *self.seeds)
        if not self.seeds or self.window < 4:
            raise LoraFactoryError(f"seeds={self.seeds}, window={self.window}: give a seed, and a window of 4 or more")


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Settings for the demo: the whole pipeline on a real model and on text of the running Python environment.

    Data: base_model.
    Resources: fast.
    Output: output_dir.
    """

    base_model: str = _option(
        "", "Hub id or folder of another base model (default: the embedded SmolLM2-135M-Instruct)", group=DATA
    )
    fast: bool = _option(False, "make a two-minute tour with fewer tasks and steps", group=RESOURCES)
    output_dir: str = _option(
        "demo-output", "folder of the zoo, the generator, the adapters and the results", group=OUTPUT
    )

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)


def from_record(options: type[Options], values: Mapping[str, Any]) -> Options:
    """The options that a record of this or an earlier version holds; what is no option any more is left out.

    Args:
        options: One of the data classes above.
        values: Field names and values, for example ``arguments`` of a run's ``run.json``.

    Raises:
        LoraFactoryError: When a value has the wrong type or is out of its range.
    """
    known = {one.name for one in fields(options)}  # type: ignore[arg-type]  # a data class
    return options(**{name: value for name, value in values.items() if name in known})


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
        raise LoraFactoryError(f"{name}={value!r:.100} {expectation(kind)}") from None


def expectation(kind: Any) -> str:  # noqa: ANN401
    """Describe the values of an option's type, as the end of a sentence."""
    return f"must be a list of {_MANY[get_args(kind)[0]]}" if get_origin(kind) is tuple else f"must be {_ONE[kind]}"


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
_ONE = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_MANY = {bool: "true and false", int: "whole numbers", float: "finite numbers", str: "texts"}


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
