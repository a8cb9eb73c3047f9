"""The end of stage 2: what each task would have of the adapter for all tasks, for the network to write.

An adapter trained on all tasks at once is hard to beat, and the same for every condition. Trained on for a while on
one task alone it gets better at that task and worse at the others: it has become a specialist. The network learns to
write the difference from a condition, as stage 1 learns to write the adapters of a zoo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from lora_factory.arguments import TrainArguments
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.generator.familiarity import measure_reach
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import token_scales
from lora_factory.generator.recall import measure_recall
from lora_factory.models.inputs import shuffled_batches
from lora_factory.tasks.task import Task
from lora_factory.training.from_data import TaskData, head_parameters, validate
from lora_factory.training.from_zoo import fit
from lora_factory.utils.cache import TensorCache

SNAPSHOTS = 5  # of every specialist, from the second half of its training
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of what the specialists bring that the generator may write


def specialise(
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
    tasks: Sequence[Task],
    data: Mapping[str, TaskData],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    arguments: TrainArguments,
    cache: TensorCache,
) -> dict[str, float]:
    """Train every task's specialist from what the generator writes for it, and the generator to write the difference.

    Afterwards the generator believes a condition as far as it is near a task that it knows, and writes the whole
    difference, or the largest share of it that validates no worse on the tasks than none. (A smaller one often
    validates a little better, half-way between an adapter for all and one of its own; but it serves others as well.)

    Args:
        generator: As ``start_from`` leaves it; its bias adapter stays.
        trainer: The frozen base model, with the settings that the zoo was collected with.
        tasks: The zoo's tasks.
        data: What the generator is validated on, per task.
        features: For every modality the rows ``(n, width)`` of every task.
        arguments: ``specialist_steps``, ``specialist_learning_rate``, and stage 1's.
        cache: Where every specialist is kept once it is trained, so that one that was cut off goes on after them.

    Returns:
        The record of stage 2: the specialists' validation loss (``loss``) and the generator's (``validation``), in
        nats per token; the share; and the tokens read.
    """
    weights, loss, tokens = train_specialists(generator, trainer, tasks, features, arguments, cache)
    deviation = torch.stack([(rows - generator.bias.cpu()).square().mean(0) for rows in weights.values()]).mean(0)
    generator.token_scale.copy_(token_scales(generator.layout, deviation))
    fit(generator, weights, features, arguments, trainer.accelerator)
    standardiser = generator.cpu().standardiser
    generator.config.reach = measure_reach(standardiser, features)
    if generator.config.recall is not None:
        generator.config.recall = measure_recall(standardiser, features, strict=True)
    generator.to(trainer.accelerator.device)
    heads = head_parameters(generator)
    whole, validations = [head.detach().clone() for head in heads], {}
    for chosen in (0.0, *SHARES):  # the first one is what the others must reach, and the last resort
        set_heads(heads, whole, chosen)
        with trainer.slot.disabled():
            validations[chosen] = validate(generator, trainer, data)
        if len(validations) > 1 and validations[chosen] <= validations[0.0]:
            break
    losses = {"loss": round(loss, 5), "validation": round(validations[chosen], 5)}
    step = arguments.base_steps + arguments.specialist_steps
    return {"step": step, **losses, "share": chosen, "tokens": tokens}


def train_specialists(
    generator: CVAELoRAGenerator,
    trainer: LoRATrainer,
    tasks: Sequence[Task],
    features: Mapping[str, Mapping[str, torch.Tensor]],
    arguments: TrainArguments,
    cache: TensorCache,
) -> tuple[dict[str, torch.Tensor], float, int]:
    """Fine-tune what the generator writes for each task on that task alone; processes share the tasks.

    Those that the cache has are read from it.

    Returns:
        Checkpoints ``(n, D)`` by task name, their mean validation loss, and the tokens that all processes read.
    """
    accelerator, total = trainer.accelerator, arguments.specialist_steps
    kept = sorted({total - part * total // (2 * SNAPSHOTS) for part in range(SNAPSHOTS)})
    weights = torch.zeros(len(tasks), len(kept), generator.layout.size)
    figures = torch.zeros(len(tasks), 2, dtype=torch.float64)
    for index in range(accelerator.process_index, len(tasks), accelerator.num_processes):
        task = tasks[index]
        if (known := cache.read(task.name)) is not None:
            weights[index], figures[index] = known["weights"], known["figures"]
            continue
        means = {name: rows[task.name].mean(0, keepdim=True).to(generator.device) for name, rows in features.items()}
        with torch.no_grad():
            start = generator.generate_vector(means)[0].cpu()
        sequences = trainer.encode(task.examples("train"))
        batches = shuffled_batches(sequences, trainer.arguments.batch_size, arguments.seed)
        label = f"{task.name}, specialist"
        weights[index], losses, read = trainer.fit(
            batches,
            [trainer.validation(task)],
            kept,
            label,
            seed=arguments.seed,
            start=start,
            learning_rate=arguments.specialist_learning_rate,
        )
        figures[index] = torch.tensor([fmean(losses), read])
        cache.write({"weights": weights[index].clone(), "figures": figures[index].clone()}, task.name)
    weights, figures = (accelerator.reduce(value.to(accelerator.device), "sum").cpu() for value in (weights, figures))
    rows = dict(zip([task.name for task in tasks], weights, strict=True))
    return rows, float(figures[:, 0].mean()), int(figures[:, 1].sum())


@torch.no_grad()
def set_heads(heads: Sequence[torch.Tensor], whole: Sequence[torch.Tensor], share: float) -> None:
    """Let the generator write this share of what it was trained to."""
    for head, values in zip(heads, whole, strict=True):
        head.copy_(share * values)
