"""Reports of synthetic comparisons, small enough to check the numbers by hand."""

from __future__ import annotations

import base64
import math
import random
import re
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.comparisons import LOSSES, cell, make_comparison
from rich.console import Console

from lora_factory.errors import LoraFactoryError
from lora_factory.reporting.plots import project
from lora_factory.reporting.report import headroom_bars, html_page, markdown_tables, terminal_tables, write_report
from lora_factory.reporting.summary import findings, places_without_unit, steering_margins, summarise, verdict

HOSTILE = "<script>alert('x')</script>|[bold red]\x1b[31m&`$x^$`\u202e"

needs_extra = pytest.mark.skipif(
    not (find_spec("matplotlib") and find_spec("sklearn")), reason="the extra 'report' is not installed"
)


def make_full_comparison(task: str = "a") -> dict[str, Any]:
    """A comparison with something for every table and plot, and ``task`` in place of "a"."""
    source = random.Random(0)
    labels = [name for name in (task, "b", "c") for _ in range(5)]

    def points(width: int, *kinds: str) -> dict[str, Any]:
        rows = [[source.gauss(0, 1) for _ in range(width)] for _ in labels]
        return {"rows": rows, "labels": labels, "kinds": [kinds[index % len(kinds)] for index in range(len(labels))]}

    comparison = make_comparison(
        LOSSES | {"generated, gibberish": 9.0},
        diagnostics=[
            {
                "fold": 0,
                "seed": 0,
                "kl": 31.04,
                "active_latents": 12,
                "latents": 32,
                "novelty": {"a": 1.0, "b": 2.0},
                "sample_spread": 0.8,
                "zoo_spread": None,
            }
        ],
        storage=[{"what": "data set", "bytes": 999}, {"what": "all LoRA checkpoints", "bytes": 2_000_000}],
        curves={
            "generator, fold 0, seed 0": [{"step": 0, "loss": 1.0, "kl": 0.0}, {"step": 1, "loss": None, "kl": 2.0}],
            "COND P-DIFF": [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 0.5}],
            "empty": [],
        },
        points={
            "task vectors": points(4, "description"),
            "hidden states": points(5, "example"),
            "latents": points(3, "posterior", "prior"),
            "weights": points(2, "real", "generated"),
        },
    )
    for entry in comparison["cells"]:
        entry["task"] = task if entry["task"] == "a" else entry["task"]
    comparison["cells"].append(cell(task, "retrieval", None, seen=True, error=f"out of memory on {task}"))
    return comparison


def words(comparison: dict[str, Any]) -> str:
    return " ".join(finding.text for finding in findings(comparison))


def terminal(comparison: dict[str, Any], width: int = 200) -> str:
    console = Console(width=width, record=True, force_terminal=False, file=open("/dev/null", "w"))
    for table in terminal_tables(comparison, width):
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_of_the_terminal_are_cut_between_columns(width: int) -> None:
    wide, narrow = terminal(make_comparison(), 400).splitlines(), terminal(make_comparison(), width).splitlines()
    assert max(map(len, narrow)) <= width < max(map(len, wide))
    cells = {cell for line in wide if line.startswith("  ") for cell in re.split(r"\s{2,}", line.strip())}
    for line in narrow:
        if line.startswith("  gener"):  # a row of methods: every entry is whole
            assert set(re.split(r"\s{2,}", line.strip())) <= cells


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"uniform soup": 1.1}, "recovers 0.90 .* gains, less than the best baseline or control, uniform soup: 0.95."),
        (
            {"uniform soup": 1.2},
            "recovers 0.90 .* gains, as much as the best baseline or control, .*: 0.90.",
        ),
        ({"original LoRA, best": 0.5}, "recovers 0.90 .* gains, more than the best baseline or control, .*: 0.50."),
    ],
)
def test_the_verdict_names_the_best_rival(losses: dict[str, float], said: str) -> None:
    told = verdict(summarise(make_comparison(LOSSES | losses)))
    assert re.fullmatch(f"On unseen tasks the generator {said}", told)
    seen = make_comparison(LOSSES | losses)
    seen["cells"] = [entry for entry in seen["cells"] if entry["seen"]]
    assert verdict(summarise(seen)) == told.replace("unseen", "seen")


