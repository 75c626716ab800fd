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
    if len(saliency) != len(ranks):
        raise ValueError(f"{len(saliency)} saliencies for {len(ranks)} ranks.")
    for expert, value in enumerate(saliency):
        if not math.isfinite(value):
            raise ValueError(f"the saliency of expert {expert} is {value}, not a finite number.")
    grants = [0] * len(ranks)
    left = quota
    for expert in sorted(range(len(ranks)), key=lambda e: (-saliency[e], e)):
        if left <= 0:
            break
        grants[expert] = max(0, min(cap, r_max - ranks[expert], left))
        left -= grants[expert]
    return grants
