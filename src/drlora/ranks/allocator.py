"""Who gets how many ranks at an event. Knows no model, no schedule and no step.

Experts are visited by falling saliency; each gets the smallest of three: the cap of one event,
its room below r_max, and what is left of the quota (arXiv 2601.04823, Algorithm 1).

    >>> allocate([0.5, 2.0, 1.0], ranks=[4, 4, 4], quota=5, cap=3, r_max=8)
    [0, 3, 2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def allocate(
    saliency: Sequence[float], *, ranks: Sequence[int], quota: int, cap: int, r_max: int
) -> list[int]:
    """Grants of one event.

    Args:
        saliency: (E,) S_i, finite.
        ranks: (E,) current ranks, each at most `r_max`.
        quota: ranks to hand out, >= 0.
        cap: most ranks one expert may gain.
        r_max: no expert passes it.

    Returns:
        (E,) grants: >= 0, at most `quota` together. Ties go to the lower expert number.

    Raises:
        ValueError: if a saliency is not finite or the lengths differ.
    """
    return allocate_in_layers(
        saliency,
        ranks=ranks,
        quota=quota,
        cap=cap,
        r_max=r_max,
        sizes=[len(ranks)],
        reserved=[0],
    )


def allocate_in_layers(
    saliency: Sequence[float],
    *,
    ranks: Sequence[int],
    quota: int,
    cap: int,
    r_max: int,
    sizes: Sequence[int],
    reserved: Sequence[int],
) -> list[int]:
    """As `allocate`, over the experts of several layers, with a part of the quota for each layer.

    Experts are visited once for what is free to them: the reserved part of their own layer, then
    what nobody reserved. What is then left over of a reserved part goes to all, so that as much of
    the quota is spent as without reserved parts.

        >>> allocate_in_layers([4, 3, 2, 1], ranks=[1] * 4, quota=6, cap=9, r_max=9,
        ...                    sizes=[2, 2], reserved=[0, 2])
        [4, 0, 2, 0]

    Args:
        saliency, ranks: layer after layer.
        quota, cap, r_max: as for `allocate`.
        sizes: experts of each layer.
        reserved: ranks of the quota that only this layer's experts may have; at most `quota`
            together.
    """
    if len(saliency) != len(ranks):
        raise ValueError(f"{len(saliency)} saliencies for {len(ranks)} ranks.")
    for expert, value in enumerate(saliency):
        if not math.isfinite(value):
            raise ValueError(f"the saliency of expert {expert} is {value}, not a finite number.")
    order = sorted(range(len(ranks)), key=lambda e: (-saliency[e], e))
    layer_of = [layer for layer, size in enumerate(sizes) for _ in range(size)]
    own = list(reserved)
    shared = max(0, quota) - sum(own)
    assert shared >= 0 and len(layer_of) == len(ranks)
    grants = [0] * len(ranks)
    for expert in order:
        layer = layer_of[expert]
        grants[expert] = max(0, min(cap, r_max - ranks[expert], own[layer] + shared))
        from_own = min(own[layer], grants[expert])
        own[layer] -= from_own
        shared -= grants[expert] - from_own
    left = shared + sum(own)
    for expert in order:
        more = max(0, min(cap - grants[expert], r_max - ranks[expert] - grants[expert], left))
        grants[expert] += more
        left -= more
    return grants


def reserve(granted: Sequence[int], sizes: Sequence[int], *, due: int, share: float) -> list[int]:
    """What each layer still lacks of its floor: `share` of an equal part of what is due by now.

        >>> reserve([5, 1], sizes=[4, 4], due=8, share=0.5)
        [0, 1]

    Args:
        granted: ranks that each layer was granted so far.
        sizes: experts of each layer.
        due: ranks to have been granted in all after this event.
        share: from 0 (layers compete for everything) to 1 (every layer has its own budget).
    """
    left = max(0, due - sum(granted))
    reserved = []
    for so_far, size in zip(granted, sizes, strict=True):
        lacking = math.floor(share * due * size / sum(sizes)) - so_far
        reserved.append(max(0, min(lacking, left)))
        left -= reserved[-1]
    return reserved


def take_back(
    saliency: Sequence[float],
    *,
    ranks: Sequence[int],
    quota: int,
    share: float,
    cap: int,
    r_max: int,
) -> list[int]:
    """Ranks that experts give up so that others can have them.

    The less salient half of the experts gives, from the least salient one up, at most `cap` each
    and never its last rank; together at most `share` of all ranks, and no more than those that
    give nothing can take in beside the quota.

        >>> take_back([0, 1, 5, 9], ranks=[4, 4, 4, 4], quota=1, share=0.25, cap=3, r_max=9)
        [3, 1, 0, 0]

    Args:
        saliency, ranks, quota, cap, r_max: as for `allocate`.
        share: from 0 to 1.
    """
    order = sorted(range(len(ranks)), key=lambda e: (saliency[e], -e))
    halfway = len(order) // 2
    room = sum(max(0, min(cap, r_max - ranks[e])) for e in order[halfway:])
    left = min(math.floor(share * sum(ranks) + 1e-9), room - quota)
    taken = [0] * len(ranks)
    for expert in order[:halfway]:
        taken[expert] = max(0, min(cap, ranks[expert] - 1, left))
        left -= taken[expert]
    return taken


def least_important(
    scores: Sequence[Sequence[float]], owners: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """The `count` owned rows of least score, over several pools; ties go to the lowest row.

        >>> least_important([[3.0, 1.0, 0.0], [2.0, 5.0]], [[0, 1, -1], [0, 0]], count=2)
        [[1], [0]]

    Args:
        scores: one score a row, pool by pool.
        owners: the expert of each row, negative if it is free.
        count: rows to choose.
    """
    candidates = [
        (score, pool, row)
        for pool, (of_pool, owner) in enumerate(zip(scores, owners, strict=True))
        for row, score in enumerate(of_pool)
        if owner[row] >= 0
    ]
    chosen = sorted(candidates)[:count]
    return [sorted(row for _, p, row in chosen if p == pool) for pool in range(len(scores))]
