"""The whole pipeline on an embedded real model and on real text of the running Python environment, offline."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from lora_factory._version import __version__
from lora_factory.adapters.attach import AdapterSlot, attach_adapter
from lora_factory.arguments import CollectArguments, DemoArguments, TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.demo.corpus import build_corpus
from lora_factory.evaluation.perplexity import TextScore, score_examples
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.embedded import EMBEDDED_BASE_MODEL, embedded_base_model
from lora_factory.models.loading import load_base_model
from lora_factory.reporting.summary import headroom
from lora_factory.tasks.task import Task
from lora_factory.training.train import train_generator
from lora_factory.utils.cache import CellLog
from lora_factory.utils.files import write_json
from lora_factory.utils.folders import GENERATOR, check_folder, check_reports
from lora_factory.utils.paths import local_path
from lora_factory.utils.versions import LIBRARIES
from lora_factory.zoo.store import AdapterZoo

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

METHODS = ("original model", "original LoRA", "uniform Model Soup", "generated")


@dataclass(frozen=True)
class DemoSize:
    """How long each stage of the demo runs."""

    seen_tasks: int
    collect: CollectArguments
    train: TrainArguments
    test_tokens: int


FULL = DemoSize(
    seen_tasks=6,
    collect=CollectArguments(
        rank=2,
        lora_alpha=4.0,
        target_modules="q_proj,v_proj",
        steps=32,
        snapshots=8,
        batch_size=4,
        sequence_length=64,
        learning_rate=5e-3,
        validation_sequences=8,
        dtype="bfloat16",
    ),
    train=TrainArguments(steps=200),
    test_tokens=2000,
)
FAST = DemoSize(
    seen_tasks=3,
    collect=CollectArguments(**{**asdict(FULL.collect), "steps": 12, "snapshots": 4}),
    train=TrainArguments(steps=60),
    test_tokens=1000,
)


@dataclass
class DemoRun:
    """The state that the stages share: where results go and how long each stage took."""

    folder: Path
    base_model: str
    base_model_name: str
    size: DemoSize
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_demo(arguments: DemoArguments) -> dict[str, Any]:
    """Collect, train, generate and evaluate; continues where an interrupted run of the same folder stopped.

    Args:
        arguments: Output folder, base model and whether to make the short tour.

    Returns:
        What ``results.json`` in the output folder says: scores by method and task, headroom, seconds, versions.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    size = FAST if arguments.fast else FULL
    folder = local_path(arguments.output_dir) / ("fast" if arguments.fast else "full")
    check_reports(folder, "cells.jsonl", "results.json")
    check_folder(folder / "generator", GENERATOR, overwrite=True)
    start = time.perf_counter()
    base_model = arguments.base_model or str(embedded_base_model())
    run = DemoRun(folder, base_model, arguments.base_model or EMBEDDED_BASE_MODEL, size)
    run.seconds["base model"] = round(time.perf_counter() - start, 1)
    with run.stage("text"):
        seen, unseen = build_corpus(folder / "tasks", seen=size.seen_tasks)
    with run.stage("collect"):
        zoo = _collect(run, seen, folder / "zoo")
        unseen_zoo = _collect(run, [unseen], folder / "unseen-zoo")
    with run.stage("train"):
        generator = _trained_generator(run, zoo)
    with run.stage("generate"):
        adapters = _generate(generator, [*seen, unseen], folder / "adapters")
    with run.stage("evaluate"):
        scores, sample = _evaluate(run, zoo, unseen_zoo, adapters, seen, unseen)
    results = _results(run, scores, sample, unseen.name)
    write_json(folder / "results.json", results)
    _show(console, results, run, unseen)
    return results


def _collect(run: DemoRun, tasks: Sequence[Task], folder: Path) -> AdapterZoo:
    return collect_adapters(tasks, run.base_model, folder, run.size.collect, base_model_name=run.base_model_name)


