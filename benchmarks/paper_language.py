"""The paper's second experiment: adapters for Llama-3-8B on five subsets of the Pile, generated from descriptions.

    python benchmarks/paper_language.py            # from the Hub, on a GPU, with access to Llama 3
    python benchmarks/paper_language.py --smoke    # the same code offline, on a random tiny Llama

From the paper: rank 2, 150 epochs with the last 50 kept, the 12-layer 1-D CNN with its loss (KL weight 0.005),
2,000 epochs of the generator, CLIP's text encoder. Its "Books" (Books3) is no longer given out; court opinions stand
in for it. Not in the paper, and chosen here: adapted modules, learning rate, batch size, alpha, characters a subset.
"""

import argparse
import itertools
import json
from pathlib import Path

import datasets
from accelerate import Accelerator
from paper_recipe import GENERATOR_EPOCHS, SMOKE_REMARK, TEXT_ENCODER, paper_generator, paper_methods
from tiny_models import tiny_llama, tiny_text_encoder

from lora_factory import CollectArguments, Task, collect_adapters, train_generator
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.evaluation.perplexity import score_task
from lora_factory.models.loading import load_base_model
from lora_factory.reporting.report import markdown_table
from lora_factory.reporting.tables import Column, Table
from lora_factory.utils.files import write_json

BASE_MODEL = "meta-llama/Meta-Llama-3-8B"
DATA_SET = "monology/pile-uncopyrighted"
SUBSETS = {  # by their names in the Pile
    "ArXiv": ("arxiv", "Continue a scientific article in LaTeX.", "Mathematics and physics papers from arXiv."),
    "FreeLaw": ("law", "Continue a court opinion.", "Legal opinions of American courts."),
    "Ubuntu IRC": ("ubuntu", "Chat in the Ubuntu support channel.", "Logs of an IRC channel about Linux."),
    "Wikipedia (en)": ("wikipedia", "Write an article of an encyclopedia.", "Articles of the English Wikipedia."),
    "Gutenberg (PG-19)": ("gutenberg", "Continue an old novel.", "Books of Project Gutenberg from before 1919."),
}
CHARACTERS = 500_000  # a subset, of which four fifths are learned
COLLECT = CollectArguments(
    rank=2,
    lora_alpha=4.0,
    target_modules="q_proj,v_proj",
    epochs=150,
    snapshots=50,
    batch_size=8,
    sequence_length=512,
    learning_rate=2e-4,
    dtype="bfloat16",
)
SMOKE = CollectArguments(
    rank=2,
    lora_alpha=4.0,
    epochs=3,
    snapshots=2,
    batch_size=4,
    sequence_length=32,
    learning_rate=3e-2,
    dtype="float32",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("language-output"), help="folder of all results")
    parser.add_argument("--smoke", action="store_true", help="seconds, offline: a random tiny Llama, made-up texts")
    options = parser.parse_args()
    base, text_encoder, collect, epochs = BASE_MODEL, TEXT_ENCODER, COLLECT, GENERATOR_EPOCHS
    if options.smoke:
        texts = made_up_texts()
        words = [text for subset in texts.values() for text in subset[:5]]
        base = str(tiny_llama(options.output / "models" / "llama", words))
        text_encoder = str(tiny_text_encoder(options.output / "models" / "text-encoder", words))
        collect, epochs = SMOKE, 3
    else:
        texts = pile_texts()
    tasks = [subset_task(name, pieces) for name, pieces in texts.items()]

    zoo = collect_adapters(tasks, base, options.output / "zoo", collect, base_model_name=BASE_MODEL)
    train = paper_generator(zoo, epochs, text_encoder)
    generator = train_generator(zoo, options.output / "generator", train, overwrite=True)

    accelerator = Accelerator()
    model, tokenizer = load_base_model(base, dtype=collect.dtype, device=accelerator.device)
    trainer = LoRATrainer.attach(model, tokenizer, collect, BASE_MODEL, accelerator)
    methods = paper_methods(zoo, generator, tasks, accelerator.device, options.smoke)
    cells = {}
    for (method, adapters), task in itertools.product(methods.items(), tasks):
        weights, length = adapters[task.name], collect.sequence_length
        trainer.slot.load(trainer.initial if weights is None else weights)  # which adds nothing, or the adapter
        cells[method, task.name] = score_task(trainer.model, tokenizer, task, window=length)
    write_json(
        options.output / "language.json",
        [{"method": method, "task": task} | score.to_dict() for (method, task), score in cells.items()],
    )
    table = language_table(list(methods), tasks, cells, SMOKE_REMARK if options.smoke else "")
    print(f"{markdown_table(table)}\n\n{table.note}")
    record = zoo.record(zoo.tasks[0], "seed-0")
    print(json.dumps({"seed": record.seed, **record.versions}))


def subset_task(subset: str, pieces: list[str]) -> Task:
    """Four fifths to learn, a tenth each to choose and to test."""
    name, *descriptions = SUBSETS[subset]
    tenth = max(1, len(pieces) // 10)
    return Task.from_examples(name, descriptions, pieces[2 * tenth :], pieces[:tenth], pieces[tenth : 2 * tenth])


def pile_texts() -> dict[str, list[str]]:
    """The first texts of every subset, in pieces of 2,000 characters; reads the data set until all have enough."""
    pieces: dict[str, list[str]] = {name: [] for name in SUBSETS}
    wanted = CHARACTERS // 2000
    for row in datasets.load_dataset(DATA_SET, split="train", streaming=True):
        found = pieces.get(row["meta"]["pile_set_name"])
        if found is not None and len(found) < wanted:
            found += [row["text"][start : start + 2000] for start in range(0, len(row["text"]), 2000)]
        if all(len(found) >= wanted for found in pieces.values()):
            break
    return {name: found[:wanted] for name, found in pieces.items()}


def made_up_texts() -> dict[str, list[str]]:
    """Two subsets of sentences that a tiny model can tell apart."""
    formula = [f"Let $x_{n}$ be a number such that $x_{n} > {n}$. Then the theorem follows." for n in range(30)]
    chat = [f"<user{n}> hello, my wifi does not work since update {n}, any idea?" for n in range(30)]
    return {"ArXiv": formula, "Ubuntu IRC": chat}


def language_table(methods: list[str], tasks: list[Task], cells: dict, remark: str) -> Table:
    """Table 2's layout: perplexity and bits per character of every method and subset."""
    columns = [Column("method"), *(Column(name, task.name) for task in tasks for name in ("PPL", "BPC"))]
    rows = []
    for method in methods:
        scores = [cells[method, task.name] for task in tasks]
        figures = [f"{figure:.3f}" for score in scores for figure in (score.perplexity, score.bits_per_character)]
        rows.append((method, *figures))
    note = f"Perplexity and bits per character of the test split; lower is better. {remark}".strip()
    return Table("Language modelling", note, tuple(columns), tuple(rows))


if __name__ == "__main__":
    main()
