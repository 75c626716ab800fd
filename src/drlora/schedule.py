"""When ranks grow, and how many become due at each event.

Events stand `grow_every` steps apart, the first one `grow_every` steps after the warm-up, none in
the last `settle_steps` steps. The quota is counted in ranks of LoRA modules, as in the paper:

    Q = ceil(n_modules * (r_target - r_init) / n_events)        n_modules = E * projections

A grant of one rank to an expert whose projections share a rank costs as many module ranks as it
has projections. What an event cannot spend stays due at the next one, so the sum of ranks ends at
the budget exactly. Settings for which that cannot be promised are refused here, with the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from drlora.allocator import allocate
from drlora.config import DrLoraConfig
from drlora.errors import ConfigError


@dataclass(frozen=True)
class GrowthPlan:
    """The growth of one pool group (the experts of a block that compete for ranks) over a run.

    Attributes:
        event_steps: the optimizer steps (counted from 1) after which ranks grow.
        quota: Q, module ranks that become due at each event.
        cost: module ranks that one rank of an expert costs.
        budget: expert ranks to hand out in all, E * (r_target - r_init).
        start: expert ranks owned at the start, E * r_init.
    """

    event_steps: tuple[int, ...]
    quota: int
    cost: int
    budget: int
    start: int

    def event_number(self, step: int) -> int:
        """k if the k-th event (from 1) falls on `step`, else 0."""
        if not self.event_steps or step not in range(self.event_steps[0], self.event_steps[-1] + 1):
            return 0
        first, spacing = self.event_steps[0], self.spacing
        return (step - first) // spacing + 1 if (step - first) % spacing == 0 else 0

    @property
    def spacing(self) -> int:
        """Steps between two events (1 if there is only one)."""
        return self.event_steps[1] - self.event_steps[0] if len(self.event_steps) > 1 else 1

    def due(self, event: int) -> int:
        """Expert ranks that may have been granted in all once event number `event` is over."""
        return min(self.budget, event * self.quota // self.cost)

    def owned(self, event: int) -> int:
        """Expert ranks that may be owned once event number `event` is over."""
        return self.start + self.due(event)


@dataclass(frozen=True)
class PruningPlan(GrowthPlan):
    """Ranks that are taken away, `budget` of them in all: AdaLoRA's schedule.

    What is left to take falls with the cube of the time that is left (arXiv 2303.10512, eq. 12).
    """

    def due(self, event: int) -> int:
        """As for growth, but negative."""
        left = (1 - event / len(self.event_steps)) ** 3
        return math.ceil(self.budget * left) - self.budget


def plan_growth(
    config: DrLoraConfig, num_experts: int, total_steps: int, start: Sequence[int] | None = None
) -> GrowthPlan:
    """The plan of one pool group of `num_experts` experts over `total_steps` optimizer steps.

    Args:
        config: the settings.
        num_experts: E.
        total_steps: length of the run.
        start: (E,) ranks to start from, where they are not all r_init.

    Raises:
        ConfigError: if the budget cannot be reached with these settings, with the arithmetic.
    """
    cost = len(config.projections) if config.rank_per == "expert" else 1
    budget = num_experts * abs(config.r_target - config.r_init)
    owned = num_experts * config.r_init
    if budget == 0 and not config.move_share:
        return GrowthPlan((), 0, cost, 0, owned)
    if total_steps < 1:
        raise ConfigError(f"total_steps={total_steps} must be at least 1.")
    warmup = config.resolve_warmup(total_steps)
    last = total_steps - config.settle_steps
    steps = tuple(range(warmup + config.grow_every, last + 1, config.grow_every))
    if not steps:
        raise ConfigError(
            f"a run of {total_steps} steps has no growth event: the warm-up takes {warmup} steps, "
            f"settle_steps={config.settle_steps} are kept at the end, and events are "
            f"grow_every={config.grow_every} steps apart; {_way_out(config, total_steps)}"
        )
    quota = -(-cost * budget // len(steps))
    if config.allocation == "prune":
        return PruningPlan(steps, quota, cost, budget, owned)
    plan = GrowthPlan(steps, quota, cost, budget, owned)
    _refuse_if_short(config, num_experts, plan, total_steps, start)
    return plan


def simulate(
    config: DrLoraConfig,
    num_experts: int,
    plan: GrowthPlan,
    start: Sequence[int] | None = None,
) -> list[list[int]]:
    """Ranks after each event if saliency always prefers the same experts.

    This is the hardest case for the budget: the favourites fill up to r_max one after the other,
    so the fewest experts are left to take what becomes due.
    """
    ranks = list(start or [config.r_init] * num_experts)
    preference = [float(num_experts - e) for e in range(num_experts)]
    history = []
    for event in range(1, len(plan.event_steps) + 1):
        spent = sum(ranks) - num_experts * config.r_init
        grants = allocate(
            preference,
            ranks=ranks,
            quota=plan.due(event) - spent,
            cap=config.grant_cap,
            r_max=config.r_max,
        )
        ranks = [rank + grant for rank, grant in zip(ranks, grants, strict=True)]
        history.append(ranks)
    return history


def _refuse_if_short(
    config: DrLoraConfig,
    num_experts: int,
    plan: GrowthPlan,
    total_steps: int,
    start: Sequence[int] | None,
) -> None:
    spent = sum(simulate(config, num_experts, plan, start)[-1]) - num_experts * config.r_init
    if spent == plan.budget:
        return
    events = len(plan.event_steps)
    raise ConfigError(
        f"the budget cannot be reached: {num_experts} experts * (r_target - r_init) = "
        f"{num_experts} * {config.r_target - config.r_init} = {plan.budget} ranks are to be "
        f"granted in {events} event{'s' if events > 1 else ''}, but with at most "
        f"floor(p_grow * (r_max - r_init)) = {config.grant_cap} ranks an expert and event, and "
        f"r_max={config.r_max}, only {spent} are certain to be; raise p_grow or r_max, or "
        f"{_way_out(config, total_steps)}"
    )


def _way_out(config: DrLoraConfig, total_steps: int) -> str:
    window = total_steps - config.settle_steps - config.resolve_warmup(total_steps)
    if window < 1:
        return (
            f"lower settle_steps or warmup_steps so that a window is left in {total_steps} steps."
        )
    return f"lower grow_every (the window is {window} steps long) or train longer."
