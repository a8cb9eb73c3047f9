"""The tables of a comparison as data, for Markdown, terminal and HTML."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from typing import Any, NamedTuple

from lora_factory.reporting.summary import (
    GROUPS,
    NEEDED_MARGIN,
    ORIGINALS,
    OURS,
    Interval,
    MethodSummary,
    by_headroom,
    failed_cells,
    format_number,
    method_names,
    steering_margins,
    summarise,
)
from lora_factory.utils.printable import printable

_METRICS = (  # heading, key in a cell, digits, how the best is chosen, note
    ("PPL", "perplexity", 2, min, "PPL: perplexity per token, lower is better."),
    ("BPC", "bits_per_character", 3, min, "BPC: bits per character, lower is better, comparable between tokenizers."),
    ("accuracy", "accuracy", 3, max, "Accuracy: share of right completions."),
)


class Column(NamedTuple):
    """A table's column.

    Attributes:
        name: Its heading.
        group: Heading above the names of neighbouring columns with this group.
        wordy: Whether it holds words, which are left-aligned and may be wrapped.
    """

    name: str
    group: str = ""
    wordy: bool = False


@dataclass(frozen=True)
class Table:
    """A table in plain text; each output escapes it.

    Attributes:
        title: Its heading.
        note: Explanation printed with the table.
        columns: Its columns; the first names the row.
        rows: The text of every column, by row.
        best: Row and column of the entries to set in bold.
        marked: Indices of the rows that beat the generator.
        ours: Indices of the generator's rows.
    """

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    marked: frozenset[int] = frozenset()
    ours: frozenset[int] = frozenset()

    @property
    def headings(self) -> list[tuple[str, int]]:
        """The groups with their numbers of columns; empty when no column has a group."""
        if not any(column.group for column in self.columns):
            return []
        return [(group, len(list(columns))) for group, columns in groupby(self.columns, lambda column: column.group)]


def comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Make every table that has rows, in reading order, in printable text."""
    tables = [
        _headroom_table(summarise(comparison)),
        _steering_table(steering_margins(comparison)),
        *(_task_table(comparison, group) for group in reversed(GROUPS)),
        _storage_table(comparison.get("storage", [])),
        _diagnostics_table(comparison.get("diagnostics", [])),
        _failure_table(comparison),
    ]
    return [_printable(table) for table in tables if table.rows]


def _printable(table: Table) -> Table:
    """Replace control characters in every text of a table."""
    return replace(
        table,
        columns=tuple(Column(printable(name), printable(group), wordy) for name, group, wordy in table.columns),
        rows=tuple(tuple(map(printable, row)) for row in table.rows),
        title=printable(table.title),
        note=printable(table.note),
    )


def _headroom_table(summaries: Sequence[MethodSummary]) -> Table:
    """One row per method, from the highest headroom to the lowest; a column only where some method has an entry."""
    summaries = by_headroom(summaries)
    groups = [group for group in GROUPS if any(summary.groups[group] for summary in summaries)]
    columns, rows = [Column("Method")], [[summary.method] for summary in summaries]

    def add(column: Column, texts: Sequence[str]) -> None:
        if any(texts):
            columns.append(column)
            for row, text in zip(rows, texts, strict=True):
                row.append(text)

    for group in groups:
        found = [summary.groups[group] for summary in summaries]
        name = f"{group.capitalize()} tasks"
        add(Column("Headroom", name), ["not measured" if it is None else str(it.headroom) for it in found])
        worst = ["" if it is None else f"{format_number(it.worst_headroom)} {it.worst_task}" for it in found]
        add(Column("Worst", name, wordy=True), worst)
    beaten = [" and ".join(summary.beats_generator) for summary in summaries]
    add(Column("Note", wordy=True), [f"beats the generator ({where})" if where else "" for where in beaten])
    cells = [sum(group.cells for group in summary.groups.values() if group) for summary in summaries]
    add(Column("Cells"), list(map(str, cells)))
    add(Column("Failed"), [str(summary.failed or "") for summary in summaries])
    budgets = [summary.token_budget for summary in summaries]
    add(Column("Tokens"), ["" if budget is None else f"{budget:,}" for budget in budgets])
    return Table(
        "Headroom per method",
        "Headroom: 0 is the original model, 1 the LoRA fine-tuned on the task itself; mean with its bootstrap 95 % "
        "interval over tasks. A cell is one method, scored on one task with one seed. Tokens: training tokens that "
        "went through the base model, in all.",
        tuple(columns),
        tuple(map(tuple, rows)),
        marked=frozenset(index for index, summary in enumerate(summaries) if summary.beats_generator),
        ours=frozenset(index for index, summary in enumerate(summaries) if summary.method in OURS),
    )


