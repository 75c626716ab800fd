"""From what is known of a block's experts before the first step to their ranks; integers only.

Every function gives `total` ranks away, none below 1 (0 for experts that are not hot) and none
above `r_max`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from drlora.errors import ConfigError


def hot_ranks(share_E: Sequence[float], total: int, fraction: float, r_max: int) -> list[int]:
    """`total` ranks, evenly over the `fraction` of experts with most share; 0 for the others.

    At least one expert is hot; their number is rounded up. What does not divide goes to the
    hottest; ties go to the lower expert number.

        >>> hot_ranks([0.1, 0.5, 0.3, 0.1], total=9, fraction=0.5, r_max=5)
        [0, 5, 4, 0]

    Raises:
        ConfigError: if they would pass `r_max`.
    """
    count = math.ceil(fraction * len(share_E) - 1e-9)
    if total > count * r_max:
        raise ConfigError(
            f"hot_fraction={fraction} leaves {count} of {len(share_E)} experts for {total} ranks, "
            f"more than r_max={r_max} for each; raise r_max to {math.ceil(total / count)}."
        )
    hottest = sorted(range(len(share_E)), key=lambda e: (-share_E[e], e))[:count]
    ranks = [0] * len(share_E)
    for place, expert in enumerate(hottest):
        ranks[expert] = total // count + (place < total % count)
    return ranks


def proportional_ranks(share_E: Sequence[float], total: int, r_max: int) -> list[int]:
    """`total` ranks in proportion to `share_E`, each between 1 and `r_max`.

    One rank after the other goes to the expert with the most share for each rank it has (D'Hondt);
    ties go to the smaller rank, then to the lower expert number.

        >>> proportional_ranks([0.1, 0.6, 0.3], total=9, r_max=5)
        [1, 5, 3]
    """
    return _one_by_one([[share / rank for rank in range(1, r_max)] for share in share_E], total)


def strongest_ranks(strength_ED: Sequence[Sequence[float]], total: int, r_max: int) -> list[int]:
    """`total` ranks to the strongest directions, each expert between 1 and `r_max`.

    `strength_ED[e][d]` says what the direction d of expert e is worth, falling with d; an expert
    takes its directions in that order, and those beyond the last are worth nothing. Ties go to the
    smaller rank, then to the lower expert number.

        >>> strongest_ranks([[9.0, 4.0, 3.0], [8.0, 1.0, 0.5]], total=4, r_max=3)
        [3, 1]
    """
    worth = [list(row[1:r_max]) + [0.0] * (r_max - len(row)) for row in strength_ED]
    return _one_by_one(worth, total)


def _one_by_one(worth: Sequence[Sequence[float]], total: int) -> list[int]:
    """One rank for each expert, then the rest to the best offers.

    `worth[e][n]` is what expert e offers for its rank n + 2; it has no more places than offers.
    """
    ranks = [1] * len(worth)
    assert len(ranks) <= total <= sum(len(offers) + 1 for offers in worth)
    queue = [(-offers[0], 1, expert) for expert, offers in enumerate(worth) if offers]
    heapq.heapify(queue)
    for _ in range(total - len(ranks)):
        _, rank, expert = heapq.heappop(queue)
        ranks[expert] += 1
        if rank < len(worth[expert]):
            heapq.heappush(queue, (-worth[expert][rank], rank + 1, expert))
    return ranks
