"""Prompted tasks (P3/T0): loss and accuracy on data sets that the generator never saw, beside the multi-task LoRA.

    LORA_FACTORY_SHARED=../shared python benchmarks/t0.py --output t0-output                        # for a GPU
    LORA_FACTORY_SHARED=../shared python benchmarks/t0.py --output t0-output --seen 8 --unseen 4 --steps 30 \\
        --rows 20 --window 128 --batch-size 4 --dtype bfloat16 --refine-steps 12                    # for two cores

Whole data sets are left out, not only some of their prompts. A task's accuracy is that of the likeliest choice where
it has five answers or fewer, of exact answers where they are short, and not counted otherwise. Rows are shuffled, in
the same order for every prompt of a data set, so that no prompt's test rows are another's training rows. Everything is
kept in the output folder, so that the same command continues after an interruption.
"""

import argparse
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from domain_tasks import shared_folder
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from lora_factory import CVAELoRAGenerator, Task, TrainArguments, __version__, train_generator
from lora_factory.arguments import REFINE_STEPS, CollectArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.collection.multitask import train_multitask
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.evaluation.accuracy import task_accuracy
from lora_factory.evaluation.perplexity import score_examples
from lora_factory.generator.refine import refine
from lora_factory.models.hidden_states import example_features
from lora_factory.tasks.examples import Example
from lora_factory.training.train import zoo_factory
from lora_factory.utils.cache import CellLog
from lora_factory.utils.paths import sha256_file

