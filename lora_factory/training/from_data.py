"""Train a generator on the tasks' own loss, back-propagated through the frozen base model.

First the factors alone, as one LoRA for all tasks. Then every step draws several tasks, each with a condition, and one
batched forward pass reads some sequences of each with the adapter of its own core. Some rows have no condition, or an
unrelated text as theirs: of what says nothing about a task the network learns to make nothing, so that the adapter
without a condition stays the one for all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_factory.arguments import TrainArguments
from lora_factory.collection.optimise import take_steps
from lora_factory.collection.trainer import LoRATrainer, TrainingTask
from lora_factory.generator.basis import CoreBasis
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import CoreCVAE
from lora_factory.models.inputs import TokenSequence
from lora_factory.models.losses import ReadWith, fast_attention, query_loss, query_losses
from lora_factory.training.conditions import draw_conditions, draw_present, index_of, unrelated_texts
from lora_factory.training.from_zoo import set_spread
from lora_factory.utils.checkpoint import TrainingCheckpoint, TrainingState

RECORDS = 10  # how often the loss is recorded, and the held-out tasks are scored
SEQUENCES = 2  # per task and step
# Share of the rows without a condition of their own; half of them have an unrelated text. With 0.3, on the grid's
# validation fold, the adapter without a condition is 0.03 nats worse, and texts of seen cells are 0.04 better.
UNCONDITIONED = 0.5
WARMUP = 50  # steps, at most a tenth of all
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class TaskData:
    """Sequences of one task.

    Attributes:
        train: Of the training split.
        validation: Of the validation split.
    """

    train: list[TokenSequence]
    validation: list[TokenSequence]

    @classmethod
    def read(cls, task: TrainingTask, trainer: LoRATrainer) -> TaskData:
        """Encode a task's splits as the base model reads them."""
        return cls(trainer.encode(task.examples("train")), trainer.validation(task))


def train_through_base(
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
    tasks: Sequence[TrainingTask],
    features: Mapping[str, Mapping[str, Tensor]],
    arguments: TrainArguments,
    held_out: Sequence[TrainingTask] = (),
    checkpoint: TrainingCheckpoint | None = None,
) -> list[dict[str, float]]:
    """Train a generator's factors, then factors and network together, ``arguments.base_steps`` steps in all.

    With several processes, each draws tasks of its own and the gradients are averaged.

    Args:
        generator: One with cores; its conditions' statistics are fitted, its factors are where the training starts.
        trainer: The frozen base model, and how it reads examples.
        tasks: What to train on.
        features: For every modality the rows ``(n, width)`` of every task, the held-out ones included.
        arguments: ``base_steps``, ``multitask_steps``, ``base_tasks`` and the two learning rates.
        held_out: Tasks whose validation loss from their first description chooses the step whose weights are kept:
            best those of a value that no other task has, a language say. Without any the last step's are kept.
        checkpoint: Where the state is kept now and then; a training that was cut off goes on from there, with the
            result that it would have had.

    Returns:
        Ten records: step, training loss and, of the held-out tasks, validation loss in nats per token, tokens read.

    Raises:
        LoraFactoryError: When a loss is not finite.
    """
    basis, network, accelerator = generator.basis, generator.network, trainer.accelerator
    assert basis is not None and isinstance(network, CoreCVAE)
    data = {task.name: TaskData.read(task, trainer) for task in tasks}
    scored = {task.name: TaskData.read(task, trainer).validation for task in held_out}
    unrelated = None
    if "text" in features:
        texts = unrelated_texts((task.descriptions[0] for task in tasks), arguments.seed)
        unrelated = generator.text_encoder.encode(texts).to(accelerator.device)
    generator.to(accelerator.device).train()
    for tensor in generator.state_dict().values():  # features of other batches differ in their last digits
        tensor.copy_(broadcast(tensor.clone()))
    generator.center.requires_grad_(True)
    groups = [[basis.factors, generator.center], list(network.parameters())]
    optimizer = torch.optim.Adam([{"params": group} for group in groups], betas=BETAS)
    source = torch.Generator().manual_seed(arguments.seed + accelerator.process_index)
    state, total = TrainingState(), arguments.base_steps
    if checkpoint is not None:
        state = checkpoint.restore(generator, optimizer, source, accelerator) or state
    due = {math.ceil(total * part / RECORDS) for part in range(1, RECORDS + 1)}

    def gradients(step: int) -> float:
        _set_rates(optimizer, step - 1, arguments)
        _read_mode(trainer)
        drawn = _Step.draw(data, arguments, source)
        cores = generator.center[None]
        if step > arguments.multitask_steps:
            cores = _drawn_cores(generator, drawn.tasks, features, unrelated, source)
        loss = _backward(trainer, basis, cores, drawn.sequences)
        _average_gradients(accelerator, [*basis.parameters(), generator.center, *network.parameters()])
        state.tokens += drawn.tokens * accelerator.num_processes
        return loss

    steps = take_steps(
        gradients,
        optimizer,
        total,
        start=state.step,
        label="train through the base",
        advice=f"lower basis_learning_rate (now {arguments.basis_learning_rate}) or base_learning_rate "
        f"({arguments.base_learning_rate})",
        disable=not accelerator.is_local_main_process,
    )
    rows = min(arguments.base_tasks, len(tasks)) * SEQUENCES
    with trainer.slot.disabled(), fast_attention(trainer, rows, trainer.arguments.sequence_length):
        for step, loss, bar in steps:
            state.count(step, loss)
            if step in due:
                validation = validate(generator, trainer, scored, features) if scored else None
                state.record(validation, generator)
                bar.set_postfix(state.history[-1])
            if checkpoint is not None:
                checkpoint.save_now_and_then(state, generator, optimizer, source, accelerator)
    generator.center.requires_grad_(False)
    if state.best_weights is not None:
        generator.load_state_dict(state.best_weights)
    return state.history


