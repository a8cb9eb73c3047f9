"""Summarise a comparison: headroom with bootstrap intervals, steering margins, and findings in words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lora_factory.errors import LoraFactoryError
from lora_factory.utils.printable import printable


def headroom(base_loss: float, adapter_loss: float, original_loss: float) -> float:
    """Return the share of the original LoRA's gain over the base model that an adapter recovers.

    Args:
        base_loss: Loss of the base model, in nats per token.
        adapter_loss: Loss of the adapter, in nats per token.
        original_loss: Loss of the LoRA that was fine-tuned on the task, in nats per token.

    Returns:
        ``(base - adapter) / (base - original)``: 0 is the base model, 1 the original LoRA; NaN where the original LoRA
        gains nothing.
    """
    gain = base_loss - original_loss
    return (base_loss - adapter_loss) / gain if gain > 0 else math.nan


GENERATED = "generated"
FROM_EXAMPLES = " from examples"  # in the names of methods that are conditioned on examples instead of a text
ANOTHER_TASK = ", another task"
GIBBERISH = f"{GENERATED}, gibberish"
UNIFORM_SOUP = "uniform soup"
ORIGINAL_MODEL = "original model"
ORIGINAL_LORA = "original LoRA"
ORIGINALS = frozenset({ORIGINAL_LORA, "original LoRA, best"})
OURS = {GENERATED, f"{GENERATED}{FROM_EXAMPLES}"}
UNREFINED = f"{GENERATED}{FROM_EXAMPLES}, unrefined"
_VARIANTS = {UNREFINED, f"{GENERATED} from text and examples, unrefined"}
_NO_RIVALS = ORIGINALS | OURS | _VARIANTS | {f"{name}, sampled" for name in OURS}  # neither controls nor baselines
GROUPS = {"seen": True, "unseen": False}
NEEDED_MARGIN = 0.1
_LEAD = 0.005  # what two decimals show
_RESAMPLES = 2000


class Place(NamedTuple):
    """Task, fold and seed of a cell; methods are compared at the same place."""

    task: str
    fold: int
    seed: int

    def __str__(self) -> str:
        """Name the place in words."""
        return f"{self.task} (fold {self.fold}, seed {self.seed})"


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap 95 % confidence interval, whose bounds are NaN for fewer than two values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """The mean with its interval, for example ``0.85 [0.80, 0.90]``."""
        bounds = f" [{format_number(self.low)}, {format_number(self.high)}]"
        return format_number(self.mean) + ("" if math.isnan(self.low) else bounds)


@dataclass(frozen=True)
class GroupSummary:
    """Figures of one method on the seen tasks, or on the unseen tasks.

    Attributes:
        headroom: Mean share of the original LoRA's gain that the method recovers.
        worst_task: The task with the lowest mean headroom.
        worst_headroom: That task's mean.
        cells: Number of measured cells.
        lead: The method's headroom minus the generator's, over the places where both were measured.
    """

    headroom: Interval
    worst_task: str
    worst_headroom: float
    cells: int
    lead: Interval


@dataclass(frozen=True)
class MethodSummary:
    """Figures of one method of a comparison.

    Attributes:
        method: Its name.
        seen: Its figures on seen tasks; None without a measured cell.
        unseen: Its figures on unseen tasks; None without a measured cell.
        failed: Number of its failed cells, which enter no mean.
        token_budget: Training tokens that went through the base model, in all; None if unknown.
        beats_generator: Those of "seen" and "unseen" where this control or baseline recovers more than the generator.
        compared_with: The row of the generator that it is compared with.
    """

    method: str
    seen: GroupSummary | None
    unseen: GroupSummary | None
    failed: int
    token_budget: int | None
    beats_generator: tuple[str, ...]
    compared_with: str

    @property
    def groups(self) -> dict[str, GroupSummary | None]:
        """``seen`` and ``unseen`` by name."""
        return {"seen": self.seen, "unseen": self.unseen}


class Finding(NamedTuple):
    """One sentence about a comparison; a warning reports a weakness of the generator or of the measurement."""

    text: str
    warning: bool = False


def summarise(comparison: Mapping[str, Any]) -> list[MethodSummary]:
    """Summarise every method of a comparison, in its order.

    Folds and seeds of a task are averaged before tasks are resampled for the intervals, since they share test data. A
    method conditioned on examples is compared with the generator conditioned on examples, every other method with the
    generator conditioned on a text. Failed cells enter no mean, nor do places where the original LoRA gains nothing
    over the original model.

    Args:
        comparison: What ``comparison.compare`` returns.

    Raises:
        LoraFactoryError: If a method was measured twice at one place.
    """
    headrooms = _headrooms(comparison)
    failed = [cell["method"] for cell, _ in failed_cells(comparison)]
    summaries = []
    for method in method_names(comparison):
        ours = _generated_like(method, headrooms)
        groups = {
            group: _summarise_group(headrooms[method, seen], headrooms[ours, seen]) for group, seen in GROUPS.items()
        }
        beats = [
            name for name, group in groups.items() if group and method not in _NO_RIVALS and group.lead.mean >= _LEAD
        ]
        budget = comparison.get("budgets", {}).get(method)
        summaries.append(
            MethodSummary(
                method,
                **groups,
                failed=failed.count(method),
                token_budget=budget,
                beats_generator=tuple(beats),
                compared_with=ours,
            )
        )
    return summaries


def method_names(comparison: Mapping[str, Any]) -> list[str]:
    """The names of all methods: those that the comparison lists, then others that have cells."""
    return list(dict.fromkeys([*comparison["methods"], *(cell["method"] for cell in comparison["cells"])]))


def steering_margins(comparison: Mapping[str, Any]) -> dict[str, Interval]:
    """Return the headroom of generated adapters minus the headroom of those generated with another task's condition.

    Returns:
        Margins on ``seen`` and ``unseen`` tasks for conditions from a text, and on ``seen, from examples`` and
        ``unseen, from examples`` where these were measured. The mean is NaN without a measurement.
    """
    headrooms = _headrooms(comparison)
    measured = {method for method, _ in headrooms}
    ways = [way for way in ("", FROM_EXAMPLES) if f"{GENERATED}{way}" in measured] or [""]
    return {
        f"{group},{way}" if way else group: _bootstrap(
            _difference(headrooms[f"{GENERATED}{way}", seen], headrooms[f"{GENERATED}{way}{ANOTHER_TASK}", seen])
        )
        for way in ways
        for group, seen in GROUPS.items()
    }


def findings(comparison: Mapping[str, Any]) -> list[Finding]:
    """Say in printable sentences what the generator recovers, whether its condition matters, and what beats it."""
    summaries = summarise(comparison)
    sentences = [
        *_result_sentences(summaries),
        *_steering_sentences(steering_margins(comparison)),
        *_rival_sentences(summaries),
        *_measurement_sentences(comparison),
    ]
    return [Finding(printable(text), warning) for text, warning in sentences]


def verdict(summaries: Sequence[MethodSummary]) -> str:
    """One sentence: what the generator recovers where it counts most, and the best baseline or control there.

    What counts most are unseen tasks, and seen ones where no unseen one was measured. Rivals are those that
    `summarise` compares with the same row of the generator: of its row from a text, none that was refined.
    """
    group = main_group(summaries)
    measured = {summary.method: found for summary in summaries if (found := summary.groups[group])}
    row = GENERATED if GENERATED in measured else f"{GENERATED}{FROM_EXAMPLES}"
    ours = measured.get(row)
    if ours is None:
        return f"The generator was not measured on {group} tasks."
    share = format_number(ours.headroom.mean)
    text = f"On {group} tasks the generator recovers {share} of what a LoRA of the task's own gains"
    like = {summary.method: summary.compared_with for summary in summaries if summary.method not in _NO_RIVALS}
    others = {name: found for name, found in measured.items() if name in like and name != ORIGINAL_MODEL}
    rivals = {name: found for name, found in others.items() if like[name] == row}
    if not rivals:
        return f"{text}."
    kind = " without examples" if row == GENERATED and len(rivals) < len(others) else ""
    name, best = max(rivals.items(), key=lambda pair: pair[1].headroom.mean)
    lead = ours.headroom.mean - best.headroom.mean
    word = "more than" if lead >= _LEAD else "less than" if lead <= -_LEAD else "as much as"
    return (
        f"{text}, {word} the best baseline or control{kind}, {printable(name)}: {format_number(best.headroom.mean)}."
    )


def main_group(summaries: Sequence[MethodSummary]) -> str:
    """``unseen`` where any method was measured on unseen tasks, otherwise ``seen``."""
    return "unseen" if any(summary.unseen for summary in summaries) else "seen"


def by_headroom(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    """The methods from the highest headroom in the main group to the lowest; those that were not measured last."""
    group = main_group(summaries)

    def height(summary: MethodSummary) -> float:
        found = summary.groups[group]
        return -math.inf if found is None or math.isnan(found.headroom.mean) else found.headroom.mean

    return sorted(summaries, key=height, reverse=True)


def failed_cells(comparison: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """The cells without a finite loss, each with the reason."""
    return [
        (cell, str(cell["error"] or f"the loss is {cell['loss']}"))
        for cell in comparison["cells"]
        if not _is_measured(cell)
    ]


def places_without_unit(comparison: Mapping[str, Any]) -> dict[Place, str]:
    """The places where headroom is undefined, each with the reason."""
    losses = _losses(comparison)
    reasons = {}
    for place in sorted({_place(cell) for cell in comparison["cells"]}):
        missing = [method for method in (ORIGINAL_MODEL, ORIGINAL_LORA) if (method, place) not in losses]
        if missing:
            reasons[place] = f"{' and '.join(missing)} not measured"
        elif math.isnan(_headroom(losses, place, ORIGINAL_LORA)):
            reasons[place] = "the original LoRA gains nothing over the original model"
    return reasons


def format_number(value: float | None, digits: int = 2) -> str:
    """Format a number for a table; "n/a" for None and for values that are not finite."""
    return "n/a" if value is None or not math.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def _place(cell: Mapping[str, Any]) -> Place:
    return Place(cell["task"], cell["fold"], cell["seed"])


def _is_measured(cell: Mapping[str, Any]) -> bool:
    return not cell["error"] and cell["loss"] is not None and math.isfinite(cell["loss"])


def _losses(comparison: Mapping[str, Any]) -> dict[tuple[str, Place], float]:
    """The measured cells' losses in nats per token, by method and place."""
    losses: dict[tuple[str, Place], float] = {}
    for cell in filter(_is_measured, comparison["cells"]):
        key = cell["method"], _place(cell)
        if key in losses:
            raise LoraFactoryError(
                f"{key[0]!r} was measured twice on {key[1]}; give each variant or condition a method name of its own"
            )
        losses[key] = cell["loss"]
    return losses


