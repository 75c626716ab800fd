"""AdaLoRA's policy: ranks are pruned from r_init to r_target, the least important first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import ALLOCATIONS
from drlora.errors import ConfigError
from drlora.ranks.allocator import least_important
from drlora.ranks.groups import Scored
from drlora.ranks.policies.policy import Change, Policy
from drlora.ranks.schedule import GrowthPlan


@dataclass(frozen=True)
class PruningPlan(GrowthPlan):
    """Ranks that are taken away, `budget` of them in all: AdaLoRA's schedule.

    What is left to take falls with the cube of the time that is left (arXiv 2303.10512, eq. 12).
    """

    def due(self, event: int) -> int:
        """As for growth, but negative."""
        if not self.event_steps:
            return 0
        left = (1 - event / len(self.event_steps)) ** 3
        return math.ceil(self.budget * left) - self.budget


class Prune(Policy):
    """From r_init down to r_target: the ranks of least importance go, whosever they are."""

    noun = "pruning"
    done = "pruning is over"
    plan_type = PruningPlan

    def check(self, config: DrLoraConfig) -> None:
        """The budget is below the start."""
        if not config.r_target <= config.r_init <= config.r_max:
            raise ConfigError(
                f"ranks are out of order: allocation={config.allocation!r} goes down from "
                f"r_init={config.r_init} to r_target={config.r_target}; they must satisfy "
                f"r_target <= r_init <= r_max={config.r_max}."
            )

    def rows(self, config: DrLoraConfig, num_experts: int) -> int:
        """As many as there are at the start."""
        return num_experts * config.r_init

    def changes_ranks(self, config: DrLoraConfig) -> bool:
        """Not where the start is the budget."""
        return config.r_init != config.r_target

    def change(self, config: DrLoraConfig, scored: Scored, event: int) -> Change:
        """What is above the plan goes."""
        group = scored.group
        scores = [member.row_scores().tolist() for member in group.members]
        owners = [member.pools[0].book.owner_R.tolist() for member in group.members]
        excess = sum(group.ranks()) - group.plan.owned(event)
        return Change(freed=least_important(scores, owners, excess))


ALLOCATIONS.add("prune", Prune())
