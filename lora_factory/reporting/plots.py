"""Draw the report's plots as SVG in light and dark colours; needs the extra ``report``."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_factory.utils.extras import require
from lora_factory.utils.printable import printable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 5.0  # inches of 72 SVG points: narrow, so that letters stay readable on a phone
INK, _FAINT, PAPER = "#1f2428", "#c9d1d9", "#fdfefe"  # what the dark rendering exchanges
_DARK = {INK: "#e6e9ec", _FAINT: "#3b434b", PAPER: "#16191d"}
# Middle tones that stand out from white and from near-black, and from each other for most colour-blind readers.
COLOURS = ("#1f83c4", "#d9822b", "#2a9d6e", "#c2569b", "#8a6fd1", "#b5942b", "#d2504a", "#7d8894")
_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Plot:
    """A plot in light and dark colours.

    Attributes:
        title: Its heading.
        caption: A sentence or two that explain it.
        light: The SVG for light pages as a data URI.
        dark: The SVG for dark pages as a data URI.
    """

    title: str
    caption: str
    light: str
    dark: str


class _Entry(NamedTuple):
    """One line of a legend."""

    name: str
    marker: str
    colour: str
    hollow: bool = False


def draw_plots(comparison: Mapping[str, Any]) -> list[Plot]:
    """Draw every plot that the comparison has data for.

    Args:
        comparison: What ``comparison.compare`` returns.

    Raises:
        LoraFactoryError: If matplotlib or scikit-learn is missing.
    """
    with svg_settings():
        return [
            *_point_plots(comparison.get("points", {})),
            *_curve_plots(comparison.get("curves", {})),
        ]


@contextmanager
def svg_settings() -> Iterator[None]:
    """Have matplotlib write text as SVG text, and the same bytes for the same numbers.

    Raises:
        LoraFactoryError: If matplotlib or scikit-learn is missing.
    """
    require("report", "the report", "matplotlib", "sklearn")
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora-factory", "text.parse_math": False}):
        yield


def project(rows: Sequence[Sequence[float]], *, neighbours: bool) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Project vectors to two dimensions.

    Args:
        rows: Vectors of shape ``(n, width)``.
        neighbours: Use t-SNE where there are 12 rows or more; otherwise PCA.

    Returns:
        Points of shape ``(n, 2)``, the name of the method, and names for its axes where these have a meaning.
    """
    import numpy as np

    values = np.asarray(rows, dtype=float).reshape(len(rows), -1)
    centred = values - values.mean(0)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    if not neighbours or len(rows) < 12:
        shares = np.pad(lengths**2 / max(float((lengths**2).sum()), 1e-12), (0, 2))[:2]
        names = ("first", "second")
        axes = tuple(
            f"{name} direction ({share:.0%} of the variance)" for name, share in zip(names, shares, strict=True)
        )
        return points, "PCA", axes
    from sklearn.manifold import TSNE

    start = points / max(float(points.std()), 1e-12) * 1e-4
    model = TSNE(perplexity=min(30.0, (len(rows) - 1) / 3), init=start, random_state=0)
    return model.fit_transform(centred), "t-SNE", ()


def _point_plots(points: Mapping[str, Mapping[str, Any]]) -> list[Plot]:
    """Draw task vectors, hidden states (Figure 2 of the paper), latents, and real beside generated weights."""
    shown = {
        "task vectors": (True, "Task vectors", "One point per task vector, coloured by task."),
        "hidden states": (True, "Hidden states", "One point per example's hidden state, coloured by task."),
        "latents": (False, "Latent space", "The generator's latent space, coloured by task."),
        "weights": (
            False,
            "Weights",
            "Real checkpoints beside generated adapters, in the checkpoints' main directions.",
        ),
    }
    plots = []
    for name, (neighbours, title, words) in shown.items():
        found = points.get(name, {"rows": []})
        kept = [index for index, row in enumerate(found["rows"]) if all(map(math.isfinite, row))]
        if len(kept) < 2:
            continue
        places, method, axes = project([found["rows"][index] for index in kept], neighbours=neighbours)
        labels, kinds = ([found[key][index] for index in kept] for key in ("labels", "kinds"))
        left_out = len(found["rows"]) - len(kept)
        words += f" {left_out} points that are not finite are left out." if left_out else ""
        words += " t-SNE keeps neighbours together; other distances have no meaning." if method == "t-SNE" else ""
        plots.append(render(_scatter(places, labels, kinds, axes), f"{title} ({method})", words))
    return plots