def _headroom(losses: Mapping[tuple[str, Place], float], place: Place, method: str) -> float:
    return headroom(losses[ORIGINAL_MODEL, place], losses[method, place], losses[ORIGINAL_LORA, place])


def _headrooms(comparison: Mapping[str, Any]) -> defaultdict[tuple[str, bool], dict[Place, float]]:
    """The headroom at every place where it is defined, by method and by whether the task was seen."""
    losses, unitless = _losses(comparison), places_without_unit(comparison)
    headrooms: defaultdict[tuple[str, bool], dict[Place, float]] = defaultdict(dict)
    for cell in filter(_is_measured, comparison["cells"]):
        if (place := _place(cell)) not in unitless:
            headrooms[cell["method"], cell["seen"]][place] = _headroom(losses, place, cell["method"])
    return headrooms


def _generated_like(method: str, measured: Collection[tuple[str, bool]]) -> str:
    """Name the generator's row that a method is compared with: the one with the same kind of condition."""
    names, from_examples = {name for name, _ in measured}, f"{GENERATED}{FROM_EXAMPLES}"
    if method.startswith(from_examples) or method.endswith(", refined"):
        return from_examples
    alike = UNREFINED if FROM_EXAMPLES in method else GENERATED
    return alike if alike in names else from_examples


