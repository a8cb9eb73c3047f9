"""The tables of a comparison as data, for Markdown, terminal and HTML."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from typing import Any, NamedTuple

from lora_factory.reporting.summary import (
    GROUPS,
    NEEDED_MARGIN,
    ORIGINALS,
    GroupSummary,
    Interval,
    MethodSummary,
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
    """

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    marked: frozenset[int] = frozenset()

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
    def entries(group: GroupSummary | None) -> tuple[str, str]:
        if group is None:
            return "n/a", "n/a"
        return str(group.headroom), f"{format_number(group.worst_headroom)} {group.worst_task}"

    rows = []
    for summary in summaries:
        cells = sum(group.cells for group in summary.groups.values() if group)
        tokens = "n/a" if summary.token_budget is None else f"{summary.token_budget:,}"
        note = f"beats the generator ({' and '.join(summary.beats_generator)})" if summary.beats_generator else ""
        rows.append(
            (
                summary.method,
                *entries(summary.seen),
                *entries(summary.unseen),
                note,
                str(cells),
                str(summary.failed),
                tokens,
            )
        )
    return Table(
        "Headroom per method",
        "Headroom: 0 is the original model, 1 the LoRA fine-tuned on the task itself; mean with its bootstrap 95 % "
        "interval over tasks. Tokens: training tokens that went through the base model, in all.",
        (
            Column("Method"),
            Column("Headroom", "Seen tasks"),
            Column("Worst", "Seen tasks", wordy=True),
            Column("Headroom", "Unseen tasks"),
            Column("Worst", "Unseen tasks", wordy=True),
            Column("Note", wordy=True),
            *map(Column, ("Cells", "Failed", "Tokens")),
        ),
        tuple(rows),
        marked=frozenset(index for index, summary in enumerate(summaries) if summary.beats_generator),
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
            top = format_number(choose(rivals.values(), default=None), digits)
            best |= {(row, len(columns)) for row in rivals if column[row] == top}
            columns.append(Column(name, task))
            texts.append(column)
    return Table(
        f"Each {group} task",
        " ".join(meaning for *_, meaning in metrics)
        + " Means over folds and seeds; the best of a column is bold, the original LoRA aside.",
        tuple(columns),
        tuple(zip(*texts, strict=True)) if tasks else (),
        frozenset(best),
    )


def _storage_table(storage: Sequence[Mapping[str, Any]]) -> Table:
    whole = {entry["what"]: entry["bytes"] for entry in storage}.get("all LoRA checkpoints")
    rows = [
        (entry["what"], _size(entry["bytes"]), f"{entry['bytes'] / whole:.1%}" if whole else "n/a")
        for entry in storage
    ]
    return Table(
        "Storage",
        "What has to be kept to have an adapter for every task; shares are of all LoRA checkpoints.",
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


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
