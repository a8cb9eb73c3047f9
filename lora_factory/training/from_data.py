"""Stage 2: train a generator on the tasks' own loss, back-propagated through the frozen base model.

Every step draws several tasks. Each gets a condition from a random support set of its examples and/or one of its
descriptions, and its loss is measured on other examples of the task, the query set: the generator learns to make
adapters that work, from a few examples or a sentence, instead of adapters that look like those of the zoo.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from tqdm.auto import tqdm

from lora_factory.arguments import TrainArguments
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import TokenCVAE
from lora_factory.generator.task_vectors import random_subset
from lora_factory.models.inputs import CausalInputs, TokenSequence, encode_example
from lora_factory.models.losses import query_loss
from lora_factory.tasks.task import Task
from lora_factory.utils.checkpoint import TrainingCheckpoint, TrainingState

VALIDATIONS = 10  # how often a training is scored, the end included
FINAL_RATE = 0.05  # learning rate at the end, as a share of its peak
MAX_GRAD_NORM = 1.0
SEQUENCES = 2  # query sequences per task and step
STRETCHES = 0.3  # share of the adapters that serve some neighbouring examples of one task, not all of them
NOISE = 0.05  # on text vectors, as a share of a vector's length
UNCONDITIONED = 0.1  # share of the steps without any condition: what is left is the best adapter for all tasks


@dataclass(frozen=True)
class Half:
    """Every other training example of a task, in their order.

    Attributes:
        hidden: Vectors of the first examples, shape ``(examples, width)``.
        sequences: Training sequences of all examples.
        owners: For every sequence the index of the example that it begins in; rising.
    """

    hidden: torch.Tensor
    sequences: list[TokenSequence]
    owners: list[int]

    def window(self, start: int, end: int) -> range:
        """Indices of the sequences of the examples from ``start`` to before ``end``."""
        return range(bisect_left(self.owners, start), bisect_left(self.owners, end))


@dataclass(frozen=True)
class TaskData:
    """Data of one task for stage 2, in two halves without a common example: one is the support set, one the query set.

    Attributes:
        texts: Vectors of the descriptions, shape ``(descriptions, width)``.
        halves: Even and odd training examples.
        validation: Sequences of the validation split.
    """

    texts: torch.Tensor
    halves: tuple[Half, Half]
    validation: list[TokenSequence]

    @classmethod
    def read(cls, task: Task, trainer: LoRATrainer, texts: torch.Tensor, hidden: torch.Tensor) -> TaskData:
        """Split a task's training examples in two; ``hidden`` belongs to the first of them, shape ``(n, width)``.

        Raises:
            LoraFactoryError: When the task has fewer than two training examples.
        """
        examples = task.examples("train")
        if len(examples) < 2:
            raise LoraFactoryError(
                f"task {task.name!r} has {len(examples)} training example; stage 2 needs two or more"
            )
        halves = []
        for part in (0, 1):
            kept = examples[part::2]
            sequences = trainer.encode(kept)
            halves.append(Half(hidden[part::2], sequences, _owners(trainer, kept, sequences)))
        return cls(texts, (halves[0], halves[1]), trainer.validation(task))


@torch.no_grad()
def start_from(generator: CVAELoRAGenerator, bias: torch.Tensor) -> None:
    """Let the bias adapter be one that the tasks' loss can lead on from, and the network add nothing to it.

    That measured better than what imitating the zoo's weights leads to.

    Args:
        generator: A new generator with its statistics fitted.
        bias: The LoRA initialisation that all runs share, or one LoRA trained on all tasks, shape ``(D,)``.
    """
    generator.bias.copy_(bias)
    for parameter in head_parameters(generator):
        parameter.zero_()


def head_parameters(generator: CVAELoRAGenerator) -> list[torch.Tensor]:
    """The last layer's parameters and the stored adapters: scaling them scales what is added to the bias adapter."""
    network = generator.network
    last = network.outputs if isinstance(network, TokenCVAE) else network.decoder[-1]
    recalled = [generator.get_buffer("known_adapters")] if generator.config.recall is not None else []
    return [*last.parameters(), *recalled]


