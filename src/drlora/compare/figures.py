"""The figures of a comparison: gains, loss on the way, metric against parameters, final ranks.

Colours are Okabe and Ito's and viridis, which can be told apart with every common colour
blindness; methods also differ in their markers. The same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from drlora.compare.curves import curves, mean_curve
from drlora.compare.gains import gains_by_task
from drlora.compare.metrics import METRICS
from drlora.compare.results import Matrix
from drlora.compare.statistics import gain, interval
from drlora.report.style import COLOURS, INK, PAPER, STYLE, save

MARKERS = "osD^vP*X<>hp"
BUDGET_MARK = "@"


@dataclass(frozen=True)
class Part:
    """One part of a picture.

    Attributes:
        title: what it shows.
        rows: of its panels.
        columns: of its panels.
        height: of a row of panels, in inches.
        draw: puts the part onto a figure of its size.
    """

    title: str
    rows: int
    columns: int
    height: float
    draw: Callable[[SubFigure], None]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches, the title's line among them."""
        return 1.4 + 2.8 * self.columns, 0.9 + self.height * self.rows


def draw_figures(matrix: Matrix, path: Path) -> list[str]:
    """Draw what the results allow, one part below the other, into one SVG file.

    Returns:
        The titles of the parts.
    """
    return draw_parts(parts(matrix), path)


def draw_parts(found: Sequence[Part], path: Path) -> list[str]:
    """Draw some parts into one file; returns their titles."""
    widths, heights = zip(*(part.size for part in found), strict=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(widths), sum(heights)), layout="constrained")
        fields = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
        for part, (field,) in zip(found, fields, strict=True):
            if len(found) > 1:
                field.suptitle(part.title, fontsize=11, fontweight="bold", x=0.01, ha="left")
            part.draw(field)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path, facecolor=PAPER)
    return [part.title for part in found]


def parts(matrix: Matrix) -> list[Part]:
    """Gains over each baseline, loss on the way, metric against parameters, final ranks."""
    plan = matrix.plan
    metric, (models, tasks) = plan.metrics[0], (len(plan.models), len(plan.tasks))
    name = METRICS[metric].title
    found = []
    for baseline in plan.baselines if len(plan.methods) > 1 else []:
        height = 0.8 + 0.26 * (len(plan.methods) - 1)
        draw = partial(_gains, matrix, metric, baseline)
        found.append(Part(f"Gain over {baseline}: {name}", models, tasks, height, draw))
    if part := curves_part(matrix):
        found.append(part)
    found.append(budget_part(matrix))
    for model in plan.models:
        maps = _rank_maps(matrix, model)
        if known := [ranks for ranks in maps.values() if ranks is not None]:
            height = 0.45 + 0.16 * len(known[0])
            draw = partial(_ranks, matrix, maps)
            title = f"Final ranks, {model}, mean over seeds"
            found.append(Part(title, len(plan.methods), tasks, height, draw))
    return found


def curves_part(matrix: Matrix) -> Part | None:
    """Held-out loss over steps, where runs have it."""
    plan = matrix.plan
    places = [(m, t, method) for m in plan.models for t in plan.tasks for method in plan.methods]
    if not any(curves(matrix, place) for place in places):
        return None
    draw = partial(_curves, matrix)
    return Part("Held-out loss on the way", len(plan.models), len(plan.tasks), 2.4, draw)


def budget_part(matrix: Matrix) -> Part:
    """The metric against trainable parameters."""
    plan, metric = matrix.plan, matrix.plan.metrics[0]
    title = f"{METRICS[metric].title.capitalize()} against trainable parameters"
    draw = partial(_budget, matrix, metric)
    return Part(title, len(plan.models), len(plan.tasks), 2.4, draw)


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _gains(matrix: Matrix, metric: str, baseline: str, figure: SubFigure) -> None:
    """One panel a model and task; one row a method: its gain and 95 % interval, and each seed."""
    plan = matrix.plan
    others = [method for method in plan.methods if method != baseline]
    grid = figure.subplots(len(plan.models), len(plan.tasks), squeeze=False)
    for model, row in zip(plan.models, grid, strict=True):
        for task, axes in zip(plan.tasks, row, strict=True):
            axes.axvline(0, color=INK, linewidth=0.8)
            for number, method in enumerate(others):
                pairs = gains_by_task(matrix, metric, model, {task: baseline}, method)[task]
                _gain_row(axes, number, pairs)
            axes.set_yticks(range(len(others)), others if axes is row[0] else [])
            axes.set_ylim(len(others) - 0.5, -0.5)
            axes.set_title(f"{model}, {task}", fontsize=9)
            axes.locator_params(axis="x", nbins=4)
    figure.supxlabel(f"gain over {baseline} (right is better)", fontsize=9)


def _gain_row(axes: Axes, number: int, pairs: dict[int, float]) -> None:
    found = gain(pairs)
    if found is None:
        return
    look = _look(number)
    d = found.difference
    axes.plot(list(pairs.values()), [number + 0.22] * len(pairs), ".", color="#777777", ms=3)
    if d.low is not None and d.high is not None:
        axes.plot([d.low, d.high], [number, number], color=look["color"], linewidth=1.6)
    axes.plot([d.mean], [number], linestyle="none", markersize=5, **look)


