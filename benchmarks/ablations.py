"""Tables 4 and 5 of the paper on text: LoRA rank, depth of the convolutional CVAE, and the paper's recipe beside ours.

    LORA_FACTORY_SHARED=../shared python benchmarks/ablations.py --output ablations-output

Seven domains on the 260 K Llama, 200 steps each, text conditions, stage 1 alone: all that the paper's recipe has.
Headroom is that of the generated adapters on held-out text: 0 is the base model, 1 the domain's own LoRA. Every run is
kept in the output folder; the same command continues after an interruption.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from domain_tasks import domain_tasks, shared_folder
from rich.console import Console
from rich.table import Table

from lora_factory import AdapterZoo, CVAELoRAGenerator, TrainArguments, __version__, train_generator
from lora_factory.adapters import AdapterSlot, attach_adapter
from lora_factory.arguments import CollectArguments
from lora_factory.base_models import load_base_model
from lora_factory.baselines import uniform_soup
from lora_factory.cells import CellLog
from lora_factory.collect import collect_adapters
from lora_factory.evaluation import headroom, score_examples
from lora_factory.files import write_json

RANKS, DEPTHS = (1, 2, 4, 8), (10, 12, 14, 16, 18, 20)
COLLECT = CollectArguments(steps=200, snapshots=20, learning_rate=1e-2, validation_sequences=16, dtype="float32")
TOKEN, CONV = TrainArguments(steps=300, width=192), TrainArguments(decoder="conv1d", steps=600)
TOKENS = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("ablations-output"), help="folder of all results")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generators (default: 0)")
    options = parser.parse_args()
    tasks, base = domain_tasks()[::2], shared_folder() / "models" / "stories260k"
    log, rows = CellLog(options.output / "cells.jsonl"), []
    zoos = {
        rank: collect_adapters(
            tasks, base, options.output / f"zoo-{rank}", replace(COLLECT, rank=rank, lora_alpha=2.0 * rank)
        )
        for rank in RANKS
    }
    runs = [("rank", rank, zoos[rank], TOKEN) for rank in RANKS]
    runs += [("conv depth", depth, zoos[4], replace(CONV, conv_depth=depth)) for depth in DEPTHS]
    for parameter, value, zoo, settings in runs:
        settings = replace(settings, seed=options.seed)
        facts = {"parameter": parameter, "value": value, "zoo": zoo.fingerprint(), "settings": vars(settings)}
        cell = log.get_or_compute(facts, partial(measure, zoo, settings, tasks, base, options.output / "generator"))
        for method in ("generated", "uniform soup"):
            rows += [
                {"parameter": parameter, "value": value, "method": method, "task": task, "headroom": share}
                for task, share in cell[method].items()
            ]
        rows[-1]["seconds"] = cell["seconds"]
    write_json(options.output / "ablations.json", {"ablations": rows})
    table = Table(title=f"{len(tasks)} domains, {TOKENS} tokens each, seed {options.seed}")
    for column in ("parameter", "value", "generated, mean", "worst", "uniform soup, mean", "seconds to train"):
        table.add_column(column, justify="left" if column == "parameter" else "right")
    for parameter, value, *_ in runs:
        of = {
            method: [
                row["headroom"]
                for row in rows
                if (row["parameter"], row["value"], row["method"]) == (parameter, value, method)
            ]
            for method in ("generated", "uniform soup")
        }
        seconds = next(
            row["seconds"]
            for row in rows
            if "seconds" in row and row["value"] == value and row["parameter"] == parameter
        )
        figures = (fmean(of["generated"]), min(of["generated"]), fmean(of["uniform soup"]))
        table.add_row(parameter, str(value), *(f"{figure:.3f}" for figure in figures), f"{seconds:.0f}")
    Console(width=120).print(table)
    Console().print(f"lora-factory {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


def measure(zoo: AdapterZoo, settings: TrainArguments, tasks: list, base: Path, folder: Path) -> dict:
    """Train a generator and score what it writes for every task's first description."""
    start = time.perf_counter()
    train_generator(zoo, folder, settings)
    seconds = time.perf_counter() - start
    generator = CVAELoRAGenerator.from_pretrained(folder)
    model, tokenizer = load_base_model(base)
    zeros = zoo.layout.unflatten(torch.zeros(zoo.layout.size))
    slot = AdapterSlot(attach_adapter(model, zoo.layout, zeros), zoo.layout)
    soup = uniform_soup({task.name: zoo.snapshots(task.name) for task in tasks})
    shares: dict = {"generated": {}, "uniform soup": {}, "seconds": seconds}
    for task in tasks:
        adapters = {
            "base": zeros,
            "original": zoo.final(task.name, zoo.runs(task.name)[0]),
            "generated": generator.generate_state_dict(task.descriptions[0]),
            "uniform soup": soup,
        }
        losses = {}
        for name, adapter in adapters.items():
            slot.load(adapter)
            score = score_examples(
                slot.model, tokenizer, task.examples("test"), window=256, stride=192, max_tokens=TOKENS
            )
            losses[name] = score.loss
        for name in ("generated", "uniform soup"):
            shares[name][task.name] = headroom(losses["base"], losses[name], losses["original"])
    return shares


if __name__ == "__main__":
    main()
