"""Score the generator and every baseline and control on the test splits of seen and unseen tasks."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lora_factory.arguments import CompareArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.accuracy import check_metric, task_accuracy
from lora_factory.evaluation.diagnostics import diagnose, points, storage
from lora_factory.evaluation.fold import Fold
from lora_factory.evaluation.methods import ComparedMethods
from lora_factory.evaluation.perplexity import score_task
from lora_factory.reporting.summary import GENERATED
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import check_tasks
from lora_factory.utils.cache import CellLog
from lora_factory.utils.files import write_json
from lora_factory.utils.folders import COMPARISON_FILES, check_reports
from lora_factory.utils.progress import progress_bar
from lora_factory.utils.versions import versions


def compare(
    folds: Fold | Sequence[Fold],
    base_model: str | Path,
    output_dir: str | Path,
    arguments: CompareArguments | None = None,
    *,
    methods: Collection[str] = (),
) -> dict[str, Any]:
    """Score methods on every task of every fold; an interrupted comparison repeats no finished cell.

    A cell is the result of one method on one task with one seed.

    Args:
        folds: Tasks, zoo and generator; several of them to leave out other tasks, or for other seeds.
        base_model: Hub id or folder of the base model.
        output_dir: Folder of the cells, of what had to be trained for the baselines, and of ``comparison.json``.
        arguments: Seeds and sizes.
        methods: Names of the methods to score; diagnostics, storage and points are left out then. Default: all.

    Returns:
        The content of ``comparison.json``: cells, budgets per fold and seed, diagnostics, storage, curves and points,
        for ``report.py``. Storage and points are those of the first fold.

    Raises:
        LoraFactoryError: When a fold is not consistent, the data of a task cannot be used or judged by its metric
            (nothing is scored then), an adapter does not fit the base model, or a name is not that of a method.
    """
    arguments, output_dir = arguments or CompareArguments(), check_reports(output_dir, *COMPARISON_FILES)
    folds = [folds] if isinstance(folds, Fold) else list(folds)
    if not folds:
        raise LoraFactoryError("no fold to compare; pass at least one Fold")
    tasks = {task.name: task for fold in folds for task in (*fold.seen, *fold.unseen)}.values()
    check_tasks(tasks)
    check_tasks(tasks, check_metric)
    log = CellLog(output_dir / "cells.jsonl")
    cells: list[dict[str, Any]] = []
    diagnostics, curves, budgets = [], {}, Counter[str]()
    first: dict[str, Any] = {}
    for fold in folds:
        compared = ComparedMethods(fold, base_model, output_dir, arguments)
        if unknown := sorted(set(methods) - compared.methods.keys()):
            raise LoraFactoryError(f"methods names {unknown}; choose among {', '.join(compared.methods)}")
        names = [name for name in compared.methods if name in methods or not methods]
        cells += _cells(compared, names, log)
        budgets.update({name: tokens for name, tokens in compared.budgets().items() if name in names})
        if not methods and fold.generator.config.zoo_fingerprint is not None:  # others never saw a zoo's weights
            diagnostics.append(diagnose(compared))
        if fold.history:
            curves[f"generator, fold {fold.number}, seed {compared.seeds[0]}"] = [
                {name: value for name, value in row.items() if name != "tokens"} for row in fold.history
            ]
        first = first or {
            "methods": names,
            "storage": [] if methods else storage(compared),
            "points": {} if methods else points(compared),
        }
    comparison = {
        "base_model": folds[0].zoo.layout.base_model,
        "created_with": versions(),
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


def _cells(compared: ComparedMethods, names: Sequence[str], log: CellLog) -> Iterator[dict[str, Any]]:
    """Score the named methods on every task for every seed.

    A cell whose loss is not finite holds the reason instead. It is not written to the log, so that the next
    comparison tries it again.
    """
    fold = compared.fold
    wanted = [(seed, task, method) for seed in compared.seeds for task in fold.tasks for method in names]
    settings = {name: value for name, value in asdict(compared.arguments).items() if name != "seeds"}
    settings["chat_template"] = compared.settings.chat_template
    for seed, task, method in progress_bar(wanted, desc="compare", unit="cells"):
        facts = {
            "fold": fold.number,
            "seed": seed,
            "task": task.name,
            "seen": task not in fold.unseen,
            "method": method,
            "data": task.fingerprint(),
            "metric": [task.metric, *task.choices],
            "zoo": fold.zoo.fingerprint(),
            "rests_on": compared.fingerprint,
            "settings": settings,
            "generator": compared.generator_fingerprint if method.startswith(GENERATED) else None,
        }
        if method in compared.baselines or method.startswith(GENERATED):
            facts["vectors"] = compared.vectors
        try:
            cell = log.get_or_compute(facts, partial(_scored, compared, task, seed, method))
        except ArithmeticError as error:
            warnings.warn(f"{task.name}, {method}, seed {seed}: {error}", stacklevel=2)
            cell = {**facts, "loss": None, "error": str(error)}
        yield cell


def _scored(compared: ComparedMethods, task: Task, seed: int, method: str) -> dict[str, Any]:
    """The figures of one cell.

    Raises:
        ArithmeticError: When the loss is not a finite number.
    """
    trainer, arguments = compared.trainer_of(method), compared.arguments
    trainer.slot.load(compared.methods[method](task, seed))
    options: Any = {"window": arguments.window, "chat_template": compared.settings.chat_template}
    score = score_task(trainer.model, trainer.tokenizer, task, max_tokens=arguments.max_tokens, **options)
    if not math.isfinite(score.loss):
        raise ArithmeticError(f"the loss is {score.loss}")
    accuracy = task_accuracy(trainer.model, trainer.tokenizer, task, max_examples=arguments.max_examples, **options)
    return {**score.to_dict(), "accuracy": accuracy, "error": None}
