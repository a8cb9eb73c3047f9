"""Functions on lists from their descriptions: inputs are alike, answers are not, so that only a condition tells them.

    LORA_FACTORY_SHARED=../shared python benchmarks/instructions.py --fold 0
    LORA_FACTORY_SHARED=../shared python benchmarks/instructions.py --functions 40 --steps 60 --test-rows 2 --scored 8

The 200 functions of BIG-bench's list_functions on SmolLM2-135M-Instruct. A fold leaves a fifth of the descriptions
out, with all functions that share them. A generator and two multi-task LoRAs, one of which reads the description in
the prompt, take the same number of steps with the same number of examples, 16 a step. The table gives the mean over
functions of exact match and of the loss in nats per token of the answer. The second command is for two cores.
"""

import argparse
import gzip
import json
import os
import random
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_factory.arguments import CollectArguments, TrainArguments
from lora_factory.collection.trainer import open_trainer
from lora_factory.evaluation.accuracy import completion_accuracy
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.embedded import EMBEDDED_BASE_MODEL, embedded_base_model
from lora_factory.models.losses import query_loss
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.training.train import train_generator
from lora_factory.utils.versions import versions

FILE = Path(os.environ.get("LORA_FACTORY_SHARED", "../shared")) / "data" / "instructions" / "tasks.jsonl.gz"
FAMILY, FOLDS = "bigbench/list_functions", 5
VALIDATION, TEST = 2, 8  # of the 32 rows of a function
LENGTH = 128  # tokens of an example at most; the longest has 124, with its description