def test_the_verdict_compares_what_was_given_a_text_with_its_like() -> None:
    refined = {"generated from examples": 1.05, "multi-task LoRA, refined": 1.02, "retrieval from examples": 1.1}
    told = verdict(summarise(make_comparison(LOSSES | refined)))
    assert "recovers 0.90" in told
    assert told.endswith("more than the best baseline or control without examples, uniform soup: 0.50.")
    examples = {name: loss for name, loss in (LOSSES | refined).items() if not name.startswith("generated,")}
    del examples["generated"]
    told = verdict(summarise(make_comparison(examples)))
    assert "recovers 0.97" in told and "the best baseline or control, multi-task LoRA, refined: 0.99" in told


def test_bars_fall_from_the_highest_and_mark_the_generator() -> None:
    shown = headroom_bars(summarise(make_comparison(LOSSES | {"uniform soup": 9.0})))
    assert [bars.method for bars in shown["methods"]] == [
        *("original LoRA", "generated", "generated, another task", "original model", "uniform soup")
    ]
    assert [bars.kind for bars in shown["methods"]] == ["", "ours", "", "", ""]
    for bars in shown["methods"]:
        for group, start, length, _ in bars.bars:
            assert group in shown["groups"] and 0 <= start <= start + length <= 100.01
    assert shown["methods"][-1].bars[0][1:3] == (0, shown["zero"])  # cut at the edge; its number is beside it
    assert shown["methods"][-1].bars[0][3].startswith("-3.00")


def test_headrooms_are_those_of_hand_computation() -> None:
    summaries = {summary.method: summary for summary in summarise(make_comparison())}
    means = {method: summary.seen.headroom.mean for method, summary in summaries.items() if summary.seen}
    assert means == pytest.approx(
        {
            "original model": 0,
            "original LoRA": 1,
            "uniform soup": 0.5,
            "generated": 0.9,
            "generated, another task": 0.5,
        }
    )
    assert summaries["generated"].seen and summaries["generated"].seen.cells == 2
    assert summaries["uniform soup"].seen and summaries["uniform soup"].seen.lead.mean == pytest.approx(-0.4)
    assert [summary.token_budget for summary in summaries.values()] == [None, 1638400, None, 0, None]
    assert steering_margins(make_comparison())["unseen"].mean == pytest.approx(0.4)


def test_interval_is_that_of_the_bootstrap_over_tasks() -> None:
    comparison = make_comparison()
    # Headrooms of the generator on seen tasks: 0 and 1 by task; a bootstrap of two has mean 0, 0.5 or 1.
    comparison["cells"] += [entry | {"task": "z"} for entry in comparison["cells"] if entry["seen"]]
    for entry in comparison["cells"]:
        if entry["method"] == "generated" and entry["seen"]:
            entry["loss"] = 3.0 if entry["task"] == "z" else 1.0
    seen = next(summary.seen for summary in summarise(comparison) if summary.method == "generated")
    assert seen and (seen.headroom.mean, seen.headroom.low, seen.headroom.high) == (0.5, 0.0, 1.0)
    assert summarise(comparison) == summarise({**comparison, "cells": comparison["cells"][::-1]})


def test_folds_and_seeds_of_a_task_count_once() -> None:
    comparison = make_comparison({"original model": 3.0, "original LoRA": 1.0, "generated": 1.0})
    again = [entry | {"fold": 1} for entry in comparison["cells"] if entry["seed"] == 0 and entry["seen"]]
    other = [entry | {"task": "z"} for entry in comparison["cells"] if entry["seed"] == 0 and entry["seen"]]
    for entry in (*again, *other):
        if entry["method"] == "generated":
            entry["loss"] = 2.0  # 0.5 beside 1 and 1 for task a, and 0.5 for task z
    comparison["cells"] += again + other
    seen = summarise(comparison)[-1].seen
    assert seen and seen.headroom.mean == pytest.approx((2.5 / 3 + 0.5) / 2) and seen.cells == 4
    assert seen.worst_headroom == pytest.approx(0.5)


