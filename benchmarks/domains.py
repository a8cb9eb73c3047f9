"""The standing benchmark: thirteen real text domains on a 260 K Llama, every method, seen and unseen domains.

    LORA_FACTORY_SHARED=../shared python benchmarks/domains.py --output domains-output

Rank 4 on all linear layers. Every domain's own LoRA is trained for 500 steps of 8 x 128 tokens at a learning rate of
1e-2: at 3e-3 the validation loss stops falling after 600 steps, above what this reaches (tried on two domains). Four
folds leave three or four domains out of everything; every seed has LoRAs, generator and baselines of its own. All of
it is kept in the output folder, so that the same command continues after an interruption, and folds can be given to
several processes.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from domain_tasks import domain_tasks, folds, shared_folder
from rich.console import Console
from rich.table import Table

from lora_factory import AdapterZoo, CVAELoRAGenerator, train_generator
from lora_factory.arguments import CollectArguments, CompareArguments, TrainArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.evaluation.comparison import compare
from lora_factory.evaluation.fold import Fold
from lora_factory.evaluation.methods import MULTITASK
from lora_factory.reporting.report import terminal_tables, write_report
from lora_factory.reporting.summary import FROM_EXAMPLES, GENERATED, summarise
from lora_factory.training.train import training_history

COLLECT = CollectArguments(
    rank=4,
    lora_alpha=8.0,
    steps=500,
    snapshots=10,
    snapshot_every=5,
    learning_rate=1e-2,
    validation_sequences=64,
    dtype="float32",
)
# The rank and learning rate that suit the multi-task LoRA best of 4 and 16, 5e-3 and 1e-2 (first fold, 2,500 steps).
COMPARE = CompareArguments(max_tokens=4000, multitask_rank=16, multitask_learning_rate=5e-3)
# Trained on the examples alone, with as many tokens as the multi-task LoRA: 16 sequences a step instead of 8.
TRAIN = TrainArguments(rank=16, lora_alpha=32.0, validation_sequences=64, dtype="float32")

SHOWN = (MULTITASK, GENERATED, f"{GENERATED}{FROM_EXAMPLES}", f"{MULTITASK}, refined")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("domains-output"), help="folder of all results")
    parser.add_argument("--folds", default="0,1,2,3", help="which folds (default: 0,1,2,3)")
    parser.add_argument("--seeds", default="0,1", help="which seeds (default: 0,1)")
    options = parser.parse_args()
    tasks, base = domain_tasks(), shared_folder() / "models" / "stories260k"
    seeds = tuple(map(int, options.seeds.split(",")))
    settings = replace(COLLECT, seeds=seeds)
    zoo = collect_adapters(tasks, base, options.output / "zoo", settings, base_model_name="stories260k")
    wanted = [(number, seed, *folds(tasks)[number]) for seed in seeds for number in map(int, options.folds.split(","))]
    comparison = compare(
        [make_fold(zoo, base, options.output, *entry) for entry in wanted], base, options.output, COMPARE
    )
    console = Console(width=140)
    for table in terminal_tables(comparison, console.width):
        console.print(table)
    console.print(fold_table(comparison))
    console.print(json.dumps({"seeds": seeds, "threads": torch.get_num_threads(), **comparison["created_with"]}))
    console.print(f"wrote {write_report(comparison, options.output)}")


def fold_table(comparison: dict) -> Table:
    """Mean headroom by fold of the generator and of the control that it must beat: the means can hide a fold."""
    table = Table(title="headroom by fold, seen / unseen, mean over seeds")
    table.add_column("fold")
    for method in SHOWN:
        table.add_column(method, justify="right")
    for fold in sorted({cell["fold"] for cell in comparison["cells"]}):
        cells = [cell for cell in comparison["cells"] if cell["fold"] == fold]
        groups = {row.method: row.groups for row in summarise(comparison | {"cells": cells})}
        means = [[f"{groups[method][part].headroom.mean:.3f}" for part in ("seen", "unseen")] for method in SHOWN]
        table.add_row(str(fold), *(" / ".join(pair) for pair in means))
    return table


def make_fold(zoo: AdapterZoo, base: Path, output: Path, number: int, seed: int, seen: tuple, unseen: tuple) -> Fold:
    """A fold with the generator of its seen tasks, trained once."""
    run = [f"seed-{seed}"]
    known = zoo.select([task.name for task in seen], run)
    folder = output / f"generator-{number}-{seed}"
    if not (folder / "config.json").is_file():
        arguments = replace(TRAIN, seed=seed, base_steps=COLLECT.steps * len(seen) * COLLECT.batch_size // 16)
        train_generator(
            output_dir=folder, arguments=arguments, tasks=seen, base_model=base, base_model_name="stories260k"
        )
    generator = CVAELoRAGenerator.from_pretrained(folder)
    originals = zoo.select([task.name for task in unseen], run)
    return Fold(
        seen, unseen, known, originals, generator, number=number, seeds=(seed,), history=training_history(folder)
    )


if __name__ == "__main__":
    main()