def _difference(values: Mapping[Place, float], others: Mapping[Place, float]) -> dict[Place, float]:
    return {place: values[place] - others[place] for place in values if place in others}


def _summarise_group(values: Mapping[Place, float], generated: Mapping[Place, float]) -> GroupSummary | None:
    if not values:
        return None
    by_task = defaultdict(list)
    for place, value in values.items():
        by_task[place.task].append(value)
    worst_headroom, worst_task = min((fmean(cells), task) for task, cells in by_task.items())
    lead = _bootstrap(_difference(values, generated))
    return GroupSummary(_bootstrap(values), worst_task, worst_headroom, len(values), lead)


def _bootstrap(values: Mapping[Place, float]) -> Interval:
    """The mean over tasks, or over the seeds of a single task, and its percentile bootstrap interval (seeded)."""
    several = len({place.task for place in values}) > 1
    units = defaultdict(list)
    for place in sorted(values):
        units[place.task if several else place.seed].append(values[place])
    if not units:
        return Interval(math.nan, math.nan, math.nan)
    means = torch.tensor([fmean(cells) for cells in units.values()], dtype=torch.float64)
    if len(means) == 1:
        return Interval(float(means), math.nan, math.nan)
    drawn = torch.randint(len(means), (_RESAMPLES, len(means)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(means[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(means.mean()), low, high)


def _result_sentences(summaries: list[MethodSummary]) -> Iterator[Finding]:
    """Say how much of the original LoRA's gain the generator recovers."""
    for summary in summaries:
        if summary.method in OURS:
            how = summary.method.removeprefix(GENERATED)
            for name, group in summary.groups.items():
                if group:
                    yield Finding(
                        f"On {name} tasks{how} the generator recovers {group.headroom} of what each task's own LoRA "
                        f"gains; worst on {group.worst_task}: {format_number(group.worst_headroom)}."
                    )


def _steering_sentences(margins: Mapping[str, Interval]) -> Iterator[Finding]:
    """Say whether generated adapters depend on the condition."""
    for name, margin in margins.items():
        group, _, way = name.partition(",")
        where = f"On {group} tasks{way}"
        if margin.mean < NEEDED_MARGIN:
            yield Finding(
                f"{where} the generator ignores its condition: another task's condition serves it as well, "
                f"or nearly (steering margin {margin}; at least {NEEDED_MARGIN} is needed).",
                warning=True,
            )
        elif not math.isnan(margin.mean):
            yield Finding(f"{where} the generator follows its condition: steering margin {margin}.")


def _rival_sentences(summaries: list[MethodSummary]) -> Iterator[Finding]:
    """Name the controls and baselines that beat the generator, and the row of it that each is compared with."""
    for summary in summaries:
        row = "" if summary.compared_with == GENERATED else f' (row "{summary.compared_with}")'
        for name, group in summary.groups.items():
            if group and name in summary.beats_generator:
                doubt = "" if group.lead.low > 0 else ", which may be noise"
                yield Finding(
                    f"{summary.method} beats the generator{row} on {name} tasks by {group.lead} in headroom{doubt}.",
                    warning=True,
                )


def _measurement_sentences(comparison: Mapping[str, Any]) -> Iterator[Finding]:
    """Name the failed cells and the places where headroom is undefined."""
    failed, unitless = failed_cells(comparison), places_without_unit(comparison)
    if failed:
        yield Finding(
            f"{len(failed)} of {len(comparison['cells'])} cells failed; they are named below and enter no mean.",
            warning=True,
        )
    if unitless:
        places = "; ".join(f"{place}: {reason}" for place, reason in unitless.items())
        yield Finding(f"Without a unit there is no headroom, and none enters a mean: {places}.", warning=True)