def test_what_is_conditioned_on_examples_is_compared_with_its_like() -> None:
    losses = {"original model": 3.0, "original LoRA": 1.0, "generated": 2.0, "retrieval": 1.5}
    losses |= {"generated from examples": 1.2, "retrieval from examples": 1.4}
    losses |= {"generated, another task": 2.5, "generated from examples, another task": 2.2}
    comparison = make_comparison(losses)
    beats = {summary.method: summary.beats_generator for summary in summarise(comparison)}
    assert beats["retrieval"] == ("seen", "unseen") and beats["retrieval from examples"] == ()
    assert beats["generated from examples"] == ()
    margins = {name: margin.mean for name, margin in steering_margins(comparison).items()}
    text, examples = pytest.approx(0.25), pytest.approx(0.5)
    assert margins == {
        "seen": text,
        "unseen": text,
        "seen, from examples": examples,
        "unseen, from examples": examples,
    }


def test_one_unit_has_no_interval() -> None:
    comparison = make_comparison()
    comparison["cells"] = [entry for entry in comparison["cells"] if entry["seed"] == 0]
    seen = summarise(comparison)[0].seen
    assert seen and math.isnan(seen.headroom.low) and str(seen.headroom) == "0.00"


def test_worst_task_is_named() -> None:
    comparison = make_comparison()
    extra = [entry | {"task": "z"} for entry in comparison["cells"] if entry["seen"]]
    for entry in extra:
        entry["loss"] += entry["method"] == "generated"
    comparison["cells"] += extra
    generated = next(summary for summary in summarise(comparison) if summary.method == "generated")
    assert generated.seen and generated.seen.worst_task == "z"
    assert generated.seen.worst_headroom == pytest.approx(0.4)
    assert "worst on z: 0.40" in words(comparison)


@pytest.mark.parametrize(("loss", "error"), [(None, "CUDA out of memory"), (math.nan, None), (1.2, "a NaN metric")])
def test_failed_cells_are_named_and_enter_no_mean(loss: float | None, error: str | None) -> None:
    comparison = make_comparison()
    for entry in comparison["cells"]:
        if entry["method"] == "generated" and entry["task"] == "a" and entry["seed"] == 1:
            entry.update(loss=loss, error=error)
            del entry["perplexity"], entry["bits_per_character"], entry["accuracy"]
    generated = next(summary for summary in summarise(comparison) if summary.method == "generated")
    assert generated.failed == 1 and generated.seen and generated.seen.cells == 1
    assert generated.seen.headroom.mean == pytest.approx(0.9)
    assert "1 of 20 cells failed" in words(comparison)
    assert f"| generated | a | 0 | 1 | {error or 'the loss is nan'} |" in markdown_tables(comparison)
    assert "Failed cells" in terminal(comparison)


def test_nothing_is_said_of_failures_where_there_are_none() -> None:
    assert "failed" not in words(make_comparison())
    assert "Failed cells" not in markdown_tables(make_comparison())
    assert "unit" not in words(make_comparison())


def test_a_task_on_which_the_original_lora_gains_nothing_enters_no_mean() -> None:
    comparison = make_comparison()
    for entry in comparison["cells"]:
        if entry["method"] == "original LoRA" and entry["task"] == "b" and entry["seed"] == 0:
            entry["loss"] = 3.0
        if entry["method"] == "original model" and entry["task"] == "b" and entry["seed"] == 1:
            entry.update(loss=None, error="interrupted")
    assert [str(place) for place in places_without_unit(comparison)] == ["b (fold 0, seed 0)", "b (fold 0, seed 1)"]
    assert all(summary.unseen is None and summary.seen for summary in summarise(comparison))
    assert "b (fold 0, seed 0): the original LoRA gains nothing over the original model" in words(comparison)
    assert "b (fold 0, seed 1): original model not measured" in words(comparison)
    assert "| unseen | n/a | not measured |" in markdown_tables(comparison)


def test_a_method_measured_twice_at_one_place_is_refused() -> None:
    comparison = make_comparison()
    comparison["cells"].append(comparison["cells"][0] | {"condition": "text"})
    with pytest.raises(LoraFactoryError, match=r"'original model' was measured twice on a \(fold 0, seed 0\)"):
        summarise(comparison)


