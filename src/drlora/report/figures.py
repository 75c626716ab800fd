"""The report as one picture, for papers and pull requests: loss, ranks, concentration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from drlora.ranks.concentration import gini
from drlora.report.facts import last_routing, title
from drlora.report.read import NO_EXPERT, RankMap, RunRecord
from drlora.report.style import COLOURS, PAPER, STYLE, save

DASHES = ("-", "--", ":", "-.")


def draw_report(runs: Sequence[RunRecord], path: Path, format: str) -> None:
    """Draw the runs, one row each below the shared charts."""
    with matplotlib.rc_context(STYLE):
        height = 0.9 + 0.14 * max((len(m.blocks) for run in runs for m in run.maps), default=0)
        maps = [(run, rank_map) for run in runs for rank_map in run.maps]
        figure = Figure(figsize=(9, 3.0 + height * len(maps)), layout="constrained")
        figure.set_facecolor(PAPER)
        top, bottom = _halves(figure, height * len(maps))
        loss, concentration, scatter = top.subplots(1, 3)
        _loss(loss, runs)
        _gini(concentration, runs)
        _scatter(scatter, runs)
        if maps:
            _maps(bottom, maps, len(runs) > 1)
        figure.suptitle(_literal(title(runs)), fontsize=11)
        save(figure, path, format=format, dpi=160)


def _halves(figure: Figure, height: float) -> Any:
    """Above for the charts, below for the maps, which a run before its first event has not."""
    return figure.subfigures(2, 1, height_ratios=[3.0, height]) if height else (figure, None)


def _literal(text: str) -> str:
    """Matplotlib sets text between dollar signs as mathematics."""
    return text.replace("$", r"\$")


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def _loss(axes: Axes, runs: Sequence[RunRecord]) -> None:
    for number, run in enumerate(runs):
        steps, losses = [e["step"] for e in run.logs], [e["loss"] for e in run.logs]
        axes.plot(steps, losses, label=_literal(run.name), linewidth=1.2, **_look(number))
        for kind in ("before", "after"):
            found = run.measured(kind)
            if found and found["loss"]["loss"] is not None:
                step = 0 if kind == "before" else run.steps
                colour = _look(number)["color"]
                axes.plot([step], [found["loss"]["loss"]], "D", color=colour, markersize=4)
    if any(run.logs for run in runs):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title("Loss (diamonds: held out)", fontsize=9)
    axes.set_xlabel("step")
    if len(runs) > 1:
        axes.legend(fontsize=7, frameon=False)


def _gini(axes: Axes, runs: Sequence[RunRecord]) -> None:
    for number, run in _with_ranks(runs):
        rank_map = run.maps[0]
        edges = [0, *rank_map.events, run.steps]
        means = [_mean_gini(rank_map, ranks) for ranks in rank_map.history]
        axes.step(edges, [*means, means[-1]], where="post", **_look(number))
    axes.set_title("Gini coefficient of ranks", fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)


def _with_ranks(runs: Sequence[RunRecord]) -> list[tuple[int, RunRecord]]:
    return [(number, run) for number, run in enumerate(runs) if run.maps]


def _mean_gini(rank_map: RankMap, ranks: np.ndarray) -> float:
    rows = zip(ranks, rank_map.experts, strict=True)
    return float(np.mean([gini(row[:n]) for row, n in rows]))


def _scatter(axes: Axes, runs: Sequence[RunRecord]) -> None:
    for number, run in _with_ranks(runs):
        routing = last_routing(run.maps[0])
        if routing is not None:
            ranks = [rank for row in run.maps[0].final() for rank in row]
            shares = [share for row in routing for share in row]
            axes.plot(shares, ranks, ".", color=_look(number)["color"], markersize=3, alpha=0.7)
    axes.set_title("Rank against routing", fontsize=9)
    axes.set_xlabel("routing")


def _maps(figure: Any, maps: Sequence[tuple[RunRecord, RankMap]], named: bool) -> None:
    grid = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    lowest = min(m.history[m.history > NO_EXPERT].min() for _, m in maps)
    highest = max(m.history.max() for _, m in maps)
    for axes, (run, rank_map) in zip(grid, maps, strict=True):
        ranks = np.ma.masked_equal(rank_map.history[-1], NO_EXPERT)
        layers, experts = (np.arange(size + 1) - 0.5 for size in ranks.shape)
        image = axes.pcolormesh(
            experts,
            layers,
            ranks,
            cmap="viridis",
            vmin=lowest,
            vmax=highest,
            rasterized=ranks.size > 4000,
        )
        axes.invert_yaxis()
        axes.locator_params(axis="both", integer=True)
        axes.set_ylabel("layer")
        name = f"{run.name}: " if named else ""
        axes.set_title(_literal(f"{name}final ranks, {rank_map.projection}"), fontsize=9)
    grid[-1].set_xlabel("expert")
    figure.colorbar(image, ax=list(grid), label="rank", shrink=0.9, pad=0.02)
