"""Draw the method in two pictures: eight made-up experts, drlora's own allocator and rank book.

python tools/make_method_figures.py        writes docs/images/event.svg and docs/images/pool.svg
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from drlora.adapter.row_book import FREE, RankBook
from drlora.ranks.allocator import allocate
from drlora.ranks.saliency import saliency
from drlora.report.style import save

IMAGES = Path(__file__).parents[1] / "docs" / "images"
INK, PAPER, QUIET, STRONG = "#1f2328", "#ffffff", "#9aa5b1", "#b3541e"
EXPERTS, R_INIT, R_TARGET, R_MAX, CAP, GAMMA, EVENTS = 8, 4, 8, 16, 3, 1.2, 4
QUOTA = EXPERTS * (R_TARGET - R_INIT) // EVENTS
FREQUENCY = np.array([0.30, 0.05, 0.22, 0.10, 0.02, 0.15, 0.04, 0.12])
IMPORTANCE = np.array([0.8, 1.0, 1.5, 0.3, 0.9, 1.1, 0.2, 0.6])


def scores(ranks: list[int]) -> list[float]:
    """S = f g / (r + 1) ** gamma of the eight experts."""
    signals = (FREQUENCY, IMPORTANCE, np.array(ranks, float))
    return saliency(*(torch.from_numpy(x) for x in signals), GAMMA).tolist()


def events() -> list[RankBook]:
    """The book at the start and after each event."""
    book = RankBook.uniform(EXPERTS, EXPERTS * R_TARGET, R_INIT)
    found = [RankBook(book.owner_R.copy(), EXPERTS)]
    for _ in range(EVENTS):
        ranks = book.ranks().tolist()
        book.grant(allocate(scores(ranks), ranks=ranks, quota=QUOTA, cap=CAP, r_max=R_MAX))
        found.append(RankBook(book.owner_R.copy(), EXPERTS))
    return found


def draw_event() -> Figure:
    """One event from left to right: how much used, how much learnt, the rank, and the grants."""
    before = [R_INIT] * EXPERTS
    score = scores(before)
    grants = allocate(score, ranks=before, quota=QUOTA, cap=CAP, r_max=R_MAX)
    figure = Figure(figsize=(9, 2.6), layout="constrained", facecolor=PAPER)
    panels = figure.subplots(1, 4, sharey=True)
    titles = ("how much it is used\nf", "what its ranks learn\ng",
              "saliency\nS = f g / (r + 1)^γ", "ranks after the event\n(quota "
              f"{QUOTA}, at most {CAP} each)")  # fmt: skip
    for axes, title, values in zip(
        panels, titles, (FREQUENCY, IMPORTANCE, score, before), strict=True
    ):
        axes.barh(range(EXPERTS), values, color=QUIET)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[3].barh(range(EXPERTS), grants, left=before, color=STRONG)
    panels[0].set_ylabel("expert")
    panels[0].invert_yaxis()
    return figure


def draw_pool() -> Figure:
    """Rows of one pool at the start and after each event: owners change, rows stay."""
    books = events()
    figure = Figure(figsize=(9, 2.6), layout="constrained", facecolor=PAPER)
    axes: Axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, EXPERTS))
    for line, book in enumerate(books):
        for row, owner in enumerate(book.owner_R):
            is_free = owner == FREE
            axes.barh(
                line, 1, left=row, height=0.8, color=PAPER if is_free else colours[owner],
                edgecolor=QUIET, linewidth=0.4, hatch="////" if is_free else None,
            )  # fmt: skip
    axes.set_yticks(range(len(books)), ["start", *(f"event {n}" for n in range(1, len(books)))])
    axes.set_xlabel(f"row of the pool ({EXPERTS} experts x r_target {R_TARGET})", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    owners = [Patch(color=colours[e], label=f"expert {e}") for e in range(EXPERTS)]
    free = Patch(facecolor=PAPER, edgecolor=QUIET, hatch="////", label="free: B = 0, not read")
    axes.legend(handles=[*owners, free], fontsize=7, ncols=5, loc="upper center",
                bbox_to_anchor=(0.5, 1.28), frameon=False)  # fmt: skip
    return figure


def main() -> None:
    """Write both pictures."""
    style = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
             "svg.fonttype": "path", "svg.hashsalt": "drlora"}  # fmt: skip
    with matplotlib.rc_context(style):
        for name, figure in (("event", draw_event()), ("pool", draw_pool())):
            save(figure, IMAGES / f"{name}.svg")
            print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
