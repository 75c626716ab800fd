"""What every policy of allocation answers, and the laws that no change of ranks may break."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from drlora.config.adapter import DrLoraConfig
from drlora.config.options import Option
from drlora.errors import ConfigError
from drlora.ranks.groups import Group, Scored
from drlora.ranks.schedule import Competitors, GrowthPlan, Schedule

# Options of any policy that grants ranks: pass them on where it is registered.
ROW_OPTIONS: dict[str, Option] = {
    "importance_reset": Option(
        "grown",
        "whose rank importance restarts from 0 after an event: the grown experts' (the paper's "
        "text), or that of all (its Algorithm 1)",
        choices=("grown", "all"),
    ),
    "young_a": Option(
        "random",
        "rows of A that wake up late: random, along the part of the gradient that their expert's A "
        "does not reach yet (`gradient`: as far as its own rows show it; `probe`: all of it, shown "
        "by a probe in an event's step), or random and orthogonal to their expert's other rows",
        choices=("random", "gradient", "orthogonal", "probe"),
    ),
    "young_a_scale": Option(
        1.0,
        "with young_a other than random: length of such rows, over that of a random one",
        above=0,
        needs="young_a",
    ),
}


@dataclass(frozen=True)
class Change:
    """What an event does to a group: rows are freed first, then ranks are granted.

    Attributes:
        freed: for each member of the group the rows that its experts give up; what these rows had
            learned is lost. Empty: no expert gives any.
        granted: for each expert of the group, member by member, the ranks that it gains. Empty: no
            expert gains any.
    """

    freed: Sequence[Sequence[int]] = ()
    granted: Sequence[int] = ()


class Policy(ABC):
    """How ranks change over a run. Only `change` has to be written.

    A policy keeps nothing between two events: what it needs to know is in what it is given, so that
    a run that is resumed goes on as the straight one does. It is called on every process with the
    same values, and has to give the same change.

    Attributes:
        noun: what happens to ranks, as in "60 % of the growth is done".
        done: said of the moment from which on nothing is left to do.
        plan_type: the class of the plan, which says how many ranks are due when.
    """

    noun: ClassVar[str] = "growth"
    done: ClassVar[str] = "the budget is reached"
    plan_type: ClassVar[type[GrowthPlan]] = GrowthPlan

    @abstractmethod
    def change(self, config: DrLoraConfig, scored: Scored, event: int) -> Change:
        """Who gives ranks up, and who gets them.

        Args:
            config: the settings.
            scored: the experts that share a budget: `group` with their ranks, pools and plan, the
                `signals`, and `saliency_E` by the setting `saliency`.
            event: its number, from 1; the plan says what may be owned after it.
        """

    def check(self, config: DrLoraConfig) -> None:
        """Refuse ranks that are out of order; called when the configuration is made.

        Raises:
            ConfigError: naming them.
        """
        if not config.r_init <= config.r_target <= config.r_max:
            raise ConfigError(
                f"ranks are out of order: r_init={config.r_init}, r_target={config.r_target}, "
                f"r_max={config.r_max}; they must satisfy r_init <= r_target <= r_max."
            )

    def rows(self, config: DrLoraConfig, num_experts: int) -> int:
        """Rows that a block of `num_experts` experts stores for each projection."""
        return config.budget_rows(num_experts)

    def changes_ranks(self, config: DrLoraConfig) -> bool:
        """Whether there are events at all."""
        return True

    def fit(
        self, config: DrLoraConfig, groups: Sequence[Competitors], schedule: Schedule
    ) -> Schedule:
        """The schedule, changed so that every group reaches its budget.

        Raises:
            ConfigError: if none does that, with the arithmetic.
        """
        return schedule

    def plan(self, config: DrLoraConfig, num_experts: int, schedule: Schedule) -> GrowthPlan:
        """The plan of one group of `num_experts` experts in a schedule."""
        cost = len(config.projections) if config.option("rank_per") == "expert" else 1
        budget = num_experts * abs(config.r_target - config.r_init)
        steps = schedule.event_steps if self.changes_ranks(config) else ()
        quota = -(-cost * budget // len(steps)) if steps else 0
        start = num_experts * config.r_init
        return self.plan_type(steps, quota, cost, budget, start, schedule.cap)

    def can_wait(self, config: DrLoraConfig, group: Group, event: int) -> bool:
        """Whether an event may be left out at which no expert has any saliency.

        That is so early in a run, before gradients tell experts apart.
        """
        return event < len(group.plan.event_steps)


def broken_law(change: Change, group: Group, config: DrLoraConfig, event: int) -> str | None:
    """What is wrong with a change that is about to be made, in words; None if nothing is.

    The laws: only owned rows are freed; no expert gains more than the cap, or passes r_max; and
    together experts own no more than they did or than the plan allows.
    """
    ranks, plan = group.ranks(), group.plan
    if change.freed and len(change.freed) != len(group.members):
        return f"rows are freed of {len(change.freed)} blocks, the group has {len(group.members)}"
    if change.granted and len(change.granted) != len(ranks):
        return f"there are {len(change.granted)} grants for {len(ranks)} experts"
    after = list(ranks)
    first = 0
    for member, rows in zip(group.members, change.freed or [()] * len(group.members), strict=True):
        owner_R = member.pools[0].book.owner_R
        for row in rows:
            if not 0 <= row < len(owner_R) or owner_R[row] < 0:
                return f"row {row} of {member.block} is freed, but nobody owns it"
            after[first + owner_R[row]] -= 1
        if len(set(rows)) < len(rows):
            return f"a row of {member.block} is freed twice"
        first += member.num_experts
    for expert, granted in enumerate(change.granted):
        after[expert] += granted
        if not 0 <= granted <= plan.cap:
            return f"expert {expert} is granted {granted} ranks, the cap is {plan.cap}"
        if granted and after[expert] > config.r_max:
            return f"expert {expert} gets rank {after[expert]}, r_max is {config.r_max}"
    most = max(sum(ranks), plan.owned(event))
    if sum(after) > most:
        return f"experts own {sum(after)} ranks together, {most} are allowed by then"
    return None
