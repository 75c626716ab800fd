"""When ranks grow, and by how many: from settings and the length of a run to a plan.

The first event is at the end of the warm-up, then one follows every `grow_every` steps, none in the
last `settle_steps` steps (arXiv 2601.04823, and its Table 10). The quota is counted in ranks of
LoRA modules, as in the paper:

    Q = ceil(n_modules * (r_target - r_init) / n_events)        n_modules = E * projections

A grant of one rank to an expert whose projections share a rank costs as many module ranks as it
has projections. What an event cannot spend, or what falls due before anything is known of the
experts, stays due at the next one, so the sum of ranks ends at the budget exactly. Settings for
which that cannot be promised are refused, with the sums.

This is what all policies of allocation have in common; where one has a plan of its own, it is
asked (drlora.ranks.policies).

Settings that are `auto` are chosen here, by the length of the run: the published values where they
fit, and what comes nearest to them in a run that is too short for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from drlora.config.adapter import AUTO, DrLoraConfig
from drlora.config.registry import ALLOCATIONS
from drlora.errors import ConfigError

# Published: T_grow, the steps without growth at the end, p_grow (arXiv 2601.04823).
PUBLISHED_SPACING, PUBLISHED_SETTLE, PUBLISHED_P_GROW = 200, 200, 0.1
# B is zero until the first step with a learning rate, which is the second one under a warm-up; only
# the gradients of the step after it tell ranks apart.
FIRST_INFORMED_STEP = 3
# In runs too short for these: events that the window is divided into, and the share that settles.
FEWEST_EVENTS, SETTLE_SHARE = 16, 10


@dataclass(frozen=True)
class Schedule:
    """The steps of a run at which ranks may change, and by how much; nothing is `auto` any more.

    Attributes:
        total_steps: optimizer steps of the run that was planned.
        warmup_steps: of them before growth; the first event is at its end.
        grow_every: steps between two events.
        settle_steps: steps without growth at the end.
        cap: most ranks that one expert can gain at one event.
    """

    total_steps: int
    warmup_steps: int
    grow_every: int
    settle_steps: int
    cap: int

    @property
    def event_steps(self) -> tuple[int, ...]:
        """The optimizer steps (counted from 1) after which ranks grow.

        Before the first step nothing has been observed: without a warm-up the first event comes
        after `grow_every` steps.
        """
        last = self.total_steps - self.settle_steps
        return tuple(range(self.warmup_steps or self.grow_every, last + 1, self.grow_every))

    def way_out(self) -> str:
        """What to change where it has too few events, for the end of an error."""
        window = self.total_steps - self.settle_steps - self.warmup_steps
        if window < 0:
            return (
                f"lower settle_steps or warmup_steps so that a window is left in "
                f"{self.total_steps} steps."
            )
        return f"lower grow_every (the window is {window} steps long) or train longer."

    def __str__(self) -> str:
        """The same for people, in a line."""
        steps = self.event_steps
        if not steps:
            return "no events"
        several = len(steps) > 1
        every = f", one every {self.grow_every:,} step{'s' * (self.grow_every > 1)}"
        return (
            f"{len(steps)} event{'s' * several}{every * several} from step {steps[0]:,} to "
            f"{steps[-1]:,} of {self.total_steps:,}, at most {self.cap} "
            f"rank{'s' * (self.cap > 1)} an expert and event"
        )


class StepCounts(NamedTuple):
    """Where a run is. All counts are the same unless a GradScaler skipped steps.

    Attributes:
        plan: the step of the plan of growth.
        taken: steps that the optimizer took, its own count.
        run: all steps of the run; no two events have the same.
    """

    plan: int
    taken: int
    run: int


@dataclass(frozen=True)
class Competitors:
    """Experts that share one budget.

    Attributes:
        num_experts: E.
        start: (E,) ranks to start from; None if all are r_init.
    """

    num_experts: int
    start: Sequence[int] | None = None


@dataclass(frozen=True)
class GrowthPlan:
    """The growth of one pool group (the experts of a block that compete for ranks) over a run.

    Attributes:
        event_steps: the optimizer steps (counted from 1) after which ranks grow.
        quota: Q, module ranks that become due at each event.
        cost: module ranks that one rank of an expert costs.
        budget: expert ranks to hand out in all, E * (r_target - r_init).
        start: expert ranks owned at the start, E * r_init.
        cap: most ranks that one expert can gain at one event.
    """

    event_steps: tuple[int, ...]
    quota: int
    cost: int
    budget: int
    start: int
    cap: int

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


def make_schedule(
    config: DrLoraConfig, groups: Sequence[Competitors], total_steps: int
) -> Schedule:
    """The schedule of a run of `total_steps` optimizer steps, one for all groups.

    Raises:
        ConfigError: if a group cannot reach its budget with these settings, with the arithmetic.
    """
    warmup = config.resolve_warmup(total_steps)
    settle = _settle_steps(config, warmup, total_steps)
    every = _spacing(config, warmup, total_steps - settle)
    schedule = Schedule(total_steps, warmup, every, settle, _published_cap(config))
    policy = ALLOCATIONS[config.allocation]
    changes = policy.changes_ranks(config)
    if changes and total_steps < 1:
        raise ConfigError(f"total_steps={total_steps} must be at least 1.")
    if changes and not schedule.event_steps:
        raise ConfigError(
            f"a run of {total_steps} steps has no growth event: the warm-up takes {warmup} steps, "
            f"settle_steps={_said(config.settle_steps, settle)} are kept at the end, and events "
            f"are grow_every={_said(config.grow_every, every)} steps apart; "
            f"{schedule.way_out()}"
        )
    if config.router == "train" and 1 < total_steps <= warmup:
        raise ConfigError(
            f"router='train' would train no router: a run of {total_steps} steps is over before "
            f"the warm-up of {warmup} steps (warmup_steps={config.warmup_steps}), in which routers "
            f"are held; lower warmup_steps, train longer, or use router='frozen'."
        )
    return policy.fit(config, groups, schedule) if changes else schedule


def plan_of(config: DrLoraConfig, num_experts: int, schedule: Schedule) -> GrowthPlan:
    """The plan of one group of `num_experts` experts in a schedule."""
    return ALLOCATIONS[config.allocation].plan(config, num_experts, schedule)


def plan_growth(
    config: DrLoraConfig, num_experts: int, total_steps: int, start: Sequence[int] | None = None
) -> GrowthPlan:
    """The plan of a single group of `num_experts` experts over `total_steps` optimizer steps.

    Args:
        config: the settings.
        num_experts: E.
        total_steps: length of the run.
        start: (E,) ranks to start from, where they are not all r_init.

    Raises:
        ConfigError: if the budget cannot be reached with these settings, with the arithmetic.
    """
    schedule = make_schedule(config, [Competitors(num_experts, start)], total_steps)
    return plan_of(config, num_experts, schedule)


def _settle_steps(config: DrLoraConfig, warmup: int, total_steps: int) -> int:
    """As set, a share of the run below 1; else the published number or a tenth of a shorter run,
    with room for an event."""
    if config.settle_steps != AUTO:
        settle = float(config.settle_steps)
        return math.ceil(settle * total_steps if settle < 1 else settle)
    tenth = max(1, total_steps // SETTLE_SHARE)
    return max(0, min(PUBLISHED_SETTLE, tenth, total_steps - max(1, warmup)))


def _spacing(config: DrLoraConfig, warmup: int, last: int) -> int:
    """As set; else the published number, or what divides the window into enough events."""
    if config.grow_every != AUTO:
        return int(config.grow_every)
    intervals = FEWEST_EVENTS - 1 if warmup else FEWEST_EVENTS
    return max(1, min(PUBLISHED_SPACING, (last - warmup) // intervals))


def _published_cap(config: DrLoraConfig) -> int:
    """The paper's floor(p_grow * (r_max - r_init)); at least 1, so that small ranks can grow."""
    share = PUBLISHED_P_GROW if config.p_grow == AUTO else float(config.p_grow)
    # The small term keeps 0.1 * 30 at 3 although it is 3 - 4e-16 in floating point.
    return max(1, math.floor(share * (config.r_max - config.r_init) + 1e-9))


def _said(setting: object, chosen: int) -> str:
    """`200`, or `12 (auto)`."""
    return f"{chosen} (auto)" if setting == AUTO else f"{chosen}"
