"""The data of stage 2, where it starts, and its validation: the tasks' own loss through the frozen base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from lora_factory.collection.trainer import AdapterFactory
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.generator.networks import TokenCVAE
from lora_factory.models.inputs import TokenSequence
from lora_factory.models.losses import query_loss
from lora_factory.tasks.task import Task

SUPPORT = 16  # examples per task whose mean hidden state is the condition in a validation


@dataclass(frozen=True)
class TaskData:
    """What a generator is validated on for one task.

    Attributes:
        texts: Vectors of the descriptions, shape ``(descriptions, width)``.
        hidden: Hidden states of every other training example, shape ``(examples, width)``.
        validation: Sequences of the validation split.
    """

    texts: torch.Tensor
    hidden: torch.Tensor
    validation: list[TokenSequence]

    @classmethod
    def read(cls, task: Task, factory: AdapterFactory, texts: torch.Tensor, hidden: torch.Tensor) -> TaskData:
        """Take the data of one task; ``hidden`` belongs to its first training examples, shape ``(n, width)``."""
        return cls(texts, hidden[::2], factory.validation(task))


@torch.no_grad()
def start_from(generator: CVAELoRAGenerator, bias: torch.Tensor, accelerator: Accelerator) -> None:
    """Set the bias adapter to one that the tasks' loss can lead on from, and let the network add nothing to it.

    That measured better than a start from the zoo's weights. Afterwards all processes hold the same generator.

    Args:
        generator: A new generator with its statistics fitted.
        bias: The LoRA initialisation that all runs share, or one LoRA trained on all tasks, shape ``(D,)``.
        accelerator: Device and processes.
    """
    generator.bias.copy_(bias)
    for parameter in head_parameters(generator):
        parameter.zero_()
    generator.to(accelerator.device).train()
    for tensor in generator.state_dict().values():  # features of other batches differ in their last digits
        tensor.copy_(broadcast(tensor.clone()))


def head_parameters(generator: CVAELoRAGenerator) -> list[torch.Tensor]:
    """The last layer's parameters and the stored adapters: scaling them scales what is added to the bias adapter."""
    network = generator.network
    last = network.outputs if isinstance(network, TokenCVAE) else network.decoder[-1]
    recalled = [generator.get_buffer("known_adapters")] if generator.config.recall is not None else []
    return [*last.parameters(), *recalled]


@torch.no_grad()
def validate(generator: CVAELoRAGenerator, factory: AdapterFactory, data: Mapping[str, TaskData]) -> float:
    """Mean validation loss over the tasks and over each single modality, in nats per token."""
    training = generator.training
    generator.eval()
    factory.model.eval()
    losses = []
    for task in data.values():
        conditions = [{"text": task.texts[:1]}] if "text" in generator.config.modalities else []
        conditions += [{"hidden": task.hidden[:SUPPORT].mean(0, keepdim=True)}]
        for condition in conditions:
            vector = generator.generate_vector({name: rows.to(generator.device) for name, rows in condition.items()})
            losses.append(float(query_loss(factory, vector, [task.validation])))
    generator.train(training)
    return sum(losses) / len(losses)
