"""What rank, form of the cores, number of tasks, and the paper's depth change: on the grid and on the digits.

    LORA_FACTORY_SHARED=../shared python benchmarks/ablations.py --fold 1
    python benchmarks/ablations.py --digits digits-output  # depths of conv1d, on the zoo that digits.py has made

Every row on the grid trains a generator and a multi-task LoRA as grid.py does; its tables are printed on the way. The
slope is how the loss of unseen combinations, written from a held-out paraphrase, less that of the multi-task LoRA of
the same tasks, changes with every doubling of the number of tasks.
"""

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import linear_regression, mean

import digits
import grid
from accelerate import Accelerator
from digits_study import Study, _generated

from lora_factory import AdapterZoo, train_generator
from lora_factory.arguments import TrainArguments
from lora_factory.collection.trainer import classifier_trainer
from lora_factory.utils.versions import versions

RUNS = {  # all other options are those of grid.py
    "rank 16, full cores, all cells": {},
    "rank 4": {"rank": 4},
    "rank 8": {"rank": 8},
    "diagonal cores": {"core": "diagonal"},
    "25 cells": {"tasks": 25},
    "50 cells": {"tasks": 50},
}
SIZES = ("25 cells", "50 cells", "rank 16, full cores, all cells")
DEPTHS = (10, 12, 14, 16, 18, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fold", choices=grid.FOLDS, default="1")
    parser.add_argument("--steps", type=int, default=2250, help="training steps of each row on the grid")
    parser.add_argument("--test-sequences", type=int, default=16, help="test sequences per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=Path, help="output folder of digits.py: depths of conv1d on its zoo instead")
    parser.add_argument("--unseen", type=int, default=32, help="unseen sets of digits (default: 32)")
    parser.add_argument("--conv-steps", type=int, default=1000, help="training steps of conv1d (default: 1000)")
    options = parser.parse_args()
    if options.digits:
        conv_depths(options)
    else:
        on_the_grid(options)


def on_the_grid(options: argparse.Namespace) -> None:
    shared = [f"--{name}={vars(options)[name]}" for name in ("fold", "steps", "seed")]
    shared.append(f"--test-sequences={options.test_sequences}")
    found, counts = {}, {}
    for name, changes in RUNS.items():
        print(f"\n{name}")
        found[name] = grid.run(grid.read_options([*shared, *(f"--{key}={value}" for key, value in changes.items())]))
        counts[name] = changes.get("tasks") or len(seen_cells(options.fold))
    gains = {
        name: {group: rows["held-out paraphrase"][group] - loss for group, loss in rows["multi-task LoRA"].items()}
        for name, rows in found.items()
    }
    groups = list(gains[SIZES[0]])
    print("\nLoss from a held-out paraphrase less that of the multi-task LoRA, nats per token\n")
    print("| row | cells | " + " | ".join(groups) + " |\n|" + " --- |" * (2 + len(groups)))
    for name, by_group in gains.items():
        shown = " | ".join(f"{by_group[group]:+.3f}" for group in groups)
        print(f"| {name} | {counts[name]} | {shown} |")
    doublings = [math.log2(counts[name]) for name in SIZES]
    slope = linear_regression(doublings, [gains[name]["combination"] for name in SIZES]).slope
    print(f"\nslope on unseen combinations: {slope:+.4f} nats per token with every doubling of the cells")
    print(f"fold {options.fold}, seed {options.seed}, {options.steps} steps", versions())


def seen_cells(fold: str) -> list[str]:
    return grid.split_cells(sorted(path.name for path in (grid.SHARED / "data" / "grid").iterdir()), fold)["seen"]


def conv_depths(options: argparse.Namespace) -> None:
    """Accuracies of the paper's network from a sentence; 12 layers are the default."""
    folder, all_runs = options.digits, AdapterZoo(options.digits / "zoo")
    trainer = classifier_trainer(folder / "base", digits.COLLECT, digits.BASE_NAME, Accelerator())
    tasks = digits.digit_tasks(len(all_runs.tasks))
    seen, unseen = tasks[: -options.unseen], tasks[-options.unseen :]
    study = Study(trainer, seen, unseen, all_runs, folder)
    images = {task.name: task.images() for task in tasks}
    arguments = TrainArguments(decoder="conv1d", steps=options.conv_steps, seed=options.seed)
    print("| layers | seen | unseen | lowest unseen |\n|" + " --- |" * 4)
    for depth in DEPTHS:
        generator = train_generator(
            study.zoo,
            folder / f"conv1d-{depth}",
            replace(arguments, conv_depth=depth),
            images={task.name: images[task.name] for task in seen},
            base_model=folder / "base",
            overwrite=True,
        )
        make = partial(_generated, generator, study.conditions(generator, images)["text"])
        known, new = (study.accuracies(make, group).tolist() for group in (seen[: len(unseen)], unseen))
        print(f"| {depth} | {mean(known):.4f} | {mean(new):.4f} | {min(new):.4f} |", flush=True)
    print(
        f"{len(seen)} seen and {len(unseen)} unseen sets, {options.conv_steps} steps, seed {options.seed}", versions()
    )


if __name__ == "__main__":
    main()
