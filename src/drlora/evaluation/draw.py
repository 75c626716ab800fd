"""Which held-out examples are measured where there are more than are wanted.

They are drawn at random over the whole data, for a file may be sorted; always the same of as many,
so that what is measured before and after training, and by `drlora eval` later, is comparable.
"""

from __future__ import annotations

import random

from datasets import Dataset

_SEED = 20260111


def drawn(total: int, wanted: int | None, how: str = "random") -> list[int]:
    """Rows of `total`, in order: all of them, or `wanted` of them.

    Args:
        total: how many there are.
        wanted: how many to take; None for all.
        how: `random`, or `front` for the first ones.

    >>> drawn(1000, 4), drawn(3, 4)
    ([475, 496, 671, 972], [0, 1, 2])
    """
    if wanted is None or wanted >= total:
        return list(range(total))
    if how == "front":
        return list(range(wanted))
    return sorted(random.Random(_SEED).sample(range(total), wanted))


def draw(rows: Dataset, wanted: int | None, how: str = "random") -> Dataset:
    """The rows that `drawn` names."""
    return rows.select(drawn(len(rows), wanted, how))
