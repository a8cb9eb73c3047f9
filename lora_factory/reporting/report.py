"""Render a comparison as Markdown, as terminal tables, and as one self-contained HTML page with plots."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE
from rich.table import Table as RichTable
from rich.text import Text

from lora_factory.reporting.plots import draw_plots
from lora_factory.reporting.summary import GROUPS, OURS, MethodSummary, by_headroom, findings, summarise, verdict
from lora_factory.reporting.tables import Table, comparison_tables
from lora_factory.utils.files import write_text
from lora_factory.utils.folders import check_reports
from lora_factory.utils.printable import printable

_COLOURS = {"seen": "#7fb2d9", "unseen": "#1f6fb0"}  # as in report.html
_GAP = 3  # characters between two columns of a table in the terminal, at most
_WORDY = 24  # characters at which a column of words may be wrapped


def markdown_tables(comparison: Mapping[str, Any]) -> str:
    """Render the findings and every table of a comparison as GitHub-flavoured Markdown.

    Args:
        comparison: What ``comparison.compare`` returns.
    """
    blocks = [f"# {_markdown(title(comparison))}", f"**{_markdown(verdict(summarise(comparison)))}**"]
    blocks.append(
        "\n".join(
            f"- {'**Warning:** ' if finding.warning else ''}{_markdown(finding.text)}"
            for finding in findings(comparison)
        )
    )
    for table in comparison_tables(comparison):
        blocks.append(f"## {_markdown(table.title)}\n\n{markdown_table(table)}\n\n{_markdown(table.note)}")
    return "\n\n".join(block.strip() for block in blocks if block) + "\n"


def title(comparison: Mapping[str, Any]) -> str:
    """The heading of a report, with the base model's name: of a local one the folder's."""
    base_model = Path(comparison["base_model"])
    return f"Adapters generated for {printable(base_model.name if base_model.is_absolute() else base_model)}"


def terminal_tables(comparison: Mapping[str, Any], width: int) -> list[RichTable]:
    """Make rich tables of every table of a comparison; the caption of the first one holds the findings.

    Args:
        comparison: What ``comparison.compare`` returns.
        width: Of the terminal, in characters; a wider table is cut into several.
    """
    told = (f"{'! ' if finding.warning else ''}{finding.text}" for finding in findings(comparison))
    words = "\n".join([verdict(summarise(comparison)), *told])
    tables = [part for table in comparison_tables(comparison) for part in rich_tables(table, width)]
    if tables:
        tables[0].caption = Text(words)
    return tables


def rich_tables(table: Table, width: int) -> list[RichTable]:
    """A table for a terminal of so many characters: cut into several where it is wider, without its empty columns."""
    return [_rich_table(part) for part in _narrow(table, width)]


def html_page(comparison: Mapping[str, Any]) -> str:
    """Render one HTML page with the findings, every table and the plots; it loads nothing from outside.

    Args:
        comparison: What ``comparison.compare`` returns.

    Raises:
        LoraFactoryError: If the extra ``report`` is not installed.
    """
    summaries = summarise(comparison)
    return render_page(
        "report.html",
        base_model=printable(comparison["base_model"]),
        title=title(comparison),
        verdict=verdict(summaries),
        findings=findings(comparison),
        bars=headroom_bars(summaries),
        tables=comparison_tables(comparison),
        plots=draw_plots(comparison),
        seeds=", ".join(map(str, comparison["seeds"])),
        folds=[", ".join(map(printable, fold)) for fold in comparison["folds"]],
        versions=", ".join(f"{printable(name)} {printable(it)}" for name, it in comparison["created_with"].items()),
        settings=json.dumps(comparison["settings"], indent=2, ensure_ascii=False, default=str),
    )


def headroom_picture(comparison: Mapping[str, Any]) -> str | None:
    """The page's bars as an SVG picture for a card; None where nothing was measured."""
    bars = headroom_bars(summarise(comparison))
    return render_page("headroom.svg", bars=bars, colours=_COLOURS) if bars["methods"] else None


def render_page(name: str, **values: Any) -> str:  # noqa: ANN401
    """Render a template of this folder with its variables; `html_page` lists those of ``report.html``."""
    source = files("lora_factory.reporting").joinpath(name).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(**values)


@dataclass(frozen=True)
class Bars:
    """The bars of one method.

    Attributes:
        method: Its name.
        kind: "ours", "marked" where it beats the generator, or "".
        bars: Group, start and length in per cent of the axis, and the number as text.
    """

    method: str
    kind: str
    bars: tuple[tuple[str, float, float, str], ...]