LEFT_OUT = ("ag_news", "samsum", "sciq")  # data sets; the tasks of all others are seen
BASE, RANK = "HuggingFaceTB/SmolLM2-135M-Instruct", 8
COLLECT = CollectArguments(
    rank=RANK,
    lora_alpha=16.0,
    snapshots=5,
    snapshot_every=2,
    learning_rate=1e-3,
    validation_sequences=12,
)
TRAIN = TrainArguments(rank=RANK, lora_alpha=16.0, basis_learning_rate=1e-3, validation_sequences=12)
MULTITASK_RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("t0-output"), help="folder of all results")
    parser.add_argument("--base", default=BASE, help=f"base model (default: {BASE})")
    parser.add_argument("--seen", type=int, default=78, help="tasks that are collected (default: all 78)")
    parser.add_argument("--unseen", type=int, default=17, help="tasks left out (default: all 17)")
    parser.add_argument("--steps", type=int, default=100, help="steps per task's LoRA (default: 100)")
    parser.add_argument("--rows", type=int, default=30, help="test rows scored per task (default: 30)")
    parser.add_argument("--window", type=int, default=384, help="tokens of a sequence (default: 384)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--dtype", default="float32", help="of the base model (default: float32)")
    parser.add_argument(
        "--refine-steps", type=int, default=REFINE_STEPS, help=f"most steps on 16 examples (default: {REFINE_STEPS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is trained (default: 0)")
    options = parser.parse_args()
    seen, unseen = t0_tasks(options.seen, options.unseen)
    sizes = {"sequence_length": options.window, "batch_size": options.batch_size}
    settings = replace(COLLECT, steps=options.steps, seeds=(options.seed,), dtype=options.dtype, **sizes)
    zoo = collect_adapters([*seen, *unseen], options.base, options.output / "zoo", settings)
    known = zoo.select([task.name for task in seen])
    trainer = zoo_factory(known, options.base, Accelerator(), zoo.layout)
    everyone = options.output / f"multi-task-{known.fingerprint()[:12]}.safetensors"
    if not everyone.is_file():
        weights = train_multitask(trainer, seen, seed=options.seed, learning_rate=MULTITASK_RATE)
        save_file({"weights": weights.contiguous()}, everyone)
    multitask, folder = load_file(everyone)["weights"], options.output / "generator"
    if not (folder / "config.json").is_file():
        steps = max(3, options.steps * len(seen) * options.batch_size // 16)  # 16 sequences each
        how = {"sequence_length": options.window, "dtype": options.dtype}
        arguments = replace(TRAIN, seed=options.seed, base_steps=steps, **how)
        train_generator(output_dir=folder, arguments=arguments, tasks=seen, base_model=options.base)
    generator = CVAELoRAGenerator.from_pretrained(folder)
    fingerprint = sha256_file(folder / "model.safetensors")
    refined = partial(from_examples, trainer, options.seed, options.refine_steps)
    methods: dict[str, Callable[[Task], torch.Tensor]] = {
        "original model": lambda task: torch.zeros(zoo.layout.size),
        "multi-task LoRA": lambda task: multitask,
        "the same, refined on 16 examples": partial(refined, lambda states: multitask),
        "generated from text": partial(written, generator),
        "generated from 16 examples": partial(refined, partial(read, generator)),
        "original LoRA": lambda task: zoo.final(task.name, f"seed-{options.seed}"),
    }
    log, table = CellLog(options.output / "cells.jsonl"), Table(title=f"{len(seen)} seen, {len(unseen)} unseen tasks")
    for column in ("method", "seen: loss", "accuracy", "unseen: loss", "accuracy"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, make in methods.items():
        means = []
        for tasks in (seen[:: max(1, len(seen) // len(unseen))], unseen):
            cells = []
            for task in tqdm(tasks, desc=method):
                facts = {
                    "method": method,
                    "task": task.fingerprint(),
                    "zoo": known.fingerprint(),
                    "rows": options.rows,
                    "window": options.window,
                    "refine_steps": options.refine_steps,
                }
                if method.startswith("generated"):
                    facts["generator"] = fingerprint
                score = partial(scored, trainer, make, task, options.rows, options.window)
                cells.append(log.get_or_compute(facts, score))
            means += [mean(cells, "loss"), mean(cells, "accuracy")]
        table.add_row(method, *means)
    console = Console(width=110)
    console.print(table)
    console.print(
        f"loss in nats per token, accuracy as a share; {options.rows} rows per task; {options.steps} steps of "
        f"{options.batch_size} x {options.window} tokens a LoRA, rank {RANK}; {options.refine_steps} steps at most on "
        f"examples; {options.dtype}; seed {options.seed}; {Path(options.base).name}; lora-factory {__version__}, "
        f"torch {torch.__version__}"
    )


@cache
def t0_tasks(seen: int, unseen: int) -> tuple[list[Task], list[Task]]:
    """So many tasks of either kind, spread evenly over the names."""
    files = sorted((shared_folder() / "data" / "t0").glob("*.jsonl.gz"))
    left_out = [file for file in files if file.name.startswith(LEFT_OUT)]
    known = [file for file in files if file not in left_out]
    return spread(known, seen), spread(left_out, unseen)


def spread(files: list[Path], count: int) -> list[Task]:
    """The tasks of ``count`` files, at even distances."""
    return [read_task(files[number * len(files) // count]) for number in range(min(count, len(files)))]


def read_task(file: Path) -> Task:
    """A task described by its name and by what all of its prompts say."""
    rows = [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]
    random.Random(0).shuffle(rows)
    examples = [Example(row["prompt"], row["completion"]) for row in rows]
    name = file.name.split(".")[0]
    prompts = [row["prompt"] for row in rows]
    asks = shared_start(prompts), shared_start([prompt[::-1] for prompt in prompts])[::-1]
    said = [" ".join(text.split()) for text in asks if len(text.split()) > 2]
    answers = {row["completion"] for row in rows}
    few, short = len(answers) <= 5, max(map(len, answers)) <= 120
    test, validation = len(rows) // 5, len(rows) // 10
    return Task.from_examples(
        name,
        [name.replace("_", " "), *said],
        examples[test + validation :],
        examples[test : test + validation],
        examples[:test],
        metric="multiple_choice" if few else "exact_match" if short else None,
        choices=tuple(sorted(answers)) if few else (),
    )


def mean(cells: list[dict], figure: str) -> str:
    """A figure's mean over the cells that have it."""
    values = [cell[figure] for cell in cells if cell[figure] is not None]
    return f"{fmean(values):.3f}" if values else ""


def shared_start(texts: list[str]) -> str:
    """What all texts begin with."""
    return "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    )


def written(generator: CVAELoRAGenerator, task: Task) -> torch.Tensor:
    """What the generator writes for a task's first description."""
    return generator.layout.flatten(generator.generate_state_dict(task.descriptions[0]))


@torch.no_grad()
def read(generator: CVAELoRAGenerator, states: torch.Tensor) -> torch.Tensor:
    """What it writes for some examples' hidden states, ``(n, width)``."""
    return generator.assemble(generator.made({"hidden": generator.task_vector("hidden", states)[None]}, 1))[0]


def from_examples(
    trainer: LoRATrainer, seed: int, steps: int, start: Callable[[torch.Tensor], torch.Tensor], task: Task
) -> torch.Tensor:
    """What a method makes of the states of sixteen of the task's training examples, refined on these examples."""
    source = torch.Generator().manual_seed(seed)
    states, examples = example_features(trainer, [task])[task.name], task.examples("train")
    drawn = torch.randperm(len(states), generator=source)[:16].tolist()
    return refine(trainer, start(states[drawn]), trainer.encode([examples[index] for index in drawn]), steps=steps)


def scored(trainer: LoRATrainer, make: Callable[[Task], torch.Tensor], task: Task, rows: int, window: int) -> dict:
    """Loss on completions and accuracy of one method on one task's test rows."""
    trainer.slot.load(make(task))
    test, options = task.examples("test")[:rows], {"window": window, "batch_size": 4}
    score = score_examples(trainer.model, trainer.tokenizer, test, stride=window // 2, **options)
    accuracy = task_accuracy(trainer.model, trainer.tokenizer, task, max_examples=rows, **options)
    return {"loss": score.loss, "accuracy": accuracy, "name": task.name}


if __name__ == "__main__":
    main()
