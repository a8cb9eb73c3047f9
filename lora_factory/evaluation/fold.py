"""The tasks, zoos and generator that one comparison runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.tasks.task import Task
from lora_factory.zoo.store import AdapterZoo


@dataclass(frozen=True)
class Fold:
    """The tasks, zoos and generator that one comparison runs on.

    Attributes:
        seen: Tasks of the zoo that generator and baselines were made from.
        unseen: Tasks of which the zoo holds no checkpoint and no description.
        zoo: The seen tasks' adapters.
        originals: LoRAs fine-tuned on the unseen tasks: headroom is measured in their gain, no method reads them.
        generator: The generator trained on ``zoo``.
        number: The fold's number in a series of them.
        seeds: Seeds to compare for this fold alone, where every seed has a zoo and a generator of its own.
        history: The generator's training losses, as ``training.json`` has them.
    """

    seen: tuple[Task, ...]
    unseen: tuple[Task, ...]
    zoo: AdapterZoo
    originals: AdapterZoo | None
    generator: CVAELoRAGenerator
    number: int = 0
    seeds: tuple[int, ...] = ()
    history: Sequence[Mapping[str, float]] = ()

    def __post_init__(self) -> None:
        """Check that no unseen task is in the zoo, and that the generator was trained on the zoo."""
        if {task.name for task in self.seen} != set(self.zoo.tasks):
            raise LoraFactoryError(
                f"the seen tasks {sorted(task.name for task in self.seen)} are not the zoo's: {self.zoo.tasks}; "
                "pass the tasks that it was collected from"
            )
        leaked = sorted({task.name for task in self.unseen} & set(self.zoo.tasks))
        if leaked:
            raise LoraFactoryError(f"the unseen tasks {leaked} are in the zoo {self.zoo.folder}; leave them out of it")
        if self.generator.config.zoo_fingerprint not in (None, self.zoo.fingerprint()):
            raise LoraFactoryError(
                f"the generator was not trained on the zoo {self.zoo.folder} as it is now; "
                "train it again, with lora-factory train or train_generator"
            )
        if self.unseen and self.originals is None:
            raise LoraFactoryError(
                "unseen tasks need their own LoRAs as a unit; collect them into a zoo and pass it: originals= "
                "(--unseen-zoo)"
            )

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The seen tasks, then the unseen ones."""
        return (*self.seen, *self.unseen)
