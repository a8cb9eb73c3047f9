"""The multi-task LoRA with more tokens: is it the generator, or only what the generator has read beside?

    LORA_FACTORY_SHARED=../shared python benchmarks/budget.py --domains domains-output --folds 0 --times 3

Reads the zoo and the results that `benchmarks/domains.py` made for a seed, trains the multi-task LoRA of each fold for
several times as many steps, and scores it on the same test text. Three times are the tokens of the zoo, of the
multi-task LoRA and of the specialists, which is all that went into a generator. The snapshot that validates best
counts, as always.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from domain_tasks import domain_tasks, folds, shared_folder
from domains import COMPARE, multitask_lora
from rich.console import Console
from rich.table import Table

from lora_factory import AdapterZoo
from lora_factory.evaluation.methods import MULTITASK
from lora_factory.evaluation.perplexity import score_task
from lora_factory.reporting.summary import FROM_EXAMPLES, GENERATED, ORIGINAL_LORA, ORIGINAL_MODEL, headroom
from lora_factory.training.train import zoo_factory
from lora_factory.utils.safe_files import read_json
from lora_factory.utils.versions import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=Path, default=Path("domains-output"), help="output of benchmarks/domains.py")
    parser.add_argument("--folds", default="0", help="which folds (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="which seed (default: 0)")
    parser.add_argument(
        "--times", type=float, default=3.0, help="of the steps of the fold's LoRAs together (default: 3)"
    )
    options = parser.parse_args()
    tasks, base = domain_tasks(), shared_folder() / "models" / "stories260k"
    zoo, cells = AdapterZoo(options.domains / "zoo"), read_json(options.domains / "comparison.json")["cells"]
    table = Table(title="headroom, mean (worst)")
    columns = ("fold", "tasks", MULTITASK, f"{options.times:g} x the tokens", GENERATED, f"{GENERATED}{FROM_EXAMPLES}")
    for column in columns:
        table.add_column(column, justify="left" if column == "tasks" else "right")
    means: dict[str, list[list[float]]] = {"seen": [], "unseen": []}
    for number in map(int, options.folds.split(",")):
        losses = {
            (cell["method"], cell["task"]): cell["loss"]
            for cell in cells
            if (cell["fold"], cell["seed"]) == (number, options.seed)
        }
        seen, unseen = folds(tasks)[number]
        known = zoo.select([task.name for task in seen], [f"seed-{options.seed}"])
        trainer = zoo_factory(known, base, Accelerator(), known.layout.with_rank(COMPARE.multitask_rank))
        trainer.slot.load(multitask_lora(known, base, options.domains, options.seed, seen, options.times))
        for task in (*seen, *unseen):
            window, tokens = COMPARE.window, COMPARE.max_tokens
            score = score_task(trainer.model, trainer.tokenizer, task, window=window, max_tokens=tokens)
            losses["longer", task.name] = score.loss
        for group, rows in (("seen", seen), ("unseen", unseen)):
            figures, of_fold = [], []
            for method in (MULTITASK, "longer", GENERATED, f"{GENERATED}{FROM_EXAMPLES}"):
                shares = [
                    headroom(*(losses[name, task.name] for name in (ORIGINAL_MODEL, method, ORIGINAL_LORA)))
                    for task in rows
                ]
                of_fold.append(fmean(shares))
                figures.append(f"{fmean(shares):.3f} ({min(shares):.3f})")
            means[group].append(of_fold)
            table.add_row(str(number), group, *figures)
    for group, of_folds in means.items():
        table.add_row("mean", group, *(f"{fmean(column):.3f}" for column in zip(*of_folds, strict=True)))
    console = Console(width=120)
    console.print(table)
    console.print(json.dumps({"seed": options.seed, "threads": torch.get_num_threads(), **versions()}))


if __name__ == "__main__":
    main()