@pytest.mark.parametrize(("another", "ignores"), [(1.2, True), (1.3, True), (1.5, False), (1.0, True)])
def test_an_ignored_condition_is_said(another: float, ignores: bool) -> None:
    comparison = make_comparison(LOSSES | {"generated, another task": another})
    said = "On seen tasks the generator ignores its condition"
    assert (said in words(comparison)) is ignores
    assert (said in terminal(comparison).replace("\n", " ")) is ignores
    assert ("ignores its condition |" in markdown_tables(comparison)) is ignores
    assert ("follows its condition |" in markdown_tables(comparison)) is not ignores


def test_what_beats_the_generator_is_marked() -> None:
    assert "beats" not in markdown_tables(make_comparison())
    better = {"multi-task LoRA": 1.1, "generated, sampled": 1.1, "original LoRA, best": 0.9}
    comparison = make_comparison(LOSSES | better)
    assert [summary.method for summary in summarise(comparison) if summary.beats_generator] == ["multi-task LoRA"]
    assert "multi-task LoRA beats the generator on unseen tasks by 0.05 [0.05, 0.05] in headroom." in words(comparison)
    lora = "multi-task LoRA, refined"
    refined = make_comparison(LOSSES | {"generated from examples": 1.2, lora: 1.1})
    assert f'{lora} beats the generator (row "generated from examples") on seen tasks by' in words(refined)
    assert "| **multi-task LoRA** | 0.95" in markdown_tables(comparison)
    assert "beats the generator (seen and unseen)" in terminal(comparison)


@needs_extra
@pytest.mark.parametrize("lead", [0.0, 0.5])
def test_no_winner_is_marked_among_equals(lead: float) -> None:
    comparison = make_comparison(dict.fromkeys(LOSSES, 2.0) | {"generated": 2.0 - lead})
    bold, shown = bool(lead), Console(width=200, record=True, force_terminal=True, file=open("/dev/null", "w"))
    for table in terminal_tables(comparison, 200)[1:]:
        shown.print(table)
    section = markdown_tables(comparison).partition("## Each unseen task")[2]
    assert ("**" in section) is bold
    assert (f"\x1b[1m{math.exp(1.5):.2f}" in shown.export_text(styles=True)) is bold
    assert ('<td class="best">' in html_page(comparison)) is bold


def test_a_lead_that_may_be_noise_is_called_so() -> None:
    comparison = make_comparison()
    for entry in comparison["cells"]:
        if entry["method"] == "uniform soup" and entry["seen"]:
            entry["loss"] = 1.28 if entry["seed"] else 1.0
    assert "uniform soup beats the generator on seen tasks by 0.03 [-0.04, 0.10] in headroom, which may be noise." in (
        words(comparison)
    )
    assert summarise(comparison)[2].beats_generator == ("seen",)


def test_a_lead_compares_shared_cells_only() -> None:
    comparison = make_comparison()
    for entry in comparison["cells"]:
        if entry["method"] == "generated" and entry["seen"]:
            entry["loss"] = 2.5 if entry["seed"] else 1.2
        if entry["method"] == "uniform soup" and entry["seen"] and entry["seed"]:
            entry["loss"] = 2.9
    comparison["cells"] = [
        entry
        for entry in comparison["cells"]
        if not (entry["method"] == "uniform soup" and entry["seen"] and entry["seed"] == 0)
    ]
    soup = summarise(comparison)[2]
    assert soup.seen and soup.seen.lead.mean == pytest.approx(-0.2)


