"""Draw the ranks of a run growing: one panel a layer, one row an expert, colour is the rank.

python tools/make_figures.py RUN [--out docs/images/ranks-growing.svg]

RUN is a run directory of `drlora train`, or any folder with a saved adapter and the growth.jsonl
of DrLoraCallback. The colours (viridis) can be told apart with every common colour blindness and
in grey, and the picture brings its own light background, so it reads on a dark page as well.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import safe_open

from drlora.report.style import save

DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "images" / "ranks-growing.svg"
INK, PAPER = "#1f2328", "#ffffff"
MOST_COLUMNS = 4

Ranks = dict[str, NDArray[np.float64]]
"""Block -> (events + 1, E) rank of each expert at the start and after each event."""


def read_experts(run: Path) -> dict[str, int]:
    """Block -> number of experts, in model order, from the saved adapter."""
    marker = ".experts.drlora_adapters.frequency"
    prefix = "base_model.model."
    with safe_open(run / "adapter_model.safetensors", framework="np") as file:
        sizes = {
            key.removeprefix(prefix).removesuffix(marker): file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118 - no mapping, and not iterable
            if key.endswith(marker)
        }
    return dict(sorted(sizes.items(), key=lambda item: _natural(item[0])))


def read_growth(run: Path) -> tuple[list[int], Ranks]:
    """Steps of the events, and the ranks before the first and after each of them.

    Where projections have ranks of their own, the rank is their mean.
    """
    config = json.loads((run / "adapter_config.json").read_text("utf-8"))
    grants = [json.loads(line) for line in (run / "growth.jsonl").read_text("utf-8").splitlines()]
    if not grants:
        raise SystemExit(f"{run / 'growth.jsonl'} holds no grant: no rank grew in this run")
    steps = sorted({grant["step"] for grant in grants})
    ranks = {
        block: np.full((len(steps) + 1, experts), float(config["r_init"]))
        for block, experts in read_experts(run).items()
    }
    event = {step: number for number, step in enumerate(steps, start=1)}
    for grant in grants:
        share = len(grant["projection"].split("+")) / len(config["projections"])
        ranks[grant["block"]][event[grant["step"]] :, grant["expert"]] += grant["granted"] * share
    return steps, ranks


def last_step(run: Path, steps: list[int]) -> int:
    """The last step of the run where result.json says it, else where one more event would be."""
    result = run / "result.json"
    if result.is_file():
        return int(json.loads(result.read_text("utf-8"))["steps"])
    return 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1


def draw(steps: list[int], ranks: Mapping[str, NDArray[np.float64]], end: int) -> Figure:
    """One panel a block: steps to the right, experts downwards."""
    columns = min(MOST_COLUMNS, len(ranks))
    rows = math.ceil(len(ranks) / columns)
    figure = Figure(figsize=(2.2 * columns + 1.0, 2.4 * rows + 0.7), layout="constrained")
    figure.set_facecolor(PAPER)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    highest = max(float(history.max()) for history in ranks.values())
    lowest = min(float(history.min()) for history in ranks.values())
    edges = [0, *steps, end]
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(ranks))
    for number, (axes, history) in enumerate(zip(grid.flat, ranks.values(), strict=False)):
        image = axes.pcolormesh(
            edges,
            np.arange(history.shape[1] + 1) - 0.5,
            history.T,
            cmap="viridis",
            vmin=lowest,
            vmax=highest,
            rasterized=history.size > 4000,
        )
        if history.shape[1] <= 32:
            axes.hlines(np.arange(1, history.shape[1]) - 0.5, 0, end, colors=PAPER, linewidths=0.5)
        _label(axes, number, columns, len(ranks))
    grid[0, 0].invert_yaxis()
    bar = figure.colorbar(image, ax=grid, label="rank", shrink=0.9, pad=0.02)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("Ranks of the experts while they train", fontsize=11)
    return figure


def _label(axes: Axes, number: int, columns: int, panels: int) -> None:
    axes.set_title(f"MoE layer {number}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="y", integer=True)
    axes.locator_params(axis="x", integer=True, nbins=4)
    if number % columns == 0:
        axes.set_ylabel("expert")
    if number + columns >= panels:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def main(arguments: list[str] | None = None) -> None:
    """Read a run, draw it, save it."""
    parser = argparse.ArgumentParser(description="Draw the ranks of a run growing.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the picture (.svg, .png)")
    options = parser.parse_args(arguments)
    style = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "path",
        "svg.hashsalt": "drlora",  # the same run gives the same file
    }
    with matplotlib.rc_context(style):
        steps, ranks = read_growth(options.run)
        figure = draw(steps, ranks, last_step(options.run, steps))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save(figure, options.out, dpi=150)
    print(options.out)


if __name__ == "__main__":
    main()