def _curves(matrix: Matrix, figure: SubFigure) -> None:
    """Mean held-out loss over steps, without its first tenth, where it falls from far above."""
    plan = matrix.plan
    grid = figure.subplots(len(plan.models), len(plan.tasks), squeeze=False)
    for model, row in zip(plan.models, grid, strict=True):
        for task, axes in zip(plan.tasks, row, strict=True):
            for number, method in enumerate(plan.methods):
                points = mean_curve(curves(matrix, (model, task, method)))
                shown = [p for p in points if p[0] > points[-1][0] / 10] or points
                if shown:
                    axes.plot(*zip(*shown, strict=True), label=method, markersize=4,
                              **_look(number))  # fmt: skip
            axes.set_title(f"{model}, {task}", fontsize=9)
        row[0].set_ylabel("held-out loss (nats a token)")
    figure.supxlabel("optimizer steps", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _budget(matrix: Matrix, metric: str, figure: SubFigure) -> None:
    """Metric over trainable parameters; methods named METHOD@BUDGET are joined by a line."""
    plan = matrix.plan
    families = list(dict.fromkeys(method.partition(BUDGET_MARK)[0] for method in plan.methods))
    grid = figure.subplots(len(plan.models), len(plan.tasks), squeeze=False)
    for model, row in zip(plan.models, grid, strict=True):
        for task, axes in zip(plan.tasks, row, strict=True):
            for number, family in enumerate(families):
                _budget_line(axes, matrix, metric, model, task, family, number)
            axes.set_title(f"{model}, {task}", fontsize=9)
            axes.locator_params(axis="y", nbins=4)
            _show_sizes(axes, _sizes(matrix, model, task))
        row[0].set_ylabel(METRICS[metric].title)
    figure.supxlabel("trainable parameters", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _sizes(matrix: Matrix, model: str, task: str) -> list[int]:
    """Trainable parameters of the runs, each size once, ascending."""
    places = [(model, task, method) for method in matrix.plan.methods]
    return sorted({run["trainable_parameters"] for p in places for run in matrix.finished(p)})


def _show_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis, for budgets double, that names the sizes that stand far enough apart."""
    if not sizes:
        return
    apart = max(1.5, (sizes[-1] / sizes[0]) ** 0.2)
    shown: list[int] = []
    for size in sizes:
        if not shown or size >= apart * shown[-1]:
            shown.append(size)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))


def _budget_line(
    axes: Axes, matrix: Matrix, metric: str, model: str, task: str, family: str, number: int
) -> None:
    points = []
    for method in matrix.plan.methods:
        values = matrix.values(metric, (model, task, method))
        if method.partition(BUDGET_MARK)[0] == family and values:
            runs = matrix.finished((model, task, method))
            size = fmean(run["trainable_parameters"] for run in runs)
            found = interval(list(values.values()))
            points.append(
                (size, found.mean, 0.0 if found.high is None else found.high - found.mean)
            )
    points.sort()
    if points:
        sizes, means, halves = zip(*points, strict=True)
        axes.errorbar(sizes, means, halves, label=family, markersize=5, **_look(number))


def _rank_maps(matrix: Matrix, model: str) -> dict[tuple[str, str], np.ndarray | None]:
    """(method, task) -> mean final ranks, None where no run is finished."""
    plan = matrix.plan
    return {
        (method, task): _rank_map(matrix, model, task, method)
        for method in plan.methods
        for task in plan.tasks
    }


def _ranks(
    matrix: Matrix, maps: dict[tuple[str, str], np.ndarray | None], figure: SubFigure
) -> None:
    """One panel a method and task: layers downwards, experts to the right, colour is the rank."""
    plan = matrix.plan
    known = [ranks for ranks in maps.values() if ranks is not None]
    highest = max(float(ranks.max()) for ranks in known)
    grid = figure.subplots(len(plan.methods), len(plan.tasks), squeeze=False)
    for method, row in zip(plan.methods, grid, strict=True):
        for task, axes in zip(plan.tasks, row, strict=True):
            ranks = maps[method, task]
            if ranks is None:
                axes.set_visible(False)
                continue
            image = axes.pcolormesh(ranks, cmap="viridis", vmin=0, vmax=highest)
            axes.set_ylim(len(ranks), 0)
            axes.set_yticks([])
            axes.set_xticks([])
            axes.set_title(f"{method}, {task}", fontsize=8)
    figure.supylabel("MoE layer", fontsize=9)
    figure.supxlabel("expert", fontsize=9)
    figure.colorbar(image, ax=grid, label="rank", shrink=0.6)


def _rank_map(matrix: Matrix, model: str, task: str, method: str) -> np.ndarray | None:
    """Mean final rank over seeds and projections, (layers, E)."""
    runs = matrix.finished((model, task, method))
    if not runs:
        return None
    return np.mean([[_mean_rows(block) for block in run["ranks"].values()] for run in runs], axis=0)


def _mean_rows(projections: dict[str, Sequence[int]]) -> list[float]:
    return [fmean(ranks) for ranks in zip(*projections.values(), strict=True)]