def headroom_bars(summaries: Sequence[MethodSummary]) -> dict[str, Any]:
    """Bars of the headroom, from the highest to the lowest, on an axis that holds 0, 1 and all means up to 0.5 beyond.

    Args:
        summaries: What ``summarise`` returns.

    Returns:
        ``methods``, a list of `Bars`; ``groups`` that have one; ``zero`` and ``one``, where these are on the axis.
    """
    ordered = by_headroom(summaries)
    measured = {
        summary.method: {
            group: it.headroom for group, it in summary.groups.items() if it and math.isfinite(it.headroom.mean)
        }
        for summary in ordered
    }
    means = [interval.mean for groups in measured.values() for interval in groups.values()]
    low, high = max(-0.5, min([0.0, *means])), min(1.5, max([1.0, *means]))

    def place(value: float) -> float:
        return round(100 * (min(high, max(low, value)) - low) / (high - low), 2)

    methods = []
    for summary in ordered:
        bars = tuple(
            (group, min(place(0), place(it.mean)), abs(place(it.mean) - place(0)), str(it))
            for group, it in measured[summary.method].items()
        )
        kind = "ours" if summary.method in OURS else "marked" if summary.beats_generator else ""
        if bars:
            methods.append(Bars(printable(summary.method), kind, bars))
    return {
        "methods": methods,
        "groups": [group for group in GROUPS if any(group == bar[0] for bars in methods for bar in bars.bars)],
        "zero": place(0),
        "one": place(1),
    }


def write_report(comparison: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``tables.md`` and ``report.html``.

    Args:
        comparison: What ``comparison.compare`` returns.
        folder: Output folder; made if missing. Older reports in it are replaced.

    Returns:
        The path of the page.

    Raises:
        LoraFactoryError: If the extra ``report`` is not installed; ``tables.md`` is written all the same.
    """
    folder = check_reports(folder, "tables.md", "report.html")
    write_text(folder / "tables.md", markdown_tables(comparison))
    path = folder / "report.html"
    write_text(path, html_page(comparison))
    return path


def markdown_table(table: Table) -> str:
    """Render a table as GitHub-flavoured Markdown, with the best entries in bold."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    lines = [line(_markdown(f"{column.group} {column.name}".strip()) for column in table.columns)]
    lines.append(line(":--" if index == 0 or column.wordy else "--:" for index, column in enumerate(table.columns)))
    for index, row in enumerate(table.rows):
        bold = {column for best, column in table.best if best == index} | ({0} if index in table.marked else set())
        lines.append(
            line(f"**{_markdown(text)}**" if column in bold else _markdown(text) for column, text in enumerate(row))
        )
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """Escape the characters that Markdown and HTML interpret."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", text)


def _narrow(table: Table, width: int) -> list[Table]:
    """Cut a table into parts that are narrow enough, without its empty columns; each repeats the first column."""
    widths = []
    for index, column in enumerate(table.columns):
        texts = [row[index] for row in table.rows]
        needed = max(map(len, texts))
        if index == 0 or column.wordy:  # no word is broken
            needed = min(needed, max([_WORDY, *(len(word) for text in texts for word in text.split())]))
        widths.append(max(len(column.group), len(column.name), needed))
    parts: list[list[int]] = [[0]]
    for index in range(1, len(table.columns)):
        if not any(row[index] for row in table.rows):
            continue
        needed = sum(widths[column] + _GAP for column in (*parts[-1], index)) + _GAP
        if needed > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(index)
    return [
        replace(
            table,
            columns=tuple(table.columns[index] for index in kept),
            rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
            best=frozenset((row, kept.index(column)) for row, column in table.best if column in kept),
        )
        for kept in parts
    ]


def _rich_table(table: Table) -> RichTable:
    """Convert a table for rich; `Text` keeps rich from interpreting markup in names."""
    shown = RichTable(title=Text(table.title), caption_justify="left", box=SIMPLE)
    for index, column in enumerate(table.columns):
        wordy = index == 0 or column.wordy
        heading = Text("\n".join(filter(None, (column.group, column.name))))
        shown.add_column(heading, justify="left" if wordy else "right", overflow="fold")
    for index, row in enumerate(table.rows):
        texts = [Text(text, style="bold" if (index, column) in table.best else "") for column, text in enumerate(row)]
        shown.add_row(*texts, style="yellow" if index in table.marked else None)
    return shown
