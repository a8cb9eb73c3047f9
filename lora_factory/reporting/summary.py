"""What a comparison's cells say: headroom with bootstrap intervals, steering margins, and the findings in words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lora_factory.errors import LoraFactoryError


def headroom(base_loss: float, adapter_loss: float, original_loss: float) -> float:
    """The share of what the task's own LoRA gains that an adapter recovers: 0 is the base model, 1 the original LoRA.

    Args:
        base_loss: Loss of the base model, in nats a token.
        adapter_loss: Loss of the adapter in question.
        original_loss: Loss of the LoRA that was fine-tuned on the task.

    Returns:
        ``(base - adapter) / (base - original)``; NaN where the original LoRA gains nothing, so that there is no unit.
    """
    gain = base_loss - original_loss
    return (base_loss - adapter_loss) / gain if gain > 0 else math.nan


GENERATED = "generated"
FROM_EXAMPLES = " from examples"  # how the name of what is conditioned on examples ends, instead of on a text
ANOTHER_TASK = ", another task"
GIBBERISH = f"{GENERATED}, gibberish"
UNIFORM_SOUP = "uniform soup"
ORIGINAL_MODEL = "original model"
ORIGINAL_LORA = "original LoRA"
ORIGINALS = frozenset({ORIGINAL_LORA, "original LoRA, best"})
_OURS = {GENERATED, f"{GENERATED}{FROM_EXAMPLES}"}
UNREFINED = f"{GENERATED}{FROM_EXAMPLES}, unrefined"
_VARIANTS = {UNREFINED, f"{GENERATED} from text and examples, unrefined", f"{GENERATED}{FROM_EXAMPLES}, best of 4"}
_NO_RIVALS = ORIGINALS | _OURS | _VARIANTS | {f"{name}, sampled" for name in _OURS}  # neither a control nor a baseline
GROUPS = {"seen": True, "unseen": False}
NEEDED_MARGIN = 0.1
_LEAD = 0.005  # what two decimals show
_RESAMPLES = 2000


class Place(NamedTuple):
    """Where a cell was measured; what is compared shares it."""

    task: str
    fold: int
    seed: int

    def __str__(self) -> str:
        """The place in words."""
        return f"{self.task} (fold {self.fold}, seed {self.seed})"


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap 95 % confidence interval, whose bounds are NaN where there are fewer than two units."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """The mean with its interval, for example ``0.85 [0.80, 0.90]``."""
        bounds = f" [{format_number(self.low)}, {format_number(self.high)}]"
        return format_number(self.mean) + ("" if math.isnan(self.low) else bounds)


@dataclass(frozen=True)
class GroupSummary:
    """One method on the seen or on the unseen tasks.

    Attributes:
        headroom: Share of the original LoRA's gain that the method recovers.
        worst_task: The task with the lowest mean headroom.
        worst_headroom: That task's mean.
        cells: Number of measured cells.
        lead: By how much the method's headroom is above the generator's, over the cells that both have.
    """

    headroom: Interval
    worst_task: str
    worst_headroom: float
    cells: int
    lead: Interval


@dataclass(frozen=True)
class MethodSummary:
    """One method of a comparison.

    Attributes:
        method: Its name.
        seen: Its figures on seen tasks; None without a measured cell.
        unseen: Its figures on unseen tasks; None without a measured cell.
        failed: Number of its failed cells, which enter no mean.
        token_budget: Training tokens that went through the base model, in all; None if unknown.
        beats_generator: "seen" and "unseen", as far as this control or baseline recovers more than the generator.
    """

    method: str
    seen: GroupSummary | None
    unseen: GroupSummary | None
    failed: int
    token_budget: int | None
    beats_generator: tuple[str, ...]

    @property
    def groups(self) -> dict[str, GroupSummary | None]:
        """``seen`` and ``unseen`` by name."""
        return {"seen": self.seen, "unseen": self.unseen}


@dataclass(frozen=True)
class Finding:
    """One sentence about a comparison; a warning is bad news for the generator or for the measurement."""

    text: str
    warning: bool = False


def summarise(comparison: Mapping[str, Any]) -> list[MethodSummary]:
    """Summarise every method of a comparison, in its order.

    A task counts once: its folds and seeds are averaged before tasks are resampled for the intervals, since they
    share what was measured, and methods differ in what a seed changes. A method conditioned on examples is compared
    with the generator conditioned on examples, every other one with the generator conditioned on a text. Failed cells
    enter no mean, nor do places without a unit, where the original LoRA gains nothing over the original model.

    Args:
        comparison: What ``comparison.compare`` returns.

    Raises:
        LoraFactoryError: If a method was measured twice at one place.
    """
    headrooms = _headrooms(comparison)
    failed = [cell["method"] for cell, _ in failed_cells(comparison)]
    summaries = []
    for method in method_names(comparison):
        groups = {
            group: _summarise_group(headrooms[method, seen], headrooms[_generated_like(method, headrooms), seen])
            for group, seen in GROUPS.items()
        }
        beats = [
            name for name, group in groups.items() if group and method not in _NO_RIVALS and group.lead.mean >= _LEAD
        ]
        budget = comparison.get("budgets", {}).get(method)
        summaries.append(
            MethodSummary(
                method, **groups, failed=failed.count(method), token_budget=budget, beats_generator=tuple(beats)
            )
        )
    return summaries


def method_names(comparison: Mapping[str, Any]) -> list[str]:
    """Every method, first those that the comparison lists."""
    return list(dict.fromkeys([*comparison["methods"], *(cell["method"] for cell in comparison["cells"])]))


def steering_margins(comparison: Mapping[str, Any]) -> dict[str, Interval]:
    """Headroom of the generated adapters minus that of those generated for another task, over the cells of both.

    Returns:
        The margin on ``seen`` and on ``unseen`` tasks, for conditions from a text; the same for conditions from
        examples (``seen, from examples``) where they were measured. A mean is NaN where nothing was.
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
    """Say in words what the numbers mean: results, steering, who beats the generator, what failed or has no unit."""
    summaries = summarise(comparison)
    return [
        *_result_sentences(summaries),
        *_steering_sentences(steering_margins(comparison)),
        *_rival_sentences(summaries),
        *_measurement_sentences(comparison),
    ]


