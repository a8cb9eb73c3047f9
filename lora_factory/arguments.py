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
GROUPS = ("generator", "LoRA", "optimiser", "data", "resources", "network", "output")  # as --help shows them
GENERATOR, LORA, OPTIMISER, DATA, RESOURCES, NETWORK, OUTPUT = GROUPS

Options = TypeVar("Options")


def _option(default: Any, text: str, *, group: str) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": text, "group": group})


REFINE_STEPS = 60  # at most, on a user's examples
DEFAULT_RANK, DEFAULT_BASE_STEPS = 16, 2250  # of a generator that is trained without a zoo
MAX_DEFAULT_RANK = (
    32  # of a basis that is to hold a zoo; it misses 1.5 % of 192 LoRAs of rank 2 (benchmarks/digits.py)
)
APP_PORT = 7860  # of the app, as Gradio has it
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
class LoRAOptions:
    """What `CollectArguments` and `TrainArguments` share: a LoRA on the base model, and how examples are read.

    Raises:
        LoraFactoryError: When a value has the wrong type, is out of its range or contradicts another one.
    """

    rank: int = _option(2, "rank r of each LoRA", group=LORA)
    lora_alpha: float = _option(4.0, "LoRA scaling: each update is multiplied by lora_alpha / rank", group=LORA)
    target_modules: str = _option(
        "all-linear", "comma-separated names of the modules that get a LoRA, or all-linear", group=LORA
    )
    sequence_length: int = _option(128, "tokens per sequence at most", group=DATA)
    packing: bool = _option(
        True, "fill each sequence with consecutive examples, instead of padding one example", group=DATA
    )
    max_tokens: int = _option(0, "tokens used of each split of a task, from its start; 0: all", group=DATA)
    chat_template: bool = _option(
        False, "put prompt and completion into the chat template of the tokenizer", group=DATA
    )
    validation_sequences: int = _option(
        32, "sequences of each task's validation split that score what was trained", group=DATA
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

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _positive(self, "sequence_length", "lora_alpha", "validation_sequences")
        if self.max_tokens < 0:
            raise LoraFactoryError(f"max_tokens={self.max_tokens} may not be below 0; 0 means all")
        _one_of(self, "quantization", "", "4bit", "8bit")

    @property
    def tokens(self) -> TokenOptions:
        """The settings that turn examples into token sequences."""
        return TokenOptions(**{one.name: getattr(self, one.name) for one in fields(TokenOptions)})


# What a zoo decides for a generator that is trained on it.
DECIDED_BY_ZOO = tuple(one.name for one in fields(LoRAOptions) if one.name not in ("rank", "gradient_checkpointing"))


@dataclass(frozen=True, kw_only=True)
class CollectArguments(LoRAOptions):
    """Settings for fine-tuning one LoRA per task and seed, and for the checkpoints that are kept.

    LoRA: rank, lora_alpha, target_modules.
    Optimiser: steps, epochs, batch_size, gradient_accumulation, learning_rate, seeds.
    Data: sequence_length, packing, max_tokens, chat_template, validation_sequences.
    Resources: dtype, quantization, gradient_checkpointing, parallel, retries.
    Output: snapshots, snapshot_every, state_every, report_to.

    Raises:
        LoraFactoryError: When a value has the wrong type, is out of its range or contradicts another one.
    """

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
        super().__post_init__()
        _positive(self, "rank", "snapshots", "snapshot_every", "batch_size", "gradient_accumulation", "learning_rate")
        if not self.seeds:
            raise LoraFactoryError("seeds is empty; give at least one, for example seeds=(0,)")
        _check_seeds(self, *self.seeds)
        if self.epochs < 0 or (self.epochs == 0 and self.steps < 1):
            raise LoraFactoryError(f"steps={self.steps}, epochs={self.epochs}: one of them must be at least 1")
        unit, available = ("epochs", self.epochs) if self.epochs else ("steps", self.steps)
        if self.snapshots * self.snapshot_every > available:
            raise LoraFactoryError(
                f"snapshots={self.snapshots}, one in {self.snapshot_every} {unit}, do not fit into {unit}={available}"
            )
        _not_negative(self, "state_every", "retries")
        _one_of(self, "parallel", "tasks", "data")
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            raise LoraFactoryError(f"report_to names {unknown}; choose among {', '.join(TRACKERS)}")


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
        _not_negative(self, "rank", "snapshots")


@dataclass(frozen=True, kw_only=True)
class TrainArguments(LoRAOptions):
    """Settings for training a generator: on a zoo's weights, on the tasks' examples, or on both.

    With a zoo, its runs say how the LoRA is scaled, which modules it adapts and how examples are read; what is
    documented as "without a zoo" may not be given then.

    Generator: decoder, core, latent_size, width, depth, conv_depth, text_encoder, image_encoder.
    LoRA: rank; without a zoo: lora_alpha, target_modules.
    Optimiser: steps, batch_size, learning_rate, seed, multitask_steps, base_steps, base_tasks, base_learning_rate,
    basis_learning_rate.
    Data, without a zoo: sequence_length, packing, max_tokens, chat_template, validation_sequences.
    Resources: gradient_checkpointing; without a zoo: dtype, quantization.

    Raises:
        LoraFactoryError: When a value has the wrong type or is out of its range.
    """

    decoder: str = _option(
        "core", "network: core (a shared basis and generated cores), or conv1d, the paper's CNN", group=GENERATOR
    )
    core: str = _option("full", "cores of the shared basis: full R x R matrices, or diagonal ones", group=GENERATOR)
    latent_size: int = _option(128, "length of the code that a condition becomes, at most", group=GENERATOR)
    width: int = _option(256, "hidden size of the network that reads conditions", group=GENERATOR)
    depth: int = _option(1, "hidden layers of the network that reads conditions", group=GENERATOR)
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
    rank: int = _option(
        0,
        f"rank R of the shared basis; 0: the rank that holds all of a zoo, {MAX_DEFAULT_RANK} at most; "
        f"{DEFAULT_RANK} without a zoo",
        group=LORA,
    )
    lora_alpha: float = _option(
        float(DEFAULT_RANK), "without a zoo: each update is multiplied by lora_alpha / rank", group=LORA
    )
    # After 1000 steps cores for the demo's tasks are up to 0.05 of their size off, after 3000 (9 s) up to 0.02; 32
    # sets of benchmarks/digits.py that are kept from 192 others gain 0.003 from texts and 0.002 from images.
    steps: int = _option(3000, "optimizer steps on the zoo's weights", group=OPTIMISER)
    batch_size: int = _option(
        12, "checkpoints per step (conv1d; a step on cores takes one of every task)", group=OPTIMISER
    )
    learning_rate: float = _option(
        0.0,
        "peak learning rate of AdamW, after a warm-up over a twentieth of the steps; 0: 5e-3, and 1.5e-3 for conv1d",
        group=OPTIMISER,
    )
    seed: int = _option(
        0, "seed of the initial weights, of the order of the data and of the latent noise", group=OPTIMISER
    )
    base_steps: int = _option(
        0,
        "optimizer steps on the tasks' own loss through the frozen base model; need the examples of the tasks; 0: "
        f"none with a zoo, {DEFAULT_BASE_STEPS} without one",
        group=OPTIMISER,
    )
    multitask_steps: int = _option(
        0,
        "the first of base_steps, in which basis and center are trained as one LoRA for all tasks; 0: none with a "
        "zoo, a third without one",
        group=OPTIMISER,
    )
    base_tasks: int = _option(8, "tasks per step of base_steps", group=OPTIMISER)
    base_learning_rate: float = _option(1e-3, "peak learning rate of the network in base_steps", group=OPTIMISER)
    basis_learning_rate: float = _option(
        3e-3, "peak learning rate of the factors that all adapters share, in base_steps", group=OPTIMISER
    )

    def __post_init__(self) -> None:
        """Check every value at birth."""
        super().__post_init__()
        _check_seeds(self, self.seed)
        _positive(self, "steps", "batch_size", "latent_size", "width", "depth", "conv_depth")
        _at_most(self, MAX_SIZE, "width", "latent_size")
        _at_most(self, MAX_LAYERS, "depth", "conv_depth")
        _positive(self, "base_tasks", "base_learning_rate", "basis_learning_rate")
        _not_negative(self, "rank", "learning_rate", "multitask_steps", "base_steps")
        if 0 < self.base_steps < self.multitask_steps:
            raise LoraFactoryError(
                f"multitask_steps={self.multitask_steps} are the first of base_steps={self.base_steps}; give as many "
                "or fewer"
            )
        _one_of(self, "decoder", "core", "conv1d")
        _one_of(self, "core", "full", "diagonal")


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
    fast: bool = _option(False, "make a tour of a few minutes, with fewer tasks and steps", group=RESOURCES)
    output_dir: str = _option(
        "demo-output", "folder of the zoo, the generator, the adapters and the results", group=OUTPUT
    )

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Settings of the HTTP server.

    Data: base_model.
    Resources: adapters, batch_size, queue, max_new_tokens, timeout.
    Network: host, port.

    Raises:
        LoraFactoryError: When a value has the wrong type or is out of its range.
    """

    base_model: str = _option("", "Hub id or folder of the base model (default: the generator's own)", group=DATA)
    adapters: int = _option(16, "adapters kept in the model; the one unused for longest makes room", group=RESOURCES)
    batch_size: int = _option(16, "requests answered together at most, whatever their adapters", group=RESOURCES)
    queue: int = _option(128, "requests that may wait; the next one is refused with status 429", group=RESOURCES)
    max_new_tokens: int = _option(512, "tokens of an answer at most", group=RESOURCES)
    timeout: float = _option(120.0, "seconds that a request may take, waiting included", group=RESOURCES)
    host: str = _option(
        "127.0.0.1", "address to listen on; other than loopback needs LORA_FACTORY_TOKEN set", group=NETWORK
    )
    port: int = _option(8000, "TCP port", group=NETWORK)

    def __post_init__(self) -> None:
        """Check every value at birth."""
        _convert(self)
        _positive(self, "adapters", "batch_size", "queue", "max_new_tokens", "timeout", "port")
        _at_most(self, 65535, "port")


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
            raise LoraFactoryError(f"{name}={value} may not be below 0")


def _at_most(arguments: object, most: int, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) > most:
            raise LoraFactoryError(f"{name}={value} must be {most:,} or less")


def _check_seeds(arguments: object, *seeds: int) -> None:
    name = "seeds" if hasattr(arguments, "seeds") else "seed"
    if large := [seed for seed in seeds if not -(2**63) <= seed < 2**63]:
        raise LoraFactoryError(f"{name} holds {large[0]}; a seed has 64 bits, so give a smaller number")
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise LoraFactoryError(f"{name}={seeds} holds {twice[0]} more than once; give every seed once")


def _one_of(arguments: object, name: str, *values: str) -> None:
    value = getattr(arguments, name)
    if value not in values:
        raise LoraFactoryError(f"{name}={value!r}: choose one of {', '.join(map(repr, values))}")
