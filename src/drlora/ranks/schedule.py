"""When ranks grow, and by how many: from settings and the length of a run to a plan.

The first event is at the end of the warm-up, then one follows every `grow_every` steps, none in the
last `settle_steps` steps (arXiv 2601.04823, and its Table 10). The quota is counted in ranks of
LoRA modules, as in the paper:

    Q = ceil(n_modules * (r_target - r_init) / n_events)        n_modules = E * projections

A grant of one rank to an expert whose projections share a rank costs as many module ranks as it
has projections. What an event cannot spend, or what falls due before anything is known of the
experts, stays due at the next one, so the sum of ranks ends at the budget exactly. Settings for
which that cannot be promised are refused here, with the sums.

Settings that are `auto` are chosen here, by the length of the run: the published values where they
fit, and what comes nearest to them in a run that is too short for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from drlora.config.adapter import AUTO, DrLoraConfig
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


@dataclass(frozen=True)
class PruningPlan(GrowthPlan):
    """Ranks that are taken away, `budget` of them in all: AdaLoRA's schedule.

    What is left to take falls with the cube of the time that is left (arXiv 2303.10512, eq. 12).
    """

    def due(self, event: int) -> int:
        """As for growth, but negative."""
        left = (1 - event / len(self.event_steps)) ** 3
        return math.ceil(self.budget * left) - self.budget


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
    if not _changes_ranks(config):
        return schedule
    if total_steps < 1:
        raise ConfigError(f"total_steps={total_steps} must be at least 1.")
    if not schedule.event_steps:
        raise ConfigError(
            f"a run of {total_steps} steps has no growth event: the warm-up takes {warmup} steps, "
            f"settle_steps={_said(config.settle_steps, settle)} are kept at the end, and events "
            f"are grow_every={_said(config.grow_every, every)} steps apart; "
            f"{_way_out(schedule)}"
        )
    if config.allocation == "prune":
        return schedule
    return _with_cap_that_suffices(config, groups, schedule)


def plan_of(config: DrLoraConfig, num_experts: int, schedule: Schedule) -> GrowthPlan:
    """The plan of one group of `num_experts` experts in a schedule."""
    cost = len(config.projections) if config.option("rank_per") == "expert" else 1
    budget = num_experts * abs(config.r_target - config.r_init)
    steps = schedule.event_steps if _changes_ranks(config) else ()
    quota = -(-cost * budget // len(steps)) if steps else 0
    kind = PruningPlan if config.allocation == "prune" else GrowthPlan
    return kind(steps, quota, cost, budget, num_experts * config.r_init, schedule.cap)


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


def _changes_ranks(config: DrLoraConfig) -> bool:
    return config.r_init != config.r_target or config.options.get("move_share", 0) > 0


def _settle_steps(config: DrLoraConfig, warmup: int, total_steps: int) -> int:
    """As set; else the published number, a tenth of a shorter run, and room for an event."""
    if config.settle_steps != AUTO:
        return int(config.settle_steps)
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


def _with_cap_that_suffices(
    config: DrLoraConfig, groups: Sequence[Competitors], schedule: Schedule
) -> Schedule:
    """The schedule, with the smallest cap that reaches every budget where p_grow is `auto`.

    With a cap of all the room there is, any budget is reached: it is never more than the room.
    """
    largest = max(schedule.cap, config.r_max - config.r_init)
    caps = range(schedule.cap, largest + 1 if config.p_grow == AUTO else schedule.cap + 1)
    for cap in caps:
        tried = replace(schedule, cap=cap)
        missed = next(_missed(config, groups, tried), None)
        if missed is None:
            return tried
    assert missed is not None
    group, plan, spent = missed
    more, events = config.r_target - config.r_init, len(plan.event_steps)
    raise ConfigError(
        f"the budget cannot be reached: {group.num_experts} experts * (r_target - r_init) = "
        f"{group.num_experts} * {more} = {plan.budget} ranks are to be "
        f"granted in {events} event{'s' if events > 1 else ''}, but with at most "
        f"max(1, floor(p_grow * (r_max - r_init))) = {plan.cap} ranks an expert and event, and "
        f"r_max={config.r_max}, only {spent} are certain to be; raise p_grow or r_max, or "
        f"{_way_out(schedule)}"
    )


def _missed(
    config: DrLoraConfig, groups: Sequence[Competitors], schedule: Schedule
) -> Iterator[tuple[Competitors, GrowthPlan, int]]:
    """Groups that do not reach their budget, and the ranks that are certain to be granted."""
    alike = {(g.num_experts, None if g.start is None else tuple(g.start)): g for g in groups}
    for group in alike.values():
        plan = plan_of(config, group.num_experts, schedule)
        # A rule that needs no gradient knows something from the first event on; others wait.
        firsts = {1, _first_informed(plan)} if config.p_grow == AUTO else {1}
        owned = min(
            certain_ranks(config, group.num_experts, plan, group.start, first) for first in firsts
        )
        spent = owned - group.num_experts * config.r_init
        if spent < plan.budget:
            yield group, plan, spent


def _first_informed(plan: GrowthPlan) -> int:
    """The first event (from 1) that can know anything of the experts; 1 if none can."""
    early = sum(step < FIRST_INFORMED_STEP for step in plan.event_steps)
    return early + 1 if early < len(plan.event_steps) else 1


def _said(setting: object, chosen: int) -> str:
    """`200`, or `12 (auto)`."""
    return f"{chosen} (auto)" if setting == AUTO else f"{chosen}"


def _way_out(schedule: Schedule) -> str:
    window = schedule.total_steps - schedule.settle_steps - schedule.warmup_steps
    if window < 0:
        return (
            f"lower settle_steps or warmup_steps so that a window is left in "
            f"{schedule.total_steps} steps."
        )
    return f"lower grow_every (the window is {window} steps long) or train longer."