def _scatter(places: np.ndarray, labels: Sequence[str], kinds: Sequence[str], names: Sequence[str]) -> Figure:
    """Draw points coloured and shaped by task; those of the second kind are larger and hollow."""
    tasks, kind_names = sorted(set(labels)), sorted(set(kinds), key=list(kinds).index)
    figure, (axes,) = _figure(4.2)
    looks = _looks(tasks)
    for order, kind in enumerate(kind_names):
        for task in tasks:
            chosen = [index for index, pair in enumerate(zip(labels, kinds, strict=True)) if pair == (task, kind)]
            marker, colour = looks[task]
            axes.plot(
                places[chosen, 0],
                places[chosen, 1],
                marker,
                color=colour,
                markersize=7 + 4 * order,
                alpha=0.75 if order == 0 else 1,
                markerfacecolor=colour if order == 0 else "none",
                markeredgewidth=0.4 if order == 0 else 1.8,
            )
    if names:
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.grid(color=_FAINT, linewidth=0.5)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
    entries = [_Entry(shortened(task, 16), *looks[task]) for task in tasks]
    if len(kind_names) > 1:
        entries += [_Entry(f"({kind})", "o", INK, hollow=order > 0) for order, kind in enumerate(kind_names)]
    _legend(figure, entries)
    return figure


def _curve_plots(curves: Mapping[str, Sequence[Mapping[str, float | None]]]) -> list[Plot]:
    """Draw one plot per model (the part of a curve's name before the first comma), with one panel per quantity."""
    plots = []
    for model in dict.fromkeys(name.partition(",")[0] for name in curves):
        runs = {name: rows for name, rows in curves.items() if name.partition(",")[0] == model and rows}
        quantities = list(dict.fromkeys(key for rows in runs.values() for row in rows for key in row if key != "step"))
        if not quantities:
            continue
        figure, panels = _figure(0.6 + 1.7 * len(quantities), len(quantities))
        looks = _looks(runs)
        for axes, quantity in zip(panels, quantities, strict=True):
            lines = {name: _line(rows, "step", quantity) for name, rows in runs.items()}
            for name, (steps, values) in lines.items():
                axes.plot(steps, values, color=looks[name][1], linewidth=1.3)
            if all(not value <= 0 for _, values in lines.values() for value in values):
                axes.set_yscale("log", subs=[2, 5])
                for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                    axis_formatter(lambda value, _: f"{value:g}")
            axes.set_ylabel(quantity)
            axes.grid(axis="y", color=_FAINT, linewidth=0.5)
        panels[-1].set_xlabel("training step")
        _legend(figure, [_Entry(shortened(name.partition(",")[2] or name), "_", looks[name][1]) for name in runs], 3)
        plots.append(
            render(figure, f"Loss curves: {model}", "Training losses by step; gaps are values that were not finite.")
        )
    return plots


def _line(rows: Sequence[Mapping[str, float | None]], *keys: str) -> list[list[float]]:
    """The values of every key over the rows, NaN where a row has none."""
    return [[math.nan if (value := row.get(key)) is None else value for row in rows] for key in keys]


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Give every name a marker and a colour; 40 names get different pairs."""
    return dict(zip(names, zip(cycle(_MARKERS), cycle(COLOURS), strict=False), strict=False))


def shortened(text: str, length: int = 28) -> str:
    """Printable text of at most this many characters."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A transparent figure with panels above each other that share their horizontal axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
    rows = figure.subplots(panels, sharex=True, squeeze=False)[:, 0].tolist()
    for axes in rows:
        axes.set_facecolor("none")
        axes.tick_params(which="both", colors=INK, labelsize=10, length=0)
        axes.xaxis.label.set(color=INK, size=10)
        axes.yaxis.label.set(color=INK, size=10)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_FAINT)
        axes.set_axisbelow(True)
    return figure, rows


def _legend(figure: Figure, entries: Sequence[_Entry], columns: int = 3) -> None:
    """A legend under the panels."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], linestyle="", marker=marker, color=colour, fillstyle="none" if hollow else "full", markersize=8)
        for _, marker, colour, hollow in entries
    ]
    # The blank in front: matplotlib leaves out names that start with an underscore.
    figure.legend(
        lines,
        [f" {entry.name}" for entry in entries],
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handletextpad=0,
        columnspacing=1,
    )


def render(figure: Figure, title: str, caption: str) -> Plot:
    """Render a figure as light SVG, and replace three colours for the dark one."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    light = dark = buffer.getvalue()
    for colour, exchanged in _DARK.items():
        dark = dark.replace(colour, exchanged)
    return Plot(shortened(title, 80), caption, _data_uri(light), _data_uri(dark))


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