def failed_cells(comparison: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """The cells that hold no usable loss, each with the reason."""
    return [
        (cell, str(cell["error"] or f"the loss is {cell['loss']}"))
        for cell in comparison["cells"]
        if not _is_measured(cell)
    ]


def places_without_unit(comparison: Mapping[str, Any]) -> dict[Place, str]:
    """The places where headroom has no unit, each with the reason."""
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
    """A number for a table, or "n/a" where there is none."""
    return "n/a" if value is None or not math.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def _place(cell: Mapping[str, Any]) -> Place:
    return Place(cell["task"], cell["fold"], cell["seed"])


def _is_measured(cell: Mapping[str, Any]) -> bool:
    return not cell["error"] and cell["loss"] is not None and math.isfinite(cell["loss"])


def _losses(comparison: Mapping[str, Any]) -> dict[tuple[str, Place], float]:
    """The measured cells' losses in nats a token, by method and place."""
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
    """The headroom at every place that has a unit, by method and by whether the task was seen."""
    losses, unitless = _losses(comparison), places_without_unit(comparison)
    headrooms: defaultdict[tuple[str, bool], dict[Place, float]] = defaultdict(dict)
    for cell in filter(_is_measured, comparison["cells"]):
        if (place := _place(cell)) not in unitless:
            headrooms[cell["method"], cell["seen"]][place] = _headroom(losses, place, cell["method"])
    return headrooms


def _generated_like(method: str, measured: Collection[tuple[str, bool]]) -> str:
    """The generator's row that a method is compared with: the one that makes of the same what it does."""
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
    """The mean over tasks, or over the seeds of an only task, and its percentile bootstrap interval.

    The resamples come from a seeded generator of their own.
    """
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
    """How much of the original LoRA's gain the generator recovers."""
    for summary in summaries:
        if summary.method in _OURS:
            how = summary.method.removeprefix(GENERATED)
            for name, group in summary.groups.items():
                if group:
                    yield Finding(
                        f"On {name} tasks{how} the generator recovers {group.headroom} of what each task's own LoRA "
                        f"gains; worst on {group.worst_task}: {format_number(group.worst_headroom)}."
                    )


def _steering_sentences(margins: Mapping[str, Interval]) -> Iterator[Finding]:
    """Whether the generator listens to its condition."""
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
    """Which controls and baselines beat the generator."""
    for summary in summaries:
        for name, group in summary.groups.items():
            if group and name in summary.beats_generator:
                doubt = "" if group.lead.low > 0 else ", which may be noise"
                yield Finding(
                    f"{summary.method} beats the generator on {name} tasks by {group.lead} in headroom{doubt}.",
                    warning=True,
                )


def _measurement_sentences(comparison: Mapping[str, Any]) -> Iterator[Finding]:
    """What the means leave out."""
    failed, unitless = failed_cells(comparison), places_without_unit(comparison)
    if failed:
        yield Finding(
            f"{len(failed)} of {len(comparison['cells'])} cells failed; they are named below and enter no mean.",
            warning=True,
        )
    if unitless:
        places = "; ".join(f"{place}: {reason}" for place, reason in unitless.items())
        yield Finding(f"Without a unit there is no headroom, and none enters a mean: {places}.", warning=True)
