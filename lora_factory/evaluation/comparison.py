"""The generator beside everything it must beat: tasks, methods and seeds on the same held-out text, in one slot."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lora_factory._version import __version__
from lora_factory.arguments import CompareArguments
from lora_factory.collection.trainer import AdapterFactory
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.accuracy import task_accuracy
from lora_factory.evaluation.fold import Fold
from lora_factory.evaluation.methods import Contenders
from lora_factory.evaluation.perplexity import TextScore, score_examples
from lora_factory.reporting.summary import GENERATED
from lora_factory.tasks.task import Task
from lora_factory.utils.cache import CellLog
from lora_factory.utils.files import write_json
from lora_factory.utils.folders import COMPARISON_FILES, check_reports
from lora_factory.utils.versions import LIBRARIES


def compare(
    folds: Fold | Sequence[Fold],
    base_model: str | Path,
    output_dir: str | Path,
    arguments: CompareArguments | None = None,
) -> dict[str, Any]:
    """Score every method on every task of every fold; an interrupted comparison repeats no finished cell.

    Args:
        folds: Tasks, zoo and generator; several of them to leave out other tasks, or for other seeds.
        base_model: Hub id or folder of the base model.
        output_dir: Folder of the cells, of what had to be trained for the baselines, and of ``comparison.json``.
        arguments: Seeds and sizes.

    Returns:
        What ``comparison.json`` says: cells, budgets (a fold and seed), diagnostics, storage, curves and points, see
        ``report.py``. Storage and points are those of the first fold.

    Raises:
        LoraFactoryError: When a fold does not hold together, or an adapter does not fit the base model.
    """
    arguments, output_dir = arguments or CompareArguments(), check_reports(output_dir, *COMPARISON_FILES)
    folds = [folds] if isinstance(folds, Fold) else list(folds)
    if not folds:
        raise LoraFactoryError("no fold to compare; pass at least one Fold")
    log = CellLog(output_dir / "cells.jsonl")
    cells: list[dict[str, Any]] = []
    diagnostics, curves, budgets = [], {}, Counter[str]()
    first: dict[str, Any] = {}
    for fold in folds:
        contenders = Contenders(fold, base_model, output_dir, arguments)
        cells += _cells(fold, contenders, arguments, log)
        diagnostics.append(contenders.diagnostics())
        budgets.update(contenders.budgets())
        if fold.history:
            curves[f"generator, fold {fold.number}, seed {contenders.seeds[0]}"] = [
                {name: value for name, value in row.items() if name != "tokens"} for row in fold.history
            ]
        first = first or {
            "methods": list(contenders.methods),
            "storage": contenders.storage(),
            "points": contenders.points(),
        }
    comparison = {
        "base_model": folds[0].zoo.layout.base_model,
        "created_with": {"lora-factory": __version__, **{name: version(name) for name in LIBRARIES}},
        "seeds": sorted({cell["seed"] for cell in cells}),
        "folds": [list(names) for names in dict.fromkeys(tuple(task.name for task in fold.unseen) for fold in folds)],
        "settings": asdict(arguments),
        "cells": cells,
        "budgets": {name: tokens // len(folds) for name, tokens in budgets.items()},
        "diagnostics": diagnostics,
        "curves": curves,
        **first,
    }
    check_reports(output_dir, "comparison.json")
    write_json(output_dir / "comparison.json", comparison)
    return comparison


def _cells(fold: Fold, contenders: Contenders, arguments: CompareArguments, log: CellLog) -> Iterator[dict[str, Any]]:
    """Every method on every task for every seed.

    A cell whose metric is not a number says so; it is not kept, and so tried again by the next comparison.
    """
    wanted = [
        (seed, task, method)
        for seed in contenders.seeds
        for task in (*fold.seen, *fold.unseen)
        for method in contenders.methods
    ]
    settings = {name: value for name, value in asdict(arguments).items() if name != "seeds"}
    if contenders.settings.chat_template:  # only then, so that other cells stay those of earlier comparisons
        settings["chat_template"] = True
    for seed, task, method in tqdm(wanted, desc="compare", unit="cell"):
        facts = {
            "fold": fold.number,
            "seed": seed,
            "task": task.name,
            "seen": task not in fold.unseen,
            "method": method,
            "data": task.fingerprint(),
            "metric": [task.metric, *task.choices],
            "zoo": fold.zoo.fingerprint(),
            "settings": settings,
            "generator": contenders.generator_fingerprint if method.startswith(GENERATED) else None,
        }
        try:
            cell = log.get_or_compute(facts, partial(_scored, contenders, task, seed, method, arguments))
        except ArithmeticError as error:
            warnings.warn(f"{task.name}, {method}, seed {seed}: {error}", stacklevel=2)
            cell = {**facts, "loss": None, "error": str(error)}
        yield cell


def score_task(
    factory: AdapterFactory, task: Task, arguments: CompareArguments, *, chat_template: bool = False
) -> TextScore:
    """How well the adapter in a factory's slot predicts a task's test split, as every cell of a comparison has it."""
    return score_examples(
        factory.model,
        factory.tokenizer,
        task.examples("test"),
        window=arguments.window,
        stride=arguments.window * 3 // 4,
        max_tokens=arguments.max_tokens,
        chat_template=chat_template,
    )


def _scored(contenders: Contenders, task: Task, seed: int, method: str, arguments: CompareArguments) -> dict[str, Any]:
    """The figures of one cell.

    Raises:
        ArithmeticError: When the loss is not a finite number.
    """
    factory = contenders.factory_of(method)
    factory.slot.load(contenders.methods[method](task, seed))
    score = score_task(factory, task, arguments, chat_template=contenders.settings.chat_template)
    if not math.isfinite(score.loss):
        raise ArithmeticError(f"the loss is {score.loss}")
    accuracy = task_accuracy(
        factory.model,
        factory.tokenizer,
        task,
        max_examples=arguments.max_examples,
        window=arguments.window,
        chat_template=contenders.settings.chat_template,
    )
    return {**score.to_dict(), "accuracy": accuracy, "error": None}