@torch.no_grad()
def validate(
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
    validation: Mapping[str, list[TokenSequence]],
    features: Mapping[str, Mapping[str, Tensor]],
) -> float:
    """Mean loss of tasks in nats per token, each with the adapter of its first description, or of its first images."""
    basis, training = generator.basis, generator.training
    assert basis is not None
    generator.eval()
    trainer.model.eval()
    name, losses = "text" if "text" in features else next(iter(features)), []
    for task, sequences in validation.items():
        cores = generator.cores({name: features[name][task][:1].to(generator.device)}, 1)
        losses.append(float(query_loss(trainer, _read_with(trainer, basis, cores), [sequences])))
    generator.train(training)
    return sum(losses) / len(losses)


@torch.no_grad()
def calibrate_spread(generator: CVAELoRAGenerator, features: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let samples at temperature 1 spread as the codes of a task's wordings do: there are no checkpoints to go by."""
    network, (name, tasks) = generator.network, next(iter(features.items()))
    assert isinstance(network, CoreCVAE)
    set_spread(network, (network.prior(generator.standardiser.all({name: r}), len(r)).mean for r in tasks.values()))


@dataclass(frozen=True)
class _Step:
    """The tasks of one step and some training sequences of each."""

    tasks: list[str]
    sequences: list[list[TokenSequence]]

    @classmethod
    def draw(cls, data: Mapping[str, TaskData], arguments: TrainArguments, source: torch.Generator) -> _Step:
        names = list(data)
        tasks = [names[i] for i in torch.randperm(len(names), generator=source)[: arguments.base_tasks].tolist()]
        rows = [data[task].train for task in tasks]
        return cls(tasks, [[row[index_of(row, source)] for _ in range(SEQUENCES)] for row in rows])

    @property
    def tokens(self) -> int:
        return sum(len(sequence.tokens) for rows in self.sequences for sequence in rows)


def _read_with(trainer: LoRATrainer, basis: CoreBasis, cores: Tensor) -> ReadWith:
    """What reads some tasks' rows, each with the adapter of its core; one core alone is for all."""
    return lambda share: basis.in_batch(trainer.model, cores[share] if len(cores) > 1 else cores)


def _backward(
    trainer: LoRATrainer, basis: CoreBasis, cores: Tensor, sequences: Sequence[Sequence[TokenSequence]]
) -> float:
    """Gradients of the mean loss of tasks; returns the loss. Those of the cores are passed on once, in the end."""
    given, total = cores.detach().requires_grad_(), 0.0
    for loss in query_losses(trainer, _read_with(trainer, basis, given), sequences):
        trainer.accelerator.backward(loss)
        total += loss.item()
    cores.backward(given.grad)
    return total


def _drawn_cores(
    generator: CVAELoRAGenerator,
    tasks: Sequence[str],
    features: Mapping[str, Mapping[str, Tensor]],
    unrelated: Tensor | None,
    source: torch.Generator,
) -> Tensor:
    """Cores ``(tasks, C)`` of a condition of each task, of an unrelated text, or of no condition."""
    names = list(features)
    conditions = draw_conditions(generator, features, tasks, source, names)
    fate = torch.rand(len(tasks), 1, generator=source)
    present = draw_present(names, len(tasks), fate < UNCONDITIONED, source)
    if unrelated is not None:
        strange = fate < UNCONDITIONED / 2
        drawn = torch.randint(len(unrelated), (len(tasks),), generator=source)
        other = unrelated[drawn.to(unrelated.device)]
        conditions["text"] = torch.where(strange.to(other.device), other, conditions["text"])
        present["text"] = present["text"] | strange
    present = {name: rows.to(generator.device) for name, rows in present.items()}
    return generator.cores(conditions, len(tasks), present=present)


def _read_mode(trainer: LoRATrainer) -> None:
    """Put the base model into evaluation mode, but for the layers that compute their activations twice.

    Transformers checkpoints in training mode only; what is in these layers, dropout above all, stays off.
    """
    trainer.model.eval()
    if trainer.arguments.gradient_checkpointing:
        for module in trainer.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


def _set_rates(optimizer: torch.optim.Optimizer, step: int, arguments: TrainArguments) -> None:
    """Set both learning rates: a linear warm-up each, then constant for a third of all steps, then falling to 0."""
    first, total = arguments.multitask_steps, arguments.base_steps
    warmup = min(WARMUP, max(1, total // 10))
    left = min(1.0, 1.5 * (total - step) / total)
    optimizer.param_groups[0]["lr"] = arguments.basis_learning_rate * min(1.0, (step + 1) / warmup) * left
    optimizer.param_groups[1]["lr"] = arguments.base_learning_rate * min(1.0, (step + 1 - first) / warmup) * left


def _average_gradients(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Mean over processes; a modality that one of them has not drawn counts as no gradient there."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, "mean")
