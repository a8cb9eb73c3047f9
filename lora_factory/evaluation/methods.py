"""Every method of a comparison: generator, controls and baselines, each from a task and a seed to weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import CollectArguments, CompareArguments
from lora_factory.collection.multitask import train_multitask
from lora_factory.collection.trainer import AdapterFactory, open_factory, settings_of
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
from lora_factory.generator.refine import best_of, refine
from lora_factory.models.hidden_states import example_features
from lora_factory.models.inputs import TokenSequence
from lora_factory.reporting.summary import ANOTHER_TASK, FROM_EXAMPLES, GENERATED, UNREFINED
from lora_factory.tasks.task import Task
from lora_factory.zoo.snapshots import mean_snapshot, open_snapshots

MULTITASK = "multi-task LoRA"
WAYS = {"text": "", "hidden": FROM_EXAMPLES}  # how a method's name says what it is conditioned on
SHOWN_EXAMPLES = 24  # examples a task in the plot of hidden states
SHOWN_BYTES = 256 << 20  # of snapshots in the plots and in the mean KL; at least one a task in any case


class Contenders:
    """All methods of a comparison, each a function from a task and a seed to adapter weights of shape ``(D,)``.

    What has to be fitted or trained is made when a method is first asked, and kept on disk where it takes long.
    """

    def __init__(self, fold: Fold, base_model: str | Path, folder: Path, arguments: CompareArguments) -> None:
        self.fold, self.folder, self.arguments = fold, folder, arguments
        self.base_model = base_model
        self._loaded: dict[Path, CondPDiff] = {}
        self.seeds, self.settings = fold.seeds or arguments.seeds, settings_of(fold.zoo)
        self.weights = open_snapshots(fold.zoo)
        self.wide = open_snapshots(fold.zoo, fold.generator.layout)
        self.means = torch.stack([mean_snapshot(rows) for rows in self.weights.values()])
        self.ways = {name: suffix for name, suffix in WAYS.items() if name in fold.generator.config.modalities}
        self.features = {name: self._features(name) for name in self.ways}
        self.methods: dict[str, Callable[[Task, int], torch.Tensor]] = {
            "original model": lambda task, seed: torch.zeros(fold.zoo.layout.size),
            "original LoRA": lambda task, seed: self._original(task, seed, best=False),
            "original LoRA, best": lambda task, seed: self._original(task, seed, best=True),
            "uniform soup": lambda task, seed: uniform_soup(dict(zip(self.weights, self.means[:, None], strict=True))),
            "greedy soup": lambda task, seed: self._greedy,
            MULTITASK: lambda task, seed: self._multitask(seed),
        }
        for name, suffix in self.ways.items():
            self.methods |= {
                f"retrieval{suffix}": partial(self._baseline, Retrieval, name),
                f"similarity mixture{suffix}": partial(self._baseline, SimilarityMixture, name),
                f"PCA + ridge{suffix}": partial(self._baseline, PcaRidge, name),
            }
        first, suffix = next(iter(self.ways.items()))
        self.methods[f"COND P-DIFF{suffix}"] = partial(self._diffused, first)
        for name, suffix in self.ways.items():
            self.methods |= {
                f"{GENERATED}{suffix}": partial(self._generated, [name]),
                f"{GENERATED}{suffix}, sampled": partial(self._generated, [name], temperature=1.0),
                f"{GENERATED}{suffix}{ANOTHER_TASK}": partial(self._generated, [name], another=True),
            }
        if "text" in self.ways:
            self.methods[f"{GENERATED}, gibberish"] = self._from_gibberish
        if len(self.ways) > 1:
            self.methods[f"{GENERATED} from text and examples, unrefined"] = partial(self._generated, list(self.ways))
        self.methods[f"{GENERATED}, no condition"] = partial(self._generated, [])
        if "hidden" in self.ways:
            self.methods |= {
                # the first two as generate_adapter(examples=…) writes them
                f"{GENERATED}{FROM_EXAMPLES}": partial(self._refined, GENERATED),
                f"{GENERATED}{FROM_EXAMPLES}{ANOTHER_TASK}": partial(self._refined, GENERATED, another=True),
                UNREFINED: partial(self._generated, ["hidden"]),
                f"{GENERATED}{FROM_EXAMPLES}, best of {len(self._subsets)}": self._best_of,
                f"{MULTITASK}, refined": partial(self._refined, MULTITASK),
            }

    @property
    def _subsets(self) -> list[list[str]]:
        """Every subset of the modalities, the empty one first."""
        ways = list(self.ways)
        return [[way for bit, way in enumerate(ways) if number >> bit & 1] for number in range(2 ** len(ways))]

    def condition(self, way: str, name: str, seed: int) -> torch.Tensor:
        """A task's vector, shape ``(width,)``: its first description, or the mean over a few of its examples."""
        rows = self.features[way][name]
        if way == "text":
            return rows[0]
        return rows[self._drawn(name, seed)].mean(0)

    def _drawn(self, name: str, seed: int) -> torch.Tensor:
        """Which of a task's training examples its condition is made of."""
        source = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.features["hidden"][name]), generator=source)[: self.arguments.examples]

    def _sequences(self, factory: AdapterFactory, name: str, seed: int) -> list[TokenSequence]:
        """The examples of a task's condition as the base model reads them."""
        examples = next(task for task in (*self.fold.seen, *self.fold.unseen) if task.name == name).examples("train")
        drawn = [examples[index] for index in self._drawn(name, seed).tolist()]
        return list(factory.inputs.encode(drawn, factory.arguments))

    def _refined(self, method: str, task: Task, seed: int, *, another: bool = False) -> torch.Tensor:
        factory, name, steps = self.factory_of(method), self._asked(task, another=another), self.arguments.refine_steps
        start = (
            self._multitask(seed) if method == MULTITASK else self._generated(["hidden"], task, seed, another=another)
        )
        return refine(factory, start, self._sequences(factory, name, seed), steps=steps)

    def _best_of(self, task: Task, seed: int) -> torch.Tensor:
        factory = self._generators_factory
        candidates = torch.stack([self._generated(ways, task, seed) for ways in self._subsets])
        return best_of(factory, candidates, self._sequences(factory, task.name, seed))[0]

    def factory_of(self, method: str) -> AdapterFactory:
        """The base model with the slot that a method's weights fit into."""
        if method.startswith(GENERATED):
            return self._generators_factory
        return self._multitask_factory if method.startswith(MULTITASK) else self.factory

    @cached_property
    def _generators_factory(self) -> AdapterFactory:
        """The same for the generator, whose adapters may have a higher rank than the zoo's."""
        layout = self.fold.generator.layout
        return self.factory if layout.modules == self.factory.layout.modules else self._attached(layout)

    @cached_property
    def factory(self) -> AdapterFactory:
        """The base model with one slot, set up as the zoo's runs were."""
        return self._attached(self.fold.zoo.layout)

    @cached_property
    def _multitask_factory(self) -> AdapterFactory:
        """The same for the multi-task LoRA, whose rank and learning rate may be its own."""
        rank, rate = self.arguments.multitask_rank, self.arguments.multitask_learning_rate
        settings = self.factory.arguments
        wanted = replace(settings, rank=rank or settings.rank, learning_rate=rate or settings.learning_rate)
        if wanted == settings:
            return self.factory
        layout = self.fold.zoo.layout
        return self._attached(layout.with_rank(rank) if rank else layout, wanted)

    def _attached(self, layout: AdapterLayout, settings: CollectArguments | None = None) -> AdapterFactory:
        name, tasks = self.fold.zoo.layout.base_model, (*self.fold.seen, *self.fold.unseen)
        return open_factory(
            self.base_model, settings or self.settings, Accelerator(), tasks, base_model_name=name, layout=layout
        )

    def _features(self, way: str) -> dict[str, torch.Tensor]:
        """Vectors of every task's descriptions or training examples, by the name of the task."""
        tasks = (*self.fold.seen, *self.fold.unseen)
        if way == "hidden":
            return example_features(self.factory, tasks)
        return {task.name: self.fold.generator.text_encoder.encode(list(task.descriptions)) for task in tasks}

    @cached_property
    def generator_fingerprint(self) -> str:
        """SHA-256 of the generator's weights, and of how it reads conditions."""
        config = self.fold.generator.config
        digest = hashlib.sha256(json.dumps([config.reach, config.recall], sort_keys=True).encode())
        for tensor in self.fold.generator.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def budgets(self) -> dict[str, int]:
        """Training tokens that went through the base model, for every method in all."""
        zoo = self.fold.zoo
        collected = sum(zoo.record(task, run).train_tokens for task in zoo.tasks for run in zoo.runs(task))
        through_base = max((int(row.get("tokens", 0)) for row in self.fold.history), default=0)
        budgets = dict.fromkeys(self.methods, collected) | {"original model": 0}
        return budgets | {name: collected + through_base for name in self.methods if name.startswith(GENERATED)}

    def diagnostics(self) -> dict[str, Any]:
        """Novelty of the generated adapters and the spread of samples beside that of real checkpoints."""
        way = next(iter(self.ways))
        novelty, sampled, real = {}, [], []
        for task in self.fold.seen:
            rows, seed = self.wide[task.name][:], self.seeds[0]
            nearest = (rows - self._generated([way], task, seed)).norm(dim=1).min()
            novelty[task.name] = float(nearest / torch.pdist(rows).median()) if len(rows) > 1 else None
            samples = torch.stack([self._generated([way], task, sample, temperature=1.0) for sample in range(8)])
            if way == "hidden":  # a seed draws other examples too, which is not what the spread is about
                samples = samples - torch.stack([self._generated([way], task, sample) for sample in range(8)])
            sampled.append((samples - samples.mean(0)).norm(dim=1).mean())
            real.append((rows - rows.mean(0)).norm(dim=1).mean())
        output = self._encoded(way, self._shown())
        return {
            "fold": self.fold.number,
            "seed": self.seeds[0],
            "kl": float(output["kl"].sum(-1).mean()),
            "active_latents": int((output["kl"].mean(0) > 0.01).sum()),
            "latents": output["kl"].shape[1],
            "novelty": novelty,
            "sample_spread": float(torch.stack(sampled).mean()),
            "zoo_spread": float(torch.stack(real).mean()),
        }

    def storage(self) -> list[dict[str, Any]]:
        """Bytes of what each way of keeping the tasks needs (Table 3)."""
        zoo, number = self.fold.zoo, 4
        snapshots = sum(len(rows) for rows in self.weights.values())
        text = sum(
            len((example.prompt + example.completion).encode())
            for task in self.fold.seen
            for example in task.examples("train")
        )
        rows = {
            "data set": text,
            "all LoRA checkpoints": snapshots * zoo.layout.size * number,
            "one LoRA a task": len(self.weights) * zoo.layout.size * number,
            "uniform soup": zoo.layout.size * number,
            "COND P-DIFF": sum(
                tensor.nbytes for tensor in self._diffusion(next(iter(self.ways)), self.seeds[0]).state_dict().values()
            ),
            "generator": sum(tensor.nbytes for tensor in self.fold.generator.state_dict().values()),
        }
        return [{"what": what, "bytes": size} for what, size in rows.items()]

    def points(self) -> dict[str, dict[str, list[Any]]]:
        """Vectors to plot, reduced by PCA: task vectors, latents, and weights of real and generated adapters."""
        way, tasks = next(iter(self.ways)), (*self.fold.seen, *self.fold.unseen)
        shown = self._shown()
        names = [name for name, rows in shown.items() for _ in rows]
        generated = torch.stack([self._generated([way], task, self.seeds[0]) for task in tasks])
        latents = self._encoded(way, shown)
        prior = latents["prior"]
        plots = {
            "latents": _points(
                torch.cat([latents["mean"], prior]),
                [*names, *shown],
                ["posterior"] * len(names) + ["prior"] * len(prior),
                50,
            ),
            "weights": _points(
                torch.cat([*shown.values(), generated]),
                [*names, *(task.name for task in tasks)],
                ["real"] * len(names) + ["generated"] * len(generated),
                2,
            ),
        }
        for name, title, kind in (("text", "task vectors", "description"), ("hidden", "hidden states", "example")):
            rows = {task: values[:SHOWN_EXAMPLES] for task, values in self.features.get(name, {}).items()}
            labels = [task for task, values in rows.items() for _ in values]
            if labels:
                plots[title] = _points(torch.cat(list(rows.values())), labels, [kind] * len(labels), 50)
        return plots

    def _original(self, task: Task, seed: int, *, best: bool) -> torch.Tensor:
        zoo = self.fold.originals if task in self.fold.unseen else self.fold.zoo
        assert zoo is not None
        run = f"seed-{seed}" if zoo.has_run(task.name, f"seed-{seed}") else zoo.runs(task.name)[0]
        losses = zoo.record(task.name, run).validation_losses
        if not (best and losses):  # an imported adapter has no losses to choose by
            return zoo.final(task.name, run)
        return zoo.snapshots(task.name, run)[min(range(len(losses)), key=losses.__getitem__)]

    def _baseline(self, kind: type[ConditionBaseline], way: str, task: Task, seed: int) -> torch.Tensor:
        keys = torch.stack([self.features[way][name].mean(0) for name in self.weights])
        return kind.fit(keys, self.means).generate(self.condition(way, task.name, seed))

    def _diffused(self, way: str, task: Task, seed: int) -> torch.Tensor:
        return self._diffusion(way, seed).generate(self.condition(way, task.name, seed), seed)

    @cached_property
    def _greedy(self) -> torch.Tensor:
        """Greedy soup over the tasks' mean adapters, by mean validation loss over the seen tasks."""
        validation = [self.factory.validation(task) for task in self.fold.seen]

        def loss(vector: torch.Tensor) -> float:
            self.factory.slot.load(vector)
            return sum(self.factory.loss(sequences) for sequences in validation) / len(validation)

        return self._kept("greedy-soup", lambda: greedy_soup(self.means, loss))

    def _multitask(self, seed: int) -> torch.Tensor:
        factory = self._multitask_factory
        name = f"multi-task-{factory.arguments.rank}-{factory.arguments.learning_rate:g}-{seed}"
        return self._kept(name, lambda: train_multitask(factory, list(self.fold.seen), seed=seed))

    def _diffusion(self, way: str, seed: int) -> CondPDiff:
        folder = self.folder / f"cond-p-diff-{way}-{seed}-{self.fold.zoo.fingerprint()[:12]}"
        if folder not in self._loaded:
            if not folder.is_dir():
                features = {name: self.features[way][name] for name in self.weights}
                train_cond_p_diff(self.weights, features, seed=seed).save(folder)
            self._loaded[folder] = CondPDiff.load(folder)
        return self._loaded[folder]

    def _generated(
        self, ways: Sequence[str], task: Task, seed: int, *, temperature: float = 0.0, another: bool = False
    ) -> torch.Tensor:
        name = self._asked(task, another=another)
        return self._from({way: self.condition(way, name, seed) for way in ways}, seed, temperature)

    def _asked(self, task: Task, *, another: bool) -> str:
        """Whose condition is given for a task: its own, or as a control another seen task's."""
        return other_task(task.name, [*self.weights, task.name]) if another else task.name

    def _from_gibberish(self, task: Task, seed: int) -> torch.Tensor:
        return self._from({"text": self.fold.generator.text_encoder.encode([gibberish(seed)])[0]}, seed)

    @torch.no_grad()
    def _from(self, vectors: Mapping[str, torch.Tensor], seed: int, temperature: float = 0.0) -> torch.Tensor:
        generator = self.fold.generator
        rows = {name: vector[None] for name, vector in vectors.items()}
        return (generator.bias + generator.standard_vector(rows, 1, seed, temperature) * generator.weight_scale)[0]

    def _shown(self) -> dict[str, torch.Tensor]:
        """Snapshots of every task, shape ``(n, D)``: all, or as many at even distances as `SHOWN_BYTES` hold."""
        row_bytes = 4 * self.fold.generator.layout.size * len(self.wide)
        most = max(1, SHOWN_BYTES // row_bytes)
        return {
            name: torch.stack([rows[len(rows) * number // count] for number in range(count)])
            for name, rows in self.wide.items()
            for count in [min(most, len(rows))]
        }

    @torch.no_grad()
    def _encoded(self, way: str, snapshots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Posterior means ``(n, latents)`` of real checkpoints, their KL, and the prior's mean of every task."""
        generator, outputs = self.fold.generator, []
        for name, rows in snapshots.items():
            vector = self.condition(way, name, self.seeds[0])
            weights, condition = generator.encode_inputs(rows, {way: vector.expand(len(rows), -1)})
            posterior, prior = generator.network.posterior(weights, condition), generator.network.prior(condition)
            outputs.append({"mean": posterior.mean, "kl": posterior.kl(prior), "prior": prior.mean[:1]})
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}

    def _kept(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A vector from this folder, made once for this zoo."""
        path = self.folder / f"{name}-{self.fold.zoo.fingerprint()[:12]}.safetensors"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tmp-{path.name}")
            save_file({"weights": make().contiguous()}, temporary)
            temporary.replace(path)
        return load_file(path)["weights"]


def _points(rows: torch.Tensor, labels: list[str], kinds: list[str], size: int) -> dict[str, list[Any]]:
    centered = (rows - rows.mean(0)).double()
    values, basis = torch.linalg.eigh(centered @ centered.T)
    coordinates = (basis * values.clamp_min(0).sqrt()).flip(-1)[:, :size]
    return {
        "rows": [[round(value, 5) for value in row] for row in coordinates.tolist()],
        "labels": labels,
        "kinds": kinds,
    }