def _steering_table(margins: Mapping[str, Interval]) -> Table:
    def verdict(mean: float) -> str:
        if math.isnan(mean):
            return "not measured"
        return "ignores its condition" if mean < NEEDED_MARGIN else "follows its condition"

    return Table(
        "Steering margin",
        "Headroom of the generated adapters minus that of those generated with another task's condition. "
        f"Below {NEEDED_MARGIN} the generator ignores its condition.",
        (Column("Tasks"), Column("Margin"), Column("The generator", wordy=True)),
        tuple((group, str(margin), verdict(margin.mean)) for group, margin in margins.items()),
    )


def _task_table(comparison: Mapping[str, Any], group: str) -> Table:
    """Perplexity and bits per character (Table 2 of the paper), and accuracy where it was measured."""
    cells = [cell for cell in comparison["cells"] if cell["seen"] is GROUPS[group]]
    tasks = sorted({cell["task"] for cell in cells})
    methods = [name for name in method_names(comparison) if any(cell["method"] == name for cell in cells)]
    metrics = [metric for metric in _METRICS if any(cell.get(metric[1]) is not None for cell in cells)]
    columns, texts, best = [Column("Method")], [methods], set()
    for task in tasks:
        for name, key, digits, choose, _ in metrics:
            means = _means((cell["method"], cell.get(key)) for cell in cells if cell["task"] == task)
            column = [format_number(means.get(method), digits) for method in methods]
            rivals = {row: means[method] for row, method in enumerate(methods) if method in means.keys() - ORIGINALS}
            best |= {(row, len(columns)) for row in best_rows(rivals, column, choose)}
            columns.append(Column(name, task))
            texts.append(column)
    return Table(
        f"Each {group} task",
        " ".join(meaning for *_, meaning in metrics)
        + " Means over folds and seeds; the best of a column is bold, the original LoRA aside.",
        tuple(columns),
        tuple(zip(*texts, strict=True)) if tasks else (),
        frozenset(best),
        ours=frozenset(row for row, method in enumerate(methods) if method in OURS),
    )


def best_rows(values: Mapping[int, float], texts: Sequence[str], choose: Callable[..., int]) -> list[int]:
    """The rows that read as the best one does; none where all of them do.

    Args:
        values: The figure of every row that competes.
        texts: What is printed for it, of every row.
        choose: ``min`` or ``max``.
    """
    if not values:
        return []
    top = texts[choose(values, key=values.__getitem__)]
    rows = [row for row in values if texts[row] == top]
    return rows if len(rows) < len(values) else []


def _storage_table(storage: Sequence[Mapping[str, Any]]) -> Table:
    whole = {entry["what"]: entry["bytes"] for entry in storage}.get("all LoRA checkpoints")
    rows = [
        (entry["what"], _size(entry["bytes"]), _share(entry["bytes"] / whole) if whole else "") for entry in storage
    ]
    return Table(
        "Storage",
        "What has to be kept to have an adapter for every task; shares are of the size of all LoRA checkpoints.",
        tuple(map(Column, ("What", "Size", "Share"))),
        tuple(rows),
    )


def _diagnostics_table(diagnostics: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            f"{entry['fold']}, {entry['seed']}",
            format_number(entry["kl"]),
            f"{entry['active_latents']} of {entry['latents']}",
            format_number(_means((0, value) for value in entry["novelty"].values()).get(0)),
            format_number(entry["sample_spread"]),
            format_number(entry["zoo_spread"]),
        )
        for entry in diagnostics
    ]
    return Table(
        "The generator's latent space",
        "KL in nats. Novelty: distance to the nearest training checkpoint over the median distance between the "
        "checkpoints of one task, mean over tasks. Samples should spread as the zoo's checkpoints do.",
        tuple(map(Column, ("Fold, seed", "KL", "Active latents", "Novelty", "Sample spread", "Zoo spread"))),
        tuple(rows),
    )


def _failure_table(comparison: Mapping[str, Any]) -> Table:
    return Table(
        "Failed cells",
        "They enter no mean.",
        (Column("Method"), Column("Task", wordy=True), Column("Fold"), Column("Seed"), Column("Reason", wordy=True)),
        tuple(
            (cell["method"], cell["task"], str(cell["fold"]), str(cell["seed"]), reason)
            for cell, reason in failed_cells(comparison)
        ),
    )


def _means(pairs: Iterable[tuple[Any, float | None]]) -> dict[Any, float]:
    """The mean of the finite values of every key."""
    values = defaultdict(list)
    for key, value in pairs:
        if value is not None and math.isfinite(value):
            values[key].append(value)
    return {key: fmean(found) for key, found in values.items()}


def _share(share: float) -> str:
    """A share in words: ``4.2 %``, or from twice on ``162 times``."""
    return f"{share:.0f} times" if share >= 1.995 else f"{100 * share:.3g} %"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