GOLDEN = """\
# Adapters generated for pico/llama

**On unseen tasks the generator recovers 0.90 of what a LoRA of the task's own gains, more than the best baseline or control, uniform soup: 0.50.**

- On seen tasks the generator recovers 0.90 [0.90, 0.90] of what each task's own LoRA gains; worst on a: 0.90.
- On unseen tasks the generator recovers 0.90 [0.90, 0.90] of what each task's own LoRA gains; worst on b: 0.90.
- On seen tasks the generator follows its condition: steering margin 0.40 [0.40, 0.40].
- On unseen tasks the generator follows its condition: steering margin 0.40 [0.40, 0.40].

## Headroom per method

| Method | Seen tasks Headroom | Seen tasks Worst | Unseen tasks Headroom | Unseen tasks Worst | Cells | Tokens |
| :-- | --: | :-- | --: | :-- | --: | --: |
| original LoRA | 1.00 [1.00, 1.00] | 1.00 a | 1.00 [1.00, 1.00] | 1.00 b | 4 | 1,638,400 |
| generated | 0.90 [0.90, 0.90] | 0.90 a | 0.90 [0.90, 0.90] | 0.90 b | 4 | 0 |
| uniform soup | 0.50 [0.50, 0.50] | 0.50 a | 0.50 [0.50, 0.50] | 0.50 b | 4 |  |
| generated, another task | 0.50 [0.50, 0.50] | 0.50 a | 0.50 [0.50, 0.50] | 0.50 b | 4 |  |
| original model | 0.00 [0.00, 0.00] | 0.00 a | 0.00 [0.00, 0.00] | 0.00 b | 4 |  |

Headroom: 0 is the original model, 1 the LoRA fine-tuned on the task itself; mean with its bootstrap 95 % interval over tasks. A cell is one method, scored on one task with one seed. Tokens: training tokens that went through the base model, in all.

## Steering margin

| Tasks | Margin | The generator |
| :-- | --: | :-- |
| seen | 0.40 [0.40, 0.40] | follows its condition |
| unseen | 0.40 [0.40, 0.40] | follows its condition |

Headroom of the generated adapters minus that of those generated with another task's condition. Below 0.1 the generator ignores its condition.

## Each unseen task

| Method | b PPL | b BPC |
| :-- | --: | --: |
| original model | 20.09 | 0.750 |
| original LoRA | 2.72 | 0.250 |
| uniform soup | 7.39 | 0.500 |
| generated | **3.32** | **0.300** |
| generated, another task | 7.39 | 0.500 |
"""  # noqa: E501


def test_markdown_is_the_golden_one() -> None:
    text = markdown_tables(make_comparison())
    assert text.replace("\\[", "[").replace("\\]", "]").startswith(GOLDEN)
    assert "0.90 \\[0.90, 0.90\\]" in text  # brackets would make links
    assert text.endswith("\n") and not text.endswith("\n\n") and "n/a | n/a" not in text


def test_accuracy_has_a_column_when_it_was_measured() -> None:
    comparison = make_comparison()
    for entry in comparison["cells"]:
        entry["accuracy"] = 1 - entry["loss"] / 10
    lines = markdown_tables(comparison).splitlines()
    assert "| Method | a PPL | a BPC | a accuracy |" in lines
    assert "| generated | **3.32** | **0.300** | **0.880** |" in lines


def test_storage_and_diagnostics() -> None:
    text = markdown_tables(make_full_comparison())
    assert "| data set | 999 B | 0.05 % |\n| all LoRA checkpoints | 2 MB | 100 % |" in text
    assert "| 0, 0 | 31.04 | 12 of 32 | 1.50 | 0.80 | n/a |" in text


def test_hostile_names_are_harmless_in_markdown_and_terminal() -> None:
    text = markdown_tables(make_full_comparison(HOSTILE))
    assert "<" not in text and "\x1b" not in text and "\u202e" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for header, *rows in tables:
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(re.findall(r"(?<!\\)\|", header))}
    shown = terminal(make_full_comparison(HOSTILE))
    assert "[bold red]" in shown and "\x1b" not in shown and "\u202e" not in shown


