"""The generator beside everything it must beat: tasks, methods and seeds on the same held-out text, in one slot."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from lora_factory import __version__
from lora_factory.arguments import CollectArguments, CompareArguments
from lora_factory.base_models import load_base_model
from lora_factory.baselines import (
    ConditionBaseline,
    PcaRidge,
    Retrieval,
    SimilarityMixture,
    gibberish,
    greedy_soup,
    other_task,
    train_multitask,
    uniform_soup,
)
from lora_factory.cells import CellLog
from lora_factory.collect import LIBRARIES, AdapterFactory
from lora_factory.cond_p_diff import CondPDiff, train_cond_p_diff
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation import score_examples
from lora_factory.files import write_json
from lora_factory.modeling import CVAELoRAGenerator
from lora_factory.tasks import Task
from lora_factory.zoo import AdapterZoo

GENERATED = "generated"


@dataclass(frozen=True)
class Fold:
    """What one comparison is about.

    Attributes:
        seen: Tasks of the zoo that generator and baselines were made from.
        unseen: Tasks of which neither text, checkpoint nor description was in it.
        zoo: The seen tasks' adapters.
        originals: The unseen tasks' own adapters: the unit of their headroom, shown to no method.
        generator: The generator trained on ``zoo``.
        number: The fold's number in a series of them.
    """

    seen: tuple[Task, ...]
    unseen: tuple[Task, ...]
    zoo: AdapterZoo
    originals: AdapterZoo | None
    generator: CVAELoRAGenerator
    number: int = 0

    def __post_init__(self) -> None:
        """Check that nothing unseen was seen."""
        if {task.name for task in self.seen} != set(self.zoo.tasks):
            raise LoraFactoryError(
                f"the seen tasks {sorted(task.name for task in self.seen)} are not the zoo's: {self.zoo.tasks}; "
                "pass the tasks that it was collected from"
            )
        leaked = sorted({task.name for task in self.unseen} & set(self.zoo.tasks))
        if leaked:
            raise LoraFactoryError(f"the unseen tasks {leaked} are in the zoo {self.zoo.folder}; leave them out of it")
        if self.generator.config.zoo_fingerprint != self.zoo.fingerprint():
            raise LoraFactoryError(
                f"the generator was not trained on the zoo {self.zoo.folder} as it is now; "
                "train it again with train_generator"
            )
        if self.unseen and self.originals is None:
            raise LoraFactoryError("unseen tasks need their own LoRAs as a unit; collect them into a zoo of their own")


def compare(
    fold: Fold, base_model: str | Path, output_dir: str | Path, arguments: CompareArguments | None = None
) -> dict[str, Any]:
    """Score every method on every task of a fold; an interrupted comparison continues and repeats no finished cell.

    Args:
        fold: Tasks, zoo and generator.
        base_model: Hub id or folder of the base model.
        output_dir: Folder of the cells, of what had to be trained for the baselines, and of ``comparison.json``.
        arguments: Seeds and sizes.

    Returns:
        What ``comparison.json`` says: cells, budgets, diagnostics, storage, curves and points, see ``report.py``.

    Raises:
        LoraFactoryError: When the fold does not hold together, or an adapter does not fit the base model.
    """
    arguments = arguments or CompareArguments()
    contenders = Contenders(fold, base_model, Path(output_dir), arguments)
    cells = list(_cells(fold, contenders, arguments, CellLog(Path(output_dir) / "cells.jsonl")))
    comparison = {
        "base_model": fold.zoo.layout.base_model,
        "created_with": {"lora-factory": __version__, **{name: version(name) for name in LIBRARIES}},
        "seeds": list(arguments.seeds),
        "folds": [[task.name for task in fold.unseen]],
        "settings": asdict(arguments),
        "methods": list(contenders.methods),
        "cells": cells,
        "budgets": contenders.budgets(),
        "diagnostics": [contenders.diagnostics()],
        "storage": contenders.storage(),
        "curves": {},
        "points": contenders.points(),
        "ablations": [],
    }
    write_json(Path(output_dir) / "comparison.json", comparison)
    return comparison


class Contenders:
    """All methods of a comparison, each a function from a task and a seed to adapter weights of shape ``(D,)``.

    What has to be fitted or trained is made when a method is first asked, and kept on disk where it takes long.
    """

    def __init__(self, fold: Fold, base_model: str | Path, folder: Path, arguments: CompareArguments) -> None:
        self.fold, self.folder, self.arguments = fold, folder, arguments
        self.base_model = base_model
        generator = fold.generator
        self.weights = {name: fold.zoo.snapshots(name).float() for name in fold.zoo.tasks}
        self.means = torch.stack([rows.mean(0) for rows in self.weights.values()])
        texts = {task.name: list(task.descriptions) for task in (*fold.seen, *fold.unseen)}
        encoded = {name: generator.text_encoder.encode(rows) for name, rows in texts.items()}
        self.features = {name: encoded[name] for name in fold.zoo.tasks}
        self.conditions = {name: rows[0] for name, rows in encoded.items()}
        self.keys = torch.stack([rows.mean(0) for rows in self.features.values()])
        self.methods: dict[str, Callable[[Task, int], torch.Tensor]] = {
            "original model": lambda task, seed: torch.zeros(fold.zoo.layout.size),
            "original LoRA": lambda task, seed: self._original(task, best=False),
            "original LoRA, best": lambda task, seed: self._original(task, best=True),
            "uniform soup": lambda task, seed: uniform_soup(self.weights),
            "greedy soup": lambda task, seed: self._greedy,
            "retrieval": partial(self._baseline, Retrieval),
            "similarity mixture": partial(self._baseline, SimilarityMixture),
            "PCA + ridge": partial(self._baseline, PcaRidge),
            "multi-task LoRA": lambda task, seed: self._multitask(seed),
            "COND P-DIFF": lambda task, seed: self._diffusion.generate(self.conditions[task.name], seed),
            GENERATED: lambda task, seed: self._generated(self.conditions[task.name], seed),
            f"{GENERATED}, sampled": lambda task, seed: self._generated(self.conditions[task.name], seed, 1.0),
            f"{GENERATED}, gibberish": lambda task, seed: self._generated(
                generator.text_encoder.encode([gibberish(seed)])[0], seed
            ),
            f"{GENERATED}, another task": lambda task, seed: self._generated(
                self.conditions[other_task(task.name, [*self.features, task.name])], seed
            ),
        }

    @cached_property
    def factory(self) -> AdapterFactory:
        """The base model with one slot, set up as the zoo's runs were."""
        zoo = self.fold.zoo
        record = zoo.record(zoo.tasks[0], zoo.runs(zoo.tasks[0])[0])
        settings = CollectArguments(**record.arguments)
        accelerator = Accelerator(gradient_accumulation_steps=settings.gradient_accumulation)
        model, tokenizer = load_base_model(self.base_model, dtype=settings.dtype, device=accelerator.device)
        return AdapterFactory.attach(model, tokenizer, settings, zoo.layout.base_model, accelerator)

    @cached_property
    def generator_fingerprint(self) -> str:
        """SHA-256 of the generator's weights."""
        digest = hashlib.sha256()
        for tensor in self.fold.generator.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def budgets(self) -> dict[str, int]:
        """Training tokens that went through the base model, for every method in all."""
        zoo = self.fold.zoo
        collected = sum(zoo.record(task, run).train_tokens for task in zoo.tasks for run in zoo.runs(task))
        return {name: 0 if name == "original model" else collected for name in self.methods}

    def diagnostics(self) -> dict[str, Any]:
        """Novelty of the generated adapters and the spread of samples beside that of real checkpoints."""
        within = {name: (rows - rows.mean(0)).norm(dim=1).mean() for name, rows in self.weights.items()}
        between = {name: torch.pdist(rows).median() for name, rows in self.weights.items()}
        novelty, spreads = {}, []
        for name, rows in self.weights.items():
            nearest = (rows - self._generated(self.conditions[name], 0)).norm(dim=1).min()
            novelty[name] = float(nearest / between[name]) if len(rows) > 1 else None
            samples = torch.stack([self._generated(self.conditions[name], seed, 1.0) for seed in range(8)])
            spreads.append((samples - samples.mean(0)).norm(dim=1).mean())
        rows, names = (
            torch.cat(list(self.weights.values())),
            [name for name in self.weights for _ in self.weights[name]],
        )
        output = self._encoded(rows, names)
        return {
            "fold": self.fold.number,
            "seed": self.arguments.seeds[0],
            "kl": float(output["kl"].sum(-1).mean()),
            "active_latents": int((output["kl"].mean(0) > 0.01).sum()),
            "latents": output["kl"].shape[1],
            "novelty": novelty,
            "sample_spread": float(torch.stack(spreads).mean()),
            "zoo_spread": float(torch.stack(list(within.values())).mean()),
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
            "COND P-DIFF": sum(tensor.nbytes for tensor in self._diffusion.state_dict().values()),
            "generator": sum(tensor.nbytes for tensor in self.fold.generator.state_dict().values()),
        }
        return [{"what": what, "bytes": size} for what, size in rows.items()]

    def points(self) -> dict[str, dict[str, list[Any]]]:
        """Vectors to plot, reduced by PCA: task vectors, latents, and weights of real and generated adapters."""
        names = [name for name, rows in self.weights.items() for _ in rows]
        rows = torch.cat(list(self.weights.values()))
        generated = torch.stack([self._generated(vector, 0) for vector in self.conditions.values()])
        texts = torch.cat(list(self.features.values()))
        text_names = [name for name, values in self.features.items() for _ in values]
        return {
            "task vectors": _points(texts, text_names, ["description"] * len(texts), 50),
            "latents": _points(self._encoded(rows, names)["mean"], names, ["posterior"] * len(rows), 50),
            "weights": _points(
                torch.cat([rows, generated]),
                [*names, *self.conditions],
                ["real"] * len(rows) + ["generated"] * len(generated),
                2,
            ),
        }

    def _original(self, task: Task, *, best: bool) -> torch.Tensor:
        zoo = self.fold.originals if task in self.fold.unseen else self.fold.zoo
        assert zoo is not None
        run = zoo.runs(task.name)[0]
        losses = zoo.record(task.name, run).validation_losses
        if not best:
            return zoo.final(task.name, run)
        return zoo.snapshots(task.name, run)[min(range(len(losses)), key=losses.__getitem__)]

    def _baseline(self, kind: type[ConditionBaseline], task: Task, seed: int) -> torch.Tensor:
        return kind.fit(self.keys, self.means).generate(self.conditions[task.name])

    @cached_property
    def _greedy(self) -> torch.Tensor:
        """Greedy soup over the tasks' mean adapters, by mean validation loss over the seen tasks."""
        validation = [self.factory.validation(task) for task in self.fold.seen]

        def loss(vector: torch.Tensor) -> float:
            self.factory.slot.load(vector)
            return sum(self.factory.loss(sequences) for sequences in validation) / len(validation)

        return self._kept("greedy-soup", lambda: greedy_soup(self.means, loss))

    def _multitask(self, seed: int) -> torch.Tensor:
        return self._kept(f"multi-task-{seed}", lambda: train_multitask(self.factory, list(self.fold.seen), seed=seed))

    @cached_property
    def _diffusion(self) -> CondPDiff:
        folder = self.folder / f"cond-p-diff-{self.fold.zoo.fingerprint()[:12]}"
        if not folder.is_dir():
            train_cond_p_diff(self.weights, self.features, seed=self.arguments.seeds[0]).save(folder)
        return CondPDiff.load(folder)

    @torch.no_grad()
    def _generated(self, vector: torch.Tensor, seed: int, temperature: float = 0.0) -> torch.Tensor:
        state_dict = self.fold.generator.generate_state_dict(
            conditions={"text": vector}, seed=seed, temperature=temperature
        )
        return self.fold.generator.layout.flatten(state_dict)

    @torch.no_grad()
    def _encoded(self, rows: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Posterior means ``(n, latents)`` of real checkpoints and their KL from the prior."""
        generator = self.fold.generator
        conditions = {"text": torch.stack([self.conditions[name] for name in names])}
        weights, condition = generator.encode_inputs(rows, conditions)
        posterior = generator.network.posterior(weights, condition)
        return {"mean": posterior.mean, "kl": posterior.kl(generator.network.prior(condition))}

    def _kept(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A vector from this folder, made once for this zoo."""
        path = self.folder / f"{name}-{self.fold.zoo.fingerprint()[:12]}.safetensors"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tmp-{path.name}")
            save_file({"weights": make().contiguous()}, temporary)
            temporary.replace(path)
        return load_file(path)["weights"]


def _cells(fold: Fold, contenders: Contenders, arguments: CompareArguments, log: CellLog) -> Iterator[dict[str, Any]]:
    """Every method on every task for every seed.

    A cell whose metric is not a number says so; it is not kept, and so tried again by the next comparison.
    """
    wanted = [
        (seed, task, method)
        for seed in arguments.seeds
        for task in (*fold.seen, *fold.unseen)
        for method in contenders.methods
    ]
    for seed, task, method in tqdm(wanted, desc="compare", unit="cell"):
        facts = {
            "fold": fold.number,
            "seed": seed,
            "task": task.name,
            "seen": task not in fold.unseen,
            "method": method,
            "condition": "text",
            "data": task.fingerprint(),
            "zoo": fold.zoo.fingerprint(),
            "max_tokens": arguments.max_tokens,
            "generator": contenders.generator_fingerprint if method.startswith(GENERATED) else None,
        }
        try:
            cell = log.get_or_compute(facts, partial(_scored, contenders, task, seed, method, arguments))
        except ArithmeticError as error:
            warnings.warn(f"{task.name}, {method}, seed {seed}: {error}", stacklevel=2)
            cell = {**facts, "loss": None, "error": str(error)}
        yield cell


def _scored(contenders: Contenders, task: Task, seed: int, method: str, arguments: CompareArguments) -> dict[str, Any]:
    """The figures of one cell.

    Raises:
        ArithmeticError: When the loss is not a finite number.
    """
    factory = contenders.factory
    factory.slot.load(contenders.methods[method](task, seed))
    score = score_examples(
        factory.model,
        factory.tokenizer,
        task.examples("test"),
        window=arguments.window,
        stride=arguments.window * 3 // 4,
        max_tokens=arguments.max_tokens,
    )
    if not math.isfinite(score.loss):
        raise ArithmeticError(f"the loss is {score.loss}")
    return {**score.to_dict(), "accuracy": None, "error": None}


def _points(rows: torch.Tensor, labels: list[str], kinds: list[str], size: int) -> dict[str, list[Any]]:
    centered = (rows - rows.mean(0)).double()
    values, basis = torch.linalg.eigh(centered @ centered.T)
    coordinates = (basis * values.clamp_min(0).sqrt()).flip(-1)[:, :size]
    return {
        "rows": [[round(value, 5) for value in row] for row in coordinates.tolist()],
        "labels": labels,
        "kinds": kinds,
    }
