"""The methods of a comparison: generator, controls and baselines, as functions from task and seed to weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import CollectArguments, CompareArguments
from lora_factory.collection.multitask import train_multitask
from lora_factory.collection.trainer import LoRATrainer, open_trainer, settings_of
from lora_factory.evaluation.baselines import (
    ConditionBaseline,
    PcaRidge,
    Retrieval,
    SimilarityMixture,
    gibberish,
    greedy_soup,
    other_task,
    uniform_soup,
)
from lora_factory.evaluation.cond_p_diff import CondPDiff, train_cond_p_diff
from lora_factory.evaluation.fold import Fold
from lora_factory.generator.refine import refine
from lora_factory.models.hidden_states import base_fingerprint, example_features
from lora_factory.models.inputs import TokenSequence
from lora_factory.reporting.summary import (
    ANOTHER_TASK,
    FROM_EXAMPLES,
    GENERATED,
    GIBBERISH,
    ORIGINAL_LORA,
    ORIGINAL_MODEL,
    UNIFORM_SOUP,
    UNREFINED,
)
from lora_factory.tasks.task import Task
from lora_factory.utils.files import atomic_file
from lora_factory.utils.paths import sha256_text
from lora_factory.zoo.checkpoints import mean_checkpoint, open_checkpoints

MULTITASK = "multi-task LoRA"
WAYS = {"text": "", "hidden": FROM_EXAMPLES}  # what a method's name ends with, by the modality of its condition


class ComparedMethods:
    """The methods of a comparison by name; each takes a task and a seed and returns weights of shape ``(D,)``.

    A method is fitted or trained at its first call. Trained weights are kept in ``folder``, under names that hold
    `fingerprint`.

    Args:
        fold: Tasks, zoo and generator.
        base_model: Hub id or folder of the base model.
        folder: Where trained weights are kept.
        arguments: Seeds and sizes.
    """

    def __init__(self, fold: Fold, base_model: str | Path, folder: Path, arguments: CompareArguments) -> None:
        self.fold, self.folder, self.arguments = fold, folder, arguments
        self.base_model = base_model
        self._loaded: dict[Path, CondPDiff] = {}
        self.seeds, self.settings = fold.seeds or arguments.seeds, settings_of(fold.zoo)
        self.weights = open_checkpoints(fold.zoo)
        self.means = torch.stack([mean_checkpoint(rows) for rows in self.weights.values()])
        self.ways = {name: suffix for name, suffix in WAYS.items() if name in fold.generator.config.modalities}
        self.first_way = next(iter(self.ways))
        self.features = {name: self._features(name) for name in self.ways}
        self.methods: dict[str, Callable[[Task, int], torch.Tensor]] = {
            ORIGINAL_MODEL: lambda task, seed: torch.zeros(fold.zoo.layout.size),
            ORIGINAL_LORA: lambda task, seed: self._original(task, seed, best=False),
            f"{ORIGINAL_LORA}, best": lambda task, seed: self._original(task, seed, best=True),
            UNIFORM_SOUP: lambda task, seed: uniform_soup(dict(zip(self.weights, self.means[:, None], strict=True))),
            "greedy soup": lambda task, seed: self._greedy,
            MULTITASK: lambda task, seed: self._multitask(seed),
        }
        self.baselines: dict[str, Callable[[Task, int], torch.Tensor]] = {}
        for name, suffix in self.ways.items():
            self.baselines |= {
                f"retrieval{suffix}": partial(self._baseline, Retrieval, name),
                f"similarity mixture{suffix}": partial(self._baseline, SimilarityMixture, name),
                f"PCA + ridge{suffix}": partial(self._baseline, PcaRidge, name),
            }
        self.baselines[f"COND P-DIFF{self.ways[self.first_way]}"] = self._diffused
        self.methods |= self.baselines
        for name, suffix in self.ways.items():
            self.methods |= {
                f"{GENERATED}{suffix}": partial(self.generated, [name]),
                f"{GENERATED}{suffix}, sampled": partial(self.generated, [name], temperature=1.0),
                f"{GENERATED}{suffix}{ANOTHER_TASK}": partial(self.generated, [name], another=True),
            }
        if "text" in self.ways:
            self.methods[GIBBERISH] = self._from_gibberish
        if len(self.ways) > 1:
            self.methods[f"{GENERATED} from text and examples, unrefined"] = partial(self.generated, list(self.ways))
        self.methods[f"{GENERATED}, no condition"] = partial(self.generated, [])
        if "hidden" in self.ways:
            self.methods |= {
                # the first two as generate_adapter(examples=…) writes them
                f"{GENERATED}{FROM_EXAMPLES}": partial(self._refined, GENERATED),
                f"{GENERATED}{FROM_EXAMPLES}{ANOTHER_TASK}": partial(self._refined, GENERATED, another=True),
                UNREFINED: partial(self.generated, ["hidden"]),
                f"{MULTITASK}, refined": partial(self._refined, MULTITASK),
            }

    def condition(self, way: str, name: str, seed: int) -> torch.Tensor:
        """A task's vector, shape ``(width,)``: its first description, or what a few of its examples say."""
        return self.fold.generator.task_vector(way, self._support(way, name, seed))

    def generated(
        self, ways: Sequence[str], task: Task, seed: int, *, temperature: float = 0.0, another: bool = False
    ) -> torch.Tensor:
        """Generate weights for a task.

        Args:
            ways: Modalities of the condition.
            task: A task of the fold.
            seed: Seed of the latent and of the choice of examples.
            temperature: Factor on the standard deviation of the prior; 0 decodes the prior's mean.
            another: Whether to condition on another task of the zoo instead, as a control.
        """
        name = self._conditioned_on(task, another=another)
        return self._from({way: self.condition(way, name, seed) for way in ways}, seed, temperature)

    def diffusion(self, seed: int) -> CondPDiff:
        """COND P-DIFF trained on the zoo with this seed, conditioned on the generator's first modality."""
        way = self.first_way
        folder = self.folder / f"cond-p-diff-{way}-{seed}-{self.fingerprint[:12]}-{self.vectors}"
        if folder not in self._loaded:
            if not folder.is_dir():
                features = {name: self.features[way][name] for name in self.weights}
                train_cond_p_diff(self.weights, features, seed=seed).save(folder)
            self._loaded[folder] = CondPDiff.load(folder)
        return self._loaded[folder]

    def trainer_of(self, method: str) -> LoRATrainer:
        """The base model with a slot that the method's weights fit into."""
        if method.startswith(GENERATED):
            return self._generators_trainer
        return self._multitask_trainer if method.startswith(MULTITASK) else self.trainer

    def budgets(self) -> dict[str, int]:
        """The number of training tokens that went through the base model for each method."""
        zoo = self.fold.zoo
        collected = sum(zoo.record(task, run).train_tokens for task in zoo.tasks for run in zoo.runs(task))
        through_base = max((int(row.get("tokens", 0)) for row in self.fold.history), default=0)
        budgets = dict.fromkeys(self.methods, collected) | {ORIGINAL_MODEL: 0}
        generated = through_base + (0 if self.fold.generator.config.zoo_fingerprint is None else collected)
        return budgets | {name: generated for name in self.methods if name.startswith(GENERATED)}

    def targets(self, rows: torch.Tensor) -> torch.Tensor:
        """Checkpoints ``(n, D)`` of the zoo as the generator's network would make them: ``(n, targets)``."""
        return self.fold.generator.targets(rows, self.fold.zoo.layout)

    def made(self, way: str, task: Task, seed: int, *, temperature: float = 0.0) -> torch.Tensor:
        """What the generator's network makes of a task's condition: ``(targets,)``."""
        rows = {way: self.condition(way, task.name, seed)[None]}
        return self.fold.generator.made(rows, 1, seed=seed, temperature=temperature)[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what all methods rest on: base model, zoos, and the tasks' names, descriptions and data."""
        fold = self.fold
        tasks = [[task.name, task.descriptions, task.fingerprint()] for task in fold.tasks]
        zoos = [None if zoo is None else zoo.fingerprint() for zoo in (fold.zoo, fold.originals)]
        return sha256_text(json.dumps([base_fingerprint(self.trainer), zoos, tasks]))

    @cached_property
    def vectors(self) -> str:
        """A fingerprint of the task vectors' widths and of the text encoder, with its weights where it is a folder."""
        generator = self.fold.generator
        encoder = generator.text_encoder.identifier if "text" in self.ways else None
        return sha256_text(json.dumps([generator.config.modalities, encoder]))[:12]

    @cached_property
    def generator_fingerprint(self) -> str:
        """SHA-256 of the generator's weights."""
        digest = hashlib.sha256()
        for tensor in self.fold.generator.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def trainer(self) -> LoRATrainer:
        """The base model with a slot for the zoo's adapters, and the settings of the zoo's runs."""
        return self._attached(self.fold.zoo.layout)

    @cached_property
    def _generators_trainer(self) -> LoRATrainer:
        """The base model with a slot for generated adapters, whose rank may be higher than the zoo's."""
        layout = self.fold.generator.layout
        return self.trainer if layout.modules == self.trainer.layout.modules else self._attached(layout)

    @cached_property
    def _multitask_trainer(self) -> LoRATrainer:
        """The base model with a slot for the multi-task LoRA, whose rank and learning rate may be its own."""
        rank, rate = self.arguments.multitask_rank, self.arguments.multitask_learning_rate
        settings = self.trainer.arguments
        wanted = replace(settings, rank=rank or settings.rank, learning_rate=rate or settings.learning_rate)
        if wanted == settings:
            return self.trainer
        layout = self.fold.zoo.layout
        return self._attached(layout.with_rank(rank) if rank else layout, wanted)

    def _attached(self, layout: AdapterLayout, settings: CollectArguments | None = None) -> LoRATrainer:
        name, tasks = self.fold.zoo.layout.base_model, self.fold.tasks
        return open_trainer(
            self.base_model, settings or self.settings, Accelerator(), tasks, base_model_name=name, layout=layout
        )

    def _features(self, way: str) -> dict[str, torch.Tensor]:
        """Vectors of every task's descriptions or training examples, shape ``(n, width)`` by the task's name."""
        if way == "hidden":
            width = (self.fold.generator.config.modalities or {}).get("hidden")  # in format 2 without the memory
            states = example_features(self.trainer, self.fold.tasks)
            return {name: rows[:, :width] for name, rows in states.items()}
        encoder = self.fold.generator.text_encoder
        return {task.name: encoder.encode(list(task.descriptions)) for task in self.fold.tasks}

    def _support(self, way: str, name: str, seed: int) -> torch.Tensor:
        """The vectors that a task's condition is made of, ``(n, width)``: of one description, or of a few examples."""
        rows = self.features[way][name]
        return rows[:1] if way == "text" else rows[self._drawn(name, seed)]

    def _drawn(self, name: str, seed: int) -> torch.Tensor:
        """Indices of the training examples that a task's condition is made of."""
        source = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.features["hidden"][name]), generator=source)[: self.arguments.examples]

    def _sequences(self, trainer: LoRATrainer, name: str, seed: int) -> list[TokenSequence]:
        """The training examples that a task's condition is made of, tokenised."""
        examples = next(task for task in self.fold.tasks if task.name == name).examples("train")
        drawn = [examples[index] for index in self._drawn(name, seed).tolist()]
        return list(trainer.inputs.encode(drawn, trainer.arguments.tokens))

    def _original(self, task: Task, seed: int, *, best: bool) -> torch.Tensor:
        zoo = self.fold.originals if task in self.fold.unseen else self.fold.zoo
        assert zoo is not None
        run = f"seed-{seed}" if zoo.has_run(task.name, f"seed-{seed}") else zoo.runs(task.name)[0]
        losses = zoo.record(task.name, run).validation_losses
        if not (best and losses):  # an imported adapter has no losses to choose by
            return zoo.final(task.name, run)
        return zoo.snapshots(task.name, run)[min(range(len(losses)), key=losses.__getitem__)]

    @cached_property
    def _greedy(self) -> torch.Tensor:
        """Greedy soup over the tasks' mean adapters, by mean validation loss over the seen tasks."""
        validation = [self.trainer.validation(task) for task in self.fold.seen]

        def loss(vector: torch.Tensor) -> float:
            self.trainer.slot.load(vector)
            return sum(self.trainer.loss(sequences) for sequences in validation) / len(validation)

        return self._kept("greedy-soup", lambda: greedy_soup(self.means, loss))

    def _multitask(self, seed: int) -> torch.Tensor:
        trainer = self._multitask_trainer
        name = f"multi-task-{trainer.arguments.rank}-{trainer.arguments.learning_rate:g}-{seed}"
        return self._kept(name, lambda: train_multitask(trainer, list(self.fold.seen), seed=seed))

    def _baseline(self, kind: type[ConditionBaseline], way: str, task: Task, seed: int) -> torch.Tensor:
        keys = torch.stack([self.features[way][name].mean(0) for name in self.weights])
        return kind.fit(keys, self.means).generate(self._support(way, task.name, seed).mean(0))

    def _diffused(self, task: Task, seed: int) -> torch.Tensor:
        return self.diffusion(seed).generate(self._support(self.first_way, task.name, seed).mean(0), seed)

    def _refined(self, method: str, task: Task, seed: int, *, another: bool = False) -> torch.Tensor:
        trainer, name = self.trainer_of(method), self._conditioned_on(task, another=another)
        if method == MULTITASK:
            start = self._multitask(seed)
        else:
            start = self.generated(["hidden"], task, seed, another=another)
        return refine(trainer, start, self._sequences(trainer, name, seed), steps=self.arguments.refine_steps)

    def _conditioned_on(self, task: Task, *, another: bool) -> str:
        """The name of the task whose condition is given: ``task`` itself, or another seen task as a control."""
        return other_task(task.name, [*self.weights, task.name]) if another else task.name

    def _from_gibberish(self, task: Task, seed: int) -> torch.Tensor:
        return self._from({"text": self.fold.generator.text_encoder.encode([gibberish(seed)])[0]}, seed)

    @torch.no_grad()
    def _from(self, vectors: Mapping[str, torch.Tensor], seed: int, temperature: float = 0.0) -> torch.Tensor:
        generator = self.fold.generator
        rows = {name: vector[None] for name, vector in vectors.items()}
        return generator.assemble(generator.made(rows, 1, seed=seed, temperature=temperature))[0]

    def _kept(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Read a vector from the folder, or compute and write it; the file's name holds `fingerprint`."""
        path = self.folder / f"{name}-{self.fingerprint[:12]}.safetensors"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                save_file({"weights": make().contiguous()}, temporary)
        return load_file(path)["weights"]
