"""Run the whole pipeline offline on an embedded real model and real text of the running Python environment."""

from __future__ import annotations

import json
import math
import platform
import resource
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.text import Text

from lora_factory.arguments import CollectArguments, CompareArguments, DemoArguments, TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.demo.corpus import build_corpus
from lora_factory.evaluation.comparison import compare
from lora_factory.evaluation.fold import Fold
from lora_factory.generator.files import TRAINING_FILE
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.embedded import EMBEDDED_BASE_MODEL, embedded_base_model
from lora_factory.models.loading import load_base_model
from lora_factory.reporting.report import terminal_tables
from lora_factory.reporting.summary import (
    ANOTHER_TASK,
    GENERATED,
    GIBBERISH,
    ORIGINAL_LORA,
    ORIGINAL_MODEL,
    UNIFORM_SOUP,
    headroom,
)
from lora_factory.tasks.task import Task
from lora_factory.training.train import train_generator, training_history
from lora_factory.utils import terminal
from lora_factory.utils.files import write_json
from lora_factory.utils.folders import GENERATOR, check_folder, check_reports
from lora_factory.utils.paths import local_path
from lora_factory.utils.versions import versions
from lora_factory.zoo.store import AdapterZoo

METHODS = (ORIGINAL_MODEL, ORIGINAL_LORA, UNIFORM_SOUP, GENERATED, f"{GENERATED}{ANOTHER_TASK}", GIBBERISH)
_FIGURES = ("loss", "tokens", "characters", "perplexity", "bits_per_character")


@dataclass(frozen=True)
class DemoSize:
    """Settings of the demo's stages."""

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
        steps=16,
        snapshots=4,
        batch_size=4,
        sequence_length=64,
        learning_rate=5e-3,
        validation_sequences=8,
        dtype="bfloat16",
    ),
    train=TrainArguments(),
    test_tokens=1000,
)
FAST = replace(FULL, seen_tasks=3, collect=replace(FULL.collect, steps=12), train=TrainArguments(steps=300))


@dataclass
class DemoRun:
    """The output folder, the base model and the settings of a run, and how many seconds each stage took."""

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
    """Collect, train, generate and compare; continues where an interrupted run of the same folder stopped.

    Args:
        arguments: Output folder, base model and whether to make the short tour.

    Returns:
        The content of ``results.json``: scores by method and task, headroom, seconds, versions. The output folder
        holds ``comparison.json`` as well.
    """
    console = terminal.console(width=120)
    size = FAST if arguments.fast else FULL
    folder = local_path(arguments.output_dir) / ("fast" if arguments.fast else "full")
    check_reports(folder, "cells.jsonl", "comparison.json", "results.json")
    check_folder(folder / "generator", GENERATOR, overwrite=True)
    start = time.perf_counter()
    base_model = arguments.base_model or str(embedded_base_model())
    run = DemoRun(folder, base_model, arguments.base_model or EMBEDDED_BASE_MODEL, size)
    run.seconds["base model"] = round(time.perf_counter() - start, 1)
    with run.stage("text"):
        seen, unseen = build_corpus(folder / "tasks", seen=size.seen_tasks)
    with run.stage("collect"):
        zoo = _collect(run, seen, folder / "zoo")
        originals = _collect(run, [unseen], folder / "unseen-zoo")
    with run.stage("train"):
        generator = _trained_generator(run, zoo)
    with run.stage("generate"):
        for task in (*seen, unseen):
            generator.save_adapter(task.descriptions[0], folder / "adapters" / task.name, overwrite=True)
    with run.stage("evaluate"):
        history = training_history(folder / "generator")
        fold = Fold(tuple(seen), (unseen,), zoo, originals, generator, history=history)
        settings = CompareArguments(max_tokens=size.test_tokens)
        comparison = compare(fold, run.base_model, folder, settings, methods=METHODS)
        sample = _sample(run, unseen)
    results = {
        "base_model": run.base_model_name,
        "unseen_task": unseen.name,
        "scores": _scores(comparison),
        "sample": sample,
        "seconds": {**run.seconds, "all": round(sum(run.seconds.values()), 1)},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "settings": {"collect": asdict(size.collect), "train": asdict(size.train)},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **versions()},
    }
    write_json(folder / "results.json", results)
    for table in terminal_tables(comparison, console.width):
        console.print(table)
    _show(console, results, run, unseen)
    return results


def _collect(run: DemoRun, tasks: Sequence[Task], folder: Path) -> AdapterZoo:
    return collect_adapters(tasks, run.base_model, folder, run.size.collect, base_model_name=run.base_model_name)


def _trained_generator(run: DemoRun, zoo: AdapterZoo) -> CVAELoRAGenerator:
    """Train the generator, or load the one in the folder if it was trained on this zoo with these settings."""
    folder = run.folder / "generator"
    if (folder / TRAINING_FILE).is_file():
        recorded = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))["arguments"]
        if recorded == asdict(run.size.train):  # else it may be of an earlier format
            generator = CVAELoRAGenerator.from_pretrained(folder)
            if generator.config.zoo_fingerprint == zoo.fingerprint():
                return generator
    train_generator(zoo, folder, run.size.train, overwrite=True)
    return CVAELoRAGenerator.from_pretrained(folder)  # a later run loads these bits too


def _sample(run: DemoRun, task: Task) -> dict[str, str]:
    """Continue the beginning of a test document of the unseen task with the base model and with its generated LoRA."""
    base, tokenizer = load_base_model(run.base_model, dtype=run.size.collect.dtype)
    model = PeftModel.from_pretrained(base, run.folder / "adapters" / task.name)
    beginning = tokenizer(task.examples("test")[0].completion).input_ids[:24]
    inputs = torch.tensor([beginning])

    def continued() -> str:
        output = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False
        )
        return str(tokenizer.decode(output[0, len(beginning) :]))

    with model.disable_adapter():
        before = continued()
    return {"task": task.name, "beginning": str(tokenizer.decode(beginning)), "before": before, "after": continued()}


def _scores(comparison: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """The figures of every cell with its headroom, by method and task; None where there is no figure."""
    cells = {(cell["method"], cell["task"]): cell for cell in comparison["cells"]}
    scores: dict[str, dict[str, dict[str, float | None]]] = {method: {} for method in comparison["methods"]}
    for (method, task), cell in cells.items():
        losses = [cells[name, task]["loss"] for name in (ORIGINAL_MODEL, method, ORIGINAL_LORA)]
        share = math.nan if None in losses else headroom(*losses)
        scores[method][task] = {name: cell.get(name) for name in _FIGURES}
        scores[method][task]["headroom"] = None if math.isnan(share) else share
    return scores


def _show(console: Console, results: Mapping[str, Any], run: DemoRun, unseen: Task) -> None:
    """Print the text sample, the times and what to try next."""
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
    """Three commands to continue with: generate an adapter from a text, score it, train the paper's decoder."""
    folder = {name: shlex.quote(str(run.folder / name)) for name in ("generator", "zoo", "tasks/unseen.yaml")}
    text, base = shlex.quote(unseen.descriptions[1]), shlex.quote(run.base_model_name)
    return [
        f"generate --generator {folder['generator']} --text {text} --output-dir my-adapter",
        f"evaluate --adapter my-adapter --base-model {base} --tasks {folder['tasks/unseen.yaml']} --max-tokens 2000",
        f"train --zoo {folder['zoo']} --decoder conv1d --steps 200 --output-dir paper-generator",
    ]