def _trained_generator(run: DemoRun, zoo: AdapterZoo) -> CVAELoRAGenerator:
    """Train the generator, unless the folder holds one trained like this on this zoo."""
    folder = run.folder / "generator"
    if (folder / "training.json").is_file():
        generator = CVAELoRAGenerator.from_pretrained(folder)
        recorded = json.loads((folder / "training.json").read_text(encoding="utf-8"))["arguments"]
        if generator.config.zoo_fingerprint == zoo.fingerprint() and recorded == asdict(run.size.train):
            return generator
    train_generator(zoo, folder, run.size.train, overwrite=True)
    return CVAELoRAGenerator.from_pretrained(folder)  # the same bits as a later run will load


def _generate(generator: CVAELoRAGenerator, tasks: Sequence[Task], folder: Path) -> dict[str, torch.Tensor]:
    """Write each task's adapter from its first description; vectors of shape ``(D,)`` by task name."""
    vectors = {}
    for task in tasks:
        generator.save_adapter(task.descriptions[0], folder / task.name, overwrite=True)
        vectors[task.name] = generator.layout.flatten(generator.generate_state_dict(task.descriptions[0]))
    return vectors


def _evaluate(
    run: DemoRun,
    zoo: AdapterZoo,
    unseen_zoo: AdapterZoo,
    generated: Mapping[str, torch.Tensor],
    seen: Sequence[Task],
    unseen: Task,
) -> tuple[dict[str, dict[str, TextScore]], dict[str, str]]:
    """Score every method on every task's test split; finished cells of an interrupted run are read back."""
    model, tokenizer = load_base_model(run.base_model, dtype=run.size.collect.dtype)
    soup = torch.stack([zoo.snapshots(name).mean(0) for name in zoo.tasks]).mean(0)
    layout = zoo.layout
    slot = AdapterSlot(attach_adapter(model, layout, layout.unflatten(soup)), layout)
    cells = CellLog(run.folder / "cells.jsonl")
    tasks = [*seen, unseen]
    scores: dict[str, dict[str, TextScore]] = {method: {} for method in METHODS}
    bar = tqdm(total=len(tasks) * len(METHODS), desc="evaluate", unit="cell")
    for task in tasks:
        source = unseen_zoo if task is unseen else zoo
        adapters = {
            "original model": torch.zeros(layout.size),
            "original LoRA": source.final(task.name, source.runs(task.name)[-1]),
            "uniform Model Soup": soup,
            "generated": generated[task.name],
        }
        for method, vector in adapters.items():
            facts = _facts(run, task, vector)
            slot.load(vector)
            cell = cells.get_or_compute(facts, partial(_score, slot.model, tokenizer, task, run.size))
            scores[method][task.name] = TextScore(cell["loss"], cell["tokens"], cell["characters"])
            bar.update()
    bar.close()
    slot.load(generated[unseen.name])
    return scores, _sample(slot, tokenizer, unseen)


def _facts(run: DemoRun, task: Task, vector: torch.Tensor) -> dict[str, Any]:
    """What a score depends on."""
    return {
        "task": task.name,
        "data": task.fingerprint(),
        "base_model": run.base_model_name,
        "weights": hashlib.sha256(vector.contiguous().numpy().tobytes()).hexdigest(),
        "test_tokens": run.size.test_tokens,
    }


def _score(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, size: DemoSize) -> dict[str, float]:
    test = task.examples("test")
    return score_examples(model, tokenizer, test, window=256, stride=192, max_tokens=size.test_tokens).to_dict()


def _sample(slot: AdapterSlot, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, str]:
    """How the base model and the generated adapter of the unseen task continue the same real beginning."""
    beginning = tokenizer(task.examples("test")[0].completion).input_ids[:24]
    inputs = torch.tensor([beginning])

    def continued() -> str:
        output = slot.model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False
        )
        return str(tokenizer.decode(output[0, len(beginning) :]))

    with slot.disabled():
        before = continued()
    return {"task": task.name, "beginning": str(tokenizer.decode(beginning)), "before": before, "after": continued()}