def train_through_base(
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
    data: Mapping[str, TaskData],
    arguments: TrainArguments,
    held_out: Mapping[str, TaskData] | None = None,
    checkpoint: TrainingCheckpoint | None = None,
) -> list[dict[str, float]]:
    """Train the generator and its bias adapter; afterwards it has the weights that validated best, the first ones too.

    With several processes, each draws episodes of its own and the gradients are averaged.

    Args:
        generator: Statistics fitted; its bias adapter is where the training starts.
        trainer: The frozen base model, with the settings that the zoo was collected with.
        data: The zoo's tasks.
        arguments: ``base_steps`` and what else starts with ``base_``.
        held_out: Tasks to validate on; by default the validation splits of ``data``.
        checkpoint: Where the state is kept now and then; a training that was cut off goes on from there, with the
            result that it would have had.

    Returns:
        One record per validation: step, training loss and validation loss in nats per token, tokens read so far.

    Raises:
        LoraFactoryError: When a loss is not finite.
    """
    accelerator, total = trainer.accelerator, arguments.base_steps
    generator.to(accelerator.device).train()
    for tensor in generator.state_dict().values():  # features of other batches differ in their last digits
        tensor.copy_(broadcast(tensor.clone()))
    generator.bias.requires_grad_(True)
    network = [parameter for name, parameter in generator.named_parameters() if name != "bias"]
    groups: list[dict[str, Any]] = [{"params": [generator.bias], "weight_decay": 0.0}, {"params": network}]
    peaks = (arguments.base_bias_learning_rate, arguments.base_learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    source = torch.Generator().manual_seed(arguments.seed + accelerator.process_index)
    state = TrainingState()
    if checkpoint is not None:
        state = checkpoint.restore(generator, optimizer, source, accelerator) or state
    due = {math.ceil(total * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)}
    hidden = not accelerator.is_local_main_process
    bar = tqdm(total=total, initial=state.step, desc="train through the base", disable=hidden)
    with trainer.slot.disabled():
        if state.step == 0:  # a multi-task LoRA to start from may be better than what follows
            state.keep_best(validate(generator, trainer, held_out or data), generator)
        while state.step < total:
            state.step += 1
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _rate(state.step - 1, total)
            with ExitStack() as until:
                loss, read = _episode_loss(generator, trainer, data, arguments, source, until)
                if not torch.isfinite(loss):
                    raise LoraFactoryError(
                        f"the loss through the base is {loss.item()} at step {state.step}; lower base_learning_rate "
                        f"(now {arguments.base_learning_rate})"
                    )
                accelerator.backward(loss)
            _average_gradients(accelerator, [generator.bias, *network])
            accelerator.clip_grad_norm_([generator.bias, *network], MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            state.count(loss.item(), read * accelerator.num_processes)
            bar.update()
            if state.step in due:
                validation = validate(generator, trainer, held_out or data)
                state.record(validation, generator)
                bar.set_postfix(loss=f"{state.running:.3f}", validation=f"{validation:.3f}")
            if checkpoint is not None:
                checkpoint.save_now_and_then(state, generator, optimizer, source, accelerator)
    bar.close()
    generator.bias.requires_grad_(False)
    if state.best_weights is not None:
        generator.load_state_dict(state.best_weights)
    return state.history


@torch.no_grad()
def validate(generator: CVAELoRAGenerator, trainer: LoRATrainer, data: Mapping[str, TaskData]) -> float:
    """Mean validation loss over the tasks and over each single modality, in nats per token."""
    training = generator.training
    generator.eval()
    trainer.model.eval()
    losses = []
    for task in data.values():
        conditions = [{"text": task.texts[:1]}] if "text" in generator.config.modalities else []
        conditions += [{"hidden": task.halves[0].hidden[:16].mean(0, keepdim=True)}]
        for condition in conditions:
            vector = generator.generate_vector({name: rows.to(generator.device) for name, rows in condition.items()})
            losses.append(float(query_loss(trainer, vector, [task.validation])))
    generator.train(training)
    return sum(losses) / len(losses)


def _episode_loss(
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
    data: Mapping[str, TaskData],
    arguments: TrainArguments,
    source: torch.Generator,
    until: ExitStack,
) -> tuple[torch.Tensor, int]:
    """The loss of one step and its tokens: mixtures of tasks, a condition from one half, queries from the other."""
    if trainer.arguments.gradient_checkpointing:  # transformers does it in training mode only
        trainer.train_mode()
    mixtures = [_mixture(list(data.values()), arguments, source) for _ in range(arguments.base_tasks)]
    conditions = _conditions(generator, mixtures, arguments, source)
    queries = []
    for mixture in mixtures:
        drawn = torch.multinomial(mixture.shares, SEQUENCES, replacement=True, generator=source)
        queries.append([mixture.query(index, source) for index in drawn.tolist()])
    standard = generator.standard_vector(conditions, len(mixtures))
    adapters = generator.bias + standard * generator.weight_scale
    tokens = sum(len(sequence.tokens) for rows in queries for sequence in rows)
    loss = query_loss(trainer, adapters, queries, label_smoothing=arguments.base_label_smoothing, until=until)
    return loss, tokens


@dataclass(frozen=True)
class _Mixture:
    """The purpose of one adapter of a step: a task, neighbouring examples of a task, or several tasks with shares."""

    tasks: list[TaskData]
    shares: torch.Tensor
    half: int
    window: tuple[float, float]  # from where to where in a half's examples, as shares of their number

    def support(self, index: int, source: torch.Generator) -> torch.Tensor:
        """Mean over up to 32 random examples of the stretch in the supporting half (Eq. 1)."""
        rows = self.tasks[index].halves[self.half].hidden
        start, end = self._stretch(len(rows))
        rows = rows[start:end]
        count = min(len(rows), int(torch.randint(4, 33, (), generator=source)))
        return rows[torch.randperm(len(rows), generator=source)[:count]].mean(0)

    def query(self, index: int, source: torch.Generator) -> TokenSequence:
        """A training sequence of the stretch in the other half; of the whole half where the stretch has none."""
        support, half = self.tasks[index].halves[self.half], self.tasks[index].halves[1 - self.half]
        inside = half.window(*self._stretch(len(support.hidden)))
        inside = inside or range(len(half.sequences))
        return half.sequences[inside[_index(inside, source)]]

    def _stretch(self, examples: int) -> tuple[int, int]:
        start = min(int(self.window[0] * examples), examples - 1)
        return start, max(start + 1, round(self.window[1] * examples))


def _mixture(tasks: Sequence[TaskData], arguments: TrainArguments, source: torch.Generator) -> _Mixture:
    """A single task, a stretch of its examples, or a mixture of up to four tasks in random shares.

    What lies between the tasks, and how the examples within one differ, is to be learned too: there are few tasks, and
    the unseen ones are somewhere else.
    """
    kind = float(torch.rand((), generator=source))
    mixed, local = kind < arguments.base_mixtures, kind > 1 - STRETCHES
    count = min(len(tasks), int(torch.randint(2, 5, (), generator=source)) if mixed else 1)
    order = torch.randperm(len(tasks), generator=source)[:count].tolist()
    shares = -torch.rand(count, generator=source).clamp_min(1e-6).log()  # uniform over the simplex
    window = (0.0, 1.0)
    if local:
        length = 0.01 ** float(torch.rand((), generator=source))  # from a hundredth of the examples to all
        start = (1 - length) * float(torch.rand((), generator=source))
        window = (start, start + length)
    return _Mixture([tasks[index] for index in order], shares / shares.sum(), _index("01", source), window)


def _conditions(
    generator: CVAELoRAGenerator,
    mixtures: Sequence[_Mixture],
    arguments: TrainArguments,
    source: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Task vectors of a random subset of the modalities, sometimes of none; noise on those of texts."""
    if torch.rand((), generator=source) < UNCONDITIONED:
        return {}
    conditions = {}
    for name in random_subset(list(generator.config.modalities), source):
        vectors = torch.stack([_task_vector(name, mixture, source) for mixture in mixtures])
        if name == "text":
            noise = NOISE * generator.standardiser.length(name)
            vectors = vectors + noise * torch.randn(vectors.shape, generator=source)
        conditions[name] = vectors.to(generator.device)
    return conditions


def _task_vector(name: str, mixture: _Mixture, source: torch.Generator) -> torch.Tensor:
    rows = [
        task.texts[_index(task.texts, source)] if name == "text" else mixture.support(index, source)
        for index, task in enumerate(mixture.tasks)
    ]
    return mixture.shares @ torch.stack(rows)


def _owners(trainer: LoRATrainer, examples: Sequence[Any], sequences: Sequence[TokenSequence]) -> list[int]:
    """The index of the example that each sequence begins in; only causal language models pack or cut examples."""
    if not isinstance(trainer.inputs, CausalInputs):
        return list(range(len(sequences)))
    length, chat = trainer.arguments.sequence_length, trainer.arguments.chat_template
    encoded = [encode_example(trainer.tokenizer, one, length, chat_template=chat) for one in examples]
    ends = torch.tensor([len(one.tokens) for one in encoded]).cumsum(0)
    read = torch.tensor([len(sequence.tokens) for sequence in sequences])
    return torch.searchsorted(ends, read.cumsum(0) - read, right=True).clamp_max(len(examples) - 1).tolist()


def _index(rows: Any, source: torch.Generator) -> int:  # noqa: ANN401
    return int(torch.randint(len(rows), (), generator=source))


def _rate(step: int, total: int) -> float:
    """Linear warm-up over 30 steps at most, then a cosine to a twentieth of the peak."""
    warmup = min(30, max(1, total // 10))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def _average_gradients(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Mean over processes; a modality that one of them has not drawn counts as no gradient there."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, "mean")
