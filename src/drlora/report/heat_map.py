"""Ranks as a map of characters, layers downwards and experts to the right.

Each expert is one block whose height is its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

LEVELS = "▁▂▃▄▅▆▇█"


def levels(row: Sequence[float], low: float, high: float) -> list[int]:
    """Which of the LEVELS each value is; the lowest is `low`, the highest `high`."""
    unit = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return [round((value - low) * unit) for value in row]


def block_lines(rows: Sequence[Sequence[float]], low: float, high: float) -> list[str]:
    """One line a row, one character a value."""
    return ["".join(LEVELS[level] for level in levels(row, low, high)) for row in rows]