class Page(HTMLParser):
    """Every tag and attribute of a page, and whether tags close in order."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, name: str) -> list[str]:
        return [value for found, key, value in self.attributes if (found, key) == (tag, name)]


@needs_extra
def test_page_holds_everything_and_asks_for_nothing_outside() -> None:
    text = html_page(make_full_comparison())
    page = Page(text)
    plots = page.values("img", "src")
    titles = ["Task vectors (t-SNE)", "Hidden states (t-SNE)", "Latent space (PCA)"]
    titles += ["Weights (PCA)", "Loss curves: generator", "Loss curves: COND P-DIFF"]
    assert all(title in page.text for title in titles) and len(plots) == len(titles) == len(page.values("img", "alt"))
    assert all(page.values("img", "alt"))
    assert page.values("source", "media") == ["(prefers-color-scheme: dark)"] * len(plots)
    assert "http" not in text.replace("http-equiv", "") and "//" not in re.sub(r'"data:[^"]*"', "", text)
    assert not {"script", "link", "iframe"} & set(page.tags) and "url(" not in text
    assert "default-src 'none'" in text
    assert page.tags.count("h1") == 1 and set(page.values("th", "scope")) == {"col", "colgroup", "row"}
    assert page.tags.count("th") == len(page.values("th", "scope"))
    identifiers = page.values("h2", "id")
    assert len(set(identifiers)) == len(identifiers) == page.tags.count("table")
    assert page.values("table", "aria-labelledby") == identifiers


@needs_extra
def test_plots_differ_between_light_and_dark_in_colours_only() -> None:
    page = Page(html_page(make_full_comparison()))
    for light, dark in zip(page.values("img", "src"), page.values("source", "srcset"), strict=True):
        light_svg, dark_svg = (base64.b64decode(uri.partition(",")[2]).decode() for uri in (light, dark))
        assert light_svg.startswith("<?xml") and light_svg != dark_svg
        assert re.sub(r"#[0-9a-f]{6}\b", "", light_svg) == re.sub(r"#[0-9a-f]{6}\b", "", dark_svg)
        assert "#1f2428" in light_svg and "#1f2428" not in dark_svg


@needs_extra
def test_page_says_and_marks_what_the_tables_do() -> None:
    plain = html_page(make_comparison())
    assert 'class="warning"' not in plain and 'class="marked"' not in plain and "ignores its condition" in plain
    told = html_page(make_comparison(LOSSES | {"uniform soup": 0.5, "generated, another task": 1.2}))
    assert told.count('<tr class="marked">') == 1 and told.count('class="warning"') == 4
    assert "On unseen tasks the generator ignores its condition" in told


@needs_extra
def test_hostile_names_are_harmless_on_the_page() -> None:
    text = html_page(make_full_comparison(HOSTILE))
    page = Page(text)
    assert "script" not in page.tags and "\x1b" not in text and "\u202e" not in text
    assert "<script>alert('x')</script>|[bold red]" in page.text
    assert all("<script>" not in base64.b64decode(uri.partition(",")[2]).decode() for uri in page.values("img", "src"))


@needs_extra
def test_report_is_written_and_the_same_every_time(tmp_path: Path) -> None:
    comparison = make_full_comparison()
    path = write_report(comparison, tmp_path / "first")
    assert path == tmp_path / "first" / "report.html"
    again = write_report(comparison, tmp_path / "second")
    assert path.read_text() == again.read_text()
    assert (tmp_path / "first" / "tables.md").read_text() == markdown_tables(comparison)
    assert write_report(comparison, tmp_path / "first") == path  # in place of the last one
    for name in ("tables.md", "report.html"):  # or of one that 0.1 has written
        file = tmp_path / "first" / name
        file.write_text(file.read_text().replace("Adapters generated for", "Comparison on", 1))
    write_report(comparison, tmp_path / "first")
    assert path.read_text() == again.read_text()


@needs_extra
def test_points_that_are_not_finite_are_left_out_and_counted() -> None:
    rows = [[math.nan, 1.0], [0.0, 1.0], [1.0, 0.0]]
    comparison = make_comparison(points={"weights": {"rows": rows, "labels": ["a"] * 3, "kinds": ["real"] * 3}})
    assert "1 points that are not finite are left out" in html_page(comparison)


@needs_extra
def test_projection_falls_back_to_pca_and_keeps_distances() -> None:
    corner, method, axes = project([[0.0, 0.0, 5.0], [3.0, 0.0, 5.0], [0.0, 4.0, 5.0]], neighbours=True)
    assert method == "PCA" and corner.shape == (3, 2)
    assert axes[0].startswith("first direction (") and axes[0].endswith("% of the variance)") and len(axes) == 2
    assert math.dist(corner[1], corner[2]) == pytest.approx(5)
    flat, *_ = project([[1.0], [3.0]], neighbours=False)
    assert flat.shape == (2, 2) and math.dist(*flat) == pytest.approx(2)
    assert project([[float(index)] for index in range(12)], neighbours=True)[1] == "t-SNE"


def test_missing_extra_is_named_and_the_tables_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoraFactoryError, match=r"matplotlib; run: pip install 'lora-factory\[report\]'"):
        write_report(make_comparison(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tables.md"]
