"""How many ranks growth is certain to grant, whatever the saliency will be; whole numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from drlora.config.adapter import DrLoraConfig
from drlora.ranks.schedule import GrowthPlan


def certain_ranks(
    config: DrLoraConfig,
    num_experts: int,
    plan: GrowthPlan,
    start: Sequence[int] | None = None,
    first_event: int = 1,
) -> int:
    """Ranks that are owned at the end whatever the saliency is; the plan's all if it is good.

    Args:
        config: the settings.
        num_experts: E.
        plan: what becomes due when, and the cap.
        start: (E,) ranks before `first_event`; None if all are r_init.
        first_event: events before it (from 1) grant nothing.
    """
    ranks_E = np.sort(np.array(start or [config.r_init] * num_experts))[::-1]
    dues = [plan.due(event) for event in range(first_event, len(plan.event_steps) + 1)]
    base = num_experts * config.r_init
    if not dues or _is_always_spent(ranks_E, dues, base, plan.cap, config.r_max):
        return max(int(ranks_E.sum()), base + (dues[-1] if dues else 0))
    return _under_worst_saliency(ranks_E, dues, base, plan.cap, config.r_max)


def _is_always_spent(
    ranks_E: np.ndarray, dues: Sequence[int], base: int, cap: int, r_max: int
) -> bool:
    """Whether every event can hand out what is due, by the least that experts can ever take.

    They take least where few have all the room: sum min(cap, room_e) is concave.
    """
    most, owned = int(r_max - ranks_E.min()), int(ranks_E.sum())
    for due in dues:
        room = len(ranks_E) * r_max - owned
        whole, rest = divmod(room, most) if most else (0, 0)
        quota = max(0, due - (owned - base))
        if whole * min(cap, most) + min(cap, rest) < quota:
            return False
        owned += quota
    return True


def _under_worst_saliency(
    ranks_E: np.ndarray, dues: Sequence[int], base: int, cap: int, r_max: int
) -> int:
    """The least sum of ranks at the end, over saliencies that neglect some experts to the last.

    The others are kept as even as they can be, so that they go on taking all that is due; who was
    neglected then cannot take the rest. That no saliency is worse is tested against all of them.
    """
    experts = len(ranks_E)
    # One row for each number of neglected experts, which are those with the most room.
    ranks_ME = np.tile(ranks_E, (experts + 1, 1))
    is_last_ME = np.arange(experts) >= experts - np.arange(experts + 1)[:, None]
    for due in dues:
        order_ME = np.argsort(ranks_ME + is_last_ME * (r_max + 1), axis=1, kind="stable")
        takes_ME = np.minimum(cap, r_max - np.take_along_axis(ranks_ME, order_ME, 1))
        before_ME = takes_ME.cumsum(1) - takes_ME
        quota_M = np.maximum(0, due - (ranks_ME.sum(1) - base))
        grants_ME = np.clip(quota_M[:, None] - before_ME, 0, takes_ME)
        grown_ME = np.take_along_axis(ranks_ME, order_ME, 1) + grants_ME
        np.put_along_axis(ranks_ME, order_ME, grown_ME, 1)
    return int(ranks_ME.sum(1).min())
