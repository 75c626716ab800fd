"""The map of ranks on a terminal; with colours viridis says the rank too."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from drlora.report.heat_map import LEVELS, levels

VIRIDIS = ("#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#fde725")


def print_heat_map(rows: Sequence[Sequence[float]], console: Console) -> None:
    """The map with numbered layers and its scale; rows wider than the terminal are wrapped.

    Args:
        rows: ranks, one row a layer.
        console: where to.
    """
    low, high = min(map(min, rows)), max(map(max, rows))
    digits = len(str(len(rows) - 1))
    width = max(8, console.width - digits - 1)
    for layer, row in enumerate(rows):
        steps = levels(row, low, high)
        for first in range(0, len(steps), width):
            label = f"{layer:{digits}} " if first == 0 else " " * (digits + 1)
            line = Text(label, no_wrap=True)
            for level in steps[first : first + width]:
                line.append(LEVELS[level], style=VIRIDIS[level])
            console.print(line)
    scale = Text(f"{' ' * (digits + 1)}rank {low:g} ")
    for level, block in enumerate(LEVELS):
        scale.append(block, style=VIRIDIS[level])
    console.print(scale.append(f" {high:g}, one row a layer, one column an expert"))