def _results(
    run: DemoRun, scores: Mapping[str, Mapping[str, TextScore]], sample: Mapping[str, str], unseen: str
) -> dict[str, Any]:
    base, original = scores["original model"], scores["original LoRA"]
    return {
        "base_model": run.base_model_name,
        "unseen_task": unseen,
        "scores": {
            method: {
                task: {**score.to_dict(), "headroom": _headroom(base[task].loss, score.loss, original[task].loss)}
                for task, score in row.items()
            }
            for method, row in scores.items()
        },
        "sample": dict(sample),
        "seconds": {**run.seconds, "all": round(sum(run.seconds.values()), 1)},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "settings": {"collect": asdict(run.size.collect), "train": asdict(run.size.train)},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "lora-factory": __version__,
            **{name: version(name) for name in LIBRARIES},
        },
    }


def _headroom(base: float, adapter: float, original: float) -> float | None:
    """Headroom as JSON has it: None where the original LoRA gains nothing."""
    share = headroom(base, adapter, original)
    return None if math.isnan(share) else share


def _show(console: Console, results: Mapping[str, Any], run: DemoRun, unseen: Task) -> None:
    """Print the table, what it says in words, the text sample and what to try next."""
    console.print(_table(results))
    console.print(verdict(results), highlight=False)
    sample = results["sample"]
    console.print(f"\n[bold]The unseen task, {sample['task']}[/bold]: the same beginning, continued")
    for label in ("beginning", "before", "after"):
        console.print(Text(f"{label:>9}  {sample[label]!r}"))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items())
    console.print(f"\n{seconds}; peak memory {results['peak_memory_gb']:.1f} GB; all in {run.folder}", highlight=False)
    console.print("\n[bold]Next[/bold]")
    for command in next_commands(run, unseen):
        console.print(Text(f"  lora-factory {command}"), soft_wrap=True)


def next_commands(run: DemoRun, unseen: Task) -> list[str]:
    """Three commands to go on with: write an adapter from a text of one's own, score it, train the paper's decoder."""
    folder = {name: shlex.quote(str(run.folder / name)) for name in ("generator", "zoo", "tasks/unseen.yaml")}
    text, base = shlex.quote(unseen.descriptions[1]), shlex.quote(run.base_model_name)
    return [
        f"generate --generator {folder['generator']} --text {text} --output-dir my-adapter",
        f"evaluate --adapter my-adapter --base-model {base} --tasks {folder['tasks/unseen.yaml']} --max-tokens 2000",
        f"train --zoo {folder['zoo']} --decoder conv1d --output-dir paper-generator",
    ]


def _table(results: Mapping[str, Any]) -> Table:
    title = "Test split: perplexity (PPL), bits per character (BPC), headroom recovered"
    table = Table(title=f"{title}; {results['base_model']}")
    tasks = list(results["scores"]["generated"])
    table.add_column("", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for task in tasks:
        note = "\n(unseen)" if task == results["unseen_task"] else ""
        table.add_column(task.replace("_", "\n") + note, justify="right")
    columns = (
        ("PPL", "perplexity", "{:.2f}"),
        ("BPC", "bits_per_character", "{:.3f}"),
        ("headroom", "headroom", "{:.2f}"),
    )
    for title, key, form in columns:
        for method, row in results["scores"].items():
            values = [row[task][key] for task in tasks]
            table.add_row(title, method, *("-" if value is None else form.format(value) for value in values))
        table.add_section()
    return table


def verdict(results: Mapping[str, Any]) -> str:
    """The table in words: the least recovered seen task, and whether the unseen one beats base model and soup."""
    scores, unseen = results["scores"], results["unseen_task"]
    shares = {task: row["headroom"] for task, row in scores["generated"].items() if task != unseen}
    seen = {task: share for task, share in shares.items() if share is not None}
    worst = min(seen, key=lambda task: seen[task], default=None)
    recovered = (
        f"generated adapters recover at least {seen[worst]:.0%} of the original LoRA's headroom ({worst})"
        if worst is not None
        else "no original LoRA gains anything, so there is no headroom to recover"
    )
    losses = {method: row[unseen]["loss"] for method, row in scores.items()}
    base = "beats" if losses["generated"] < losses["original model"] else "DOES NOT BEAT"
    soup = "beats" if losses["generated"] < losses["uniform Model Soup"] else "does not beat"
    return (
        f"Seen tasks: {recovered}.\n"
        f"Unseen task {unseen}, from its description alone: {base} the original model, {soup} the uniform Model Soup."
    )