def read_functions(count: int) -> list[Task]:
    """So many functions of the family, spread evenly, their rows as they come."""
    with gzip.open(FILE, "rt", encoding="utf-8") as file:
        next(file)  # the canary
        rows = [row for row in map(json.loads, file) if row["family"] == FAMILY]
    return [read_function(rows[i * len(rows) // count]) for i in range(min(count, len(rows)))]


def read_function(row: dict) -> Task:
    answers = {one["prompt"]: one["completion"] for one in row["examples"]}  # an input that comes twice counts once
    examples = [Example(f"{given} ->", f" {answer}") for given, answer in answers.items()]
    test, rest = examples[:TEST], examples[TEST:]
    name = row["name"].rpartition("/")[2]
    return Task.from_examples(name, row["descriptions"], rest[VALIDATION:], rest[:VALIDATION], test)


def described(task: Task) -> Task:
    """The function with its description before every prompt."""
    splits = {
        split: [Example(f"{task.descriptions[0]}: {one.prompt}", one.completion) for one in task.examples(split)]
        for split in ("train", "validation", "test")
    }
    return Task.from_examples(task.name, task.descriptions, **splits)


def with_examples(task: Task, count: int) -> Task:
    """The function with some of its training examples before every test prompt."""
    shown = "".join(f"{one.prompt}{one.completion}\n" for one in task.examples("train")[:count])
    test = [Example(shown + one.prompt, one.completion) for one in task.examples("test")]
    return Task.from_examples(task.name, task.descriptions, task.examples("train"), test=test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fold", type=int, choices=range(FOLDS), default=0)
    parser.add_argument("--functions", type=int, default=200, help="of the family, seen and unseen (default: all 200)")
    parser.add_argument("--steps", type=int, default=2250, help="training steps of each row (default: 2250)")
    parser.add_argument("--scored", type=int, default=40, help="functions scored of either kind (default: 40)")
    parser.add_argument("--test-rows", type=int, default=TEST, help=f"test rows per function (default: {TEST})")
    parser.add_argument("--shots", type=int, default=8, help="examples in the prompt (default: 8)")
    parser.add_argument("--dtype", default="auto", help="of the base model (default: that of its files, bfloat16)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not FILE.is_file():
        raise SystemExit(f"{FILE} is not there; set LORA_FACTORY_SHARED to the folder of shared data")
    tasks, start, base = read_functions(options.functions), time.perf_counter(), embedded_base_model()
    texts = sorted({task.descriptions[0] for task in tasks})
    left_out = set(random.Random(0).sample(texts, len(texts))[options.fold :: FOLDS])
    seen = [task for task in tasks if task.descriptions[0] not in left_out]
    unseen = [task for task in tasks if task.descriptions[0] in left_out]
    arguments = TrainArguments(
        base_steps=options.steps, seed=options.seed, packing=False, sequence_length=LENGTH, dtype=options.dtype
    )
    alone = replace(arguments, multitask_steps=options.steps)
    with tempfile.TemporaryDirectory() as folder:
        train = partial(train_generator, base_model=base, base_model_name=EMBEDDED_BASE_MODEL)
        made = train(output_dir=f"{folder}/g", arguments=arguments, tasks=seen)
        plain = train(output_dir=f"{folder}/m", arguments=alone, tasks=seen)
        told = train(output_dir=f"{folder}/t", arguments=alone, tasks=[described(task) for task in seen])
    minutes = (time.perf_counter() - start) / 60
    settings = CollectArguments(
        rank=arguments.rank or made.layout.modules[0].rank,
        lora_alpha=arguments.lora_alpha,
        packing=False,
        sequence_length=1024,
        dtype=options.dtype,
    )
    trainer = open_trainer(base, settings, Accelerator(), base_model_name=EMBEDDED_BASE_MODEL)

    def score(generator: CVAELoRAGenerator, core: Tensor, task: Task) -> tuple[float, float]:
        """Exact match and loss of one function's test rows with the adapter of a core."""
        assert generator.basis is not None
        rows = task.examples("test")[: options.test_rows]

        def adapted(_: slice) -> AbstractContextManager[None]:
            return generator.basis.in_batch(trainer.model, core[None])

        with torch.no_grad(), trainer.slot.disabled():
            loss = query_loss(trainer, adapted, [trainer.encode(rows)])
            with adapted(slice(None)):
                right = completion_accuracy(trainer.model, trainer.tokenizer, rows, window=settings.sequence_length)
        return right, float(loss)

    @torch.no_grad()
    def core_of(task: Task) -> Tensor:
        return made.cores({"text": made.text_encoder.encode([task.descriptions[0]])}, 1)[0]

    def another(task: Task) -> Task:
        rest = [one for one in seen if one.descriptions[0] != task.descriptions[0]]
        return random.Random(f"{options.seed} {task.name}").choice(rest)

    shots = f"{options.shots} examples in the prompt"
    rows = {
        "base model": lambda task: score(plain, torch.zeros_like(plain.center), task),
        "multi-task LoRA": lambda task: score(plain, plain.center, task),
        f"multi-task LoRA, {shots}": lambda task: score(plain, plain.center, with_examples(task, options.shots)),
        "multi-task LoRA, description in the prompt": lambda task: score(told, told.center, described(task)),
        "generator, no condition": lambda task: score(made, made.center, task),
        "generator, description": lambda task: score(made, core_of(task), task),
        "generator, another function's description": lambda task: score(made, core_of(another(task)), task),
    }
    choose = random.Random(options.seed).sample
    groups = [choose(group, min(options.scored, len(group))) for group in (unseen, seen)]
    tokens = sum(len(row.tokens) for task in seen for row in trainer.encode(task.examples("train")))
    print(
        f"fold {options.fold}, seed {options.seed}: {len(seen)} seen and {len(unseen)} unseen functions, "
        f"{len(groups[1])} and {len(groups[0])} scored on {options.test_rows} rows each; {options.steps} steps of 16 "
        f"examples, rank {settings.rank}, {options.dtype}; {tokens:,} tokens of training examples; "
        f"{minutes:.0f} minutes of training, {torch.get_num_threads()} thread(s)"
    )
    print(made.training_record["history"][-1], versions())
    print("| row | unseen: exact match | loss | seen: exact match | loss |\n|" + " --- |" * 5)
    for name, scored in rows.items():
        found = [[mean(column) for column in zip(*map(scored, group), strict=True)] for group in groups]
        print(f"| {name} | " + " | ".join(f"{right:.3f} | {loss:.3f}" for right, loss in found) + " |", flush=True)


if __name__ == "__main__":
    main()
