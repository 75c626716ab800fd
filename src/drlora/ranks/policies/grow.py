"""DR-LoRA's policy: ranks grow from r_init to r_target, and go to the most salient experts.

With move_share some also move, from the least salient experts to the most salient ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from drlora.config.adapter import AUTO, DrLoraConfig
from drlora.config.options import Option
from drlora.config.registry import ALLOCATIONS
from drlora.errors import ConfigError
from drlora.ranks.allocator import allocate_in_layers, reserve, take_back
from drlora.ranks.certain import certain_ranks
from drlora.ranks.groups import Group, Scored
from drlora.ranks.policies.policy import ROW_OPTIONS, Change, Policy
from drlora.ranks.schedule import FIRST_INFORMED_STEP, Competitors, GrowthPlan, Schedule, plan_of


class Grow(Policy):
    """From r_init up to r_target (arXiv 2601.04823, Algorithm 1)."""

    def changes_ranks(self, config: DrLoraConfig) -> bool:
        """Also where ranks only move."""
        return config.r_init != config.r_target or config.option("move_share") > 0

    def fit(
        self, config: DrLoraConfig, groups: Sequence[Competitors], schedule: Schedule
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
            f"{schedule.way_out()}"
        )

    def can_wait(self, config: DrLoraConfig, group: Group, event: int) -> bool:
        """Whether the budget is certain to be reached without this event."""
        if event == len(group.plan.event_steps):
            return False
        num_experts, ranks = sum(group.sizes), group.ranks()
        owned = certain_ranks(config, num_experts, group.plan, ranks, first_event=event + 1)
        return owned >= group.plan.owned(len(group.plan.event_steps))

    def change(self, config: DrLoraConfig, scored: Scored, event: int) -> Change:
        """What is due goes to the most salient experts, after what is taken from the least."""
        group, saliency_E = scored.group, scored.saliency_E
        ranks, owned, cap = group.ranks(), group.plan.owned(event), group.plan.cap
        taken = take_back(
            saliency_E,
            ranks=ranks,
            quota=owned - sum(ranks),
            share=config.option("move_share"),
            cap=cap,
            r_max=config.r_max,
        )
        left = [rank - gave for rank, gave in zip(ranks, taken, strict=True)]
        granted = allocate_in_layers(
            saliency_E,
            # Who just gave ranks up does not get them back.
            ranks=[config.r_max if gave else r for r, gave in zip(left, taken, strict=True)],
            quota=owned - sum(left),
            cap=cap,
            r_max=config.r_max,
            sizes=group.sizes,
            reserved=_reserved(config, group, left, event),
        )
        return Change(group.weakest_rows(taken) if any(taken) else (), granted)


def _reserved(config: DrLoraConfig, group: Group, ranks: list[int], event: int) -> list[int]:
    """For each member what it still lacks of its floor."""
    granted = [sum(own) - len(own) * config.r_init for _, own in group.split(ranks)]
    due = group.plan.due(event)
    return reserve(granted, group.sizes, due=due, share=config.option("layer_floor"))


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


_OPTIONS: dict[str, Option] = {
    "move_share": Option(
        0.0,
        "at an event, up to this share of all ranks moves from the experts of least saliency to "
        "those of most; their weakest ranks go, and never the last one",
        low=0,
        high=1,
    ),
    "layer_floor": Option(
        0.0,
        "with budget_scope=model: share of a budget of its own that each layer is sure of",
        low=0,
        high=1,
    ),
    **ROW_OPTIONS,
}
ALLOCATIONS.add("grow", Grow(), _OPTIONS)
