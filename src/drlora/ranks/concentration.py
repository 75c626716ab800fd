"""How unequally ranks, or anything else, lie on experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

TOP = 0.1


def gini(values: ArrayLike) -> float:
    """Gini coefficient of values >= 0: 0 if all are equal, (n - 1) / n if one has everything."""
    sorted_N = np.sort(np.asarray(values, dtype=float))
    total = sorted_N.sum()
    if not total:
        return 0.0
    n = len(sorted_N)
    return float((2 * np.arange(1, n + 1) - n - 1) @ sorted_N / (n * total))


def top_share(values: ArrayLike) -> float:
    """Share of the sum that the largest tenth (at least one) of the values have."""
    sorted_N = np.sort(np.asarray(values, dtype=float))[::-1]
    total = sorted_N.sum()
    return float(sorted_N[: max(1, round(TOP * len(sorted_N)))].sum() / total) if total else 0.0
