"""Who competes with whom: the experts that share one budget, and what is known of them.

A group is what shares one budget: the experts of a block or, with `budget_scope="model"`, those of
all blocks; with `rank_per="projection"`, one projection of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.ranks.saliency import Signals, expert_sums
from drlora.ranks.schedule import Competitors, GrowthPlan, Schedule, make_schedule, plan_of


@dataclass(frozen=True)
class Member:
    """Pools of one block whose experts share a rank."""

    block: str
    adapter: ExpertsAdapter
    projections: tuple[str, ...]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.adapter.block.num_experts

    @property
    def pools(self) -> list[RankPool]:
        """One a projection; a row belongs to the same expert in all of them."""
        return [self.adapter.rank_pools[name] for name in self.projections]

    def ranks(self) -> list[int]:
        """(E,) the rank of each expert."""
        return self.pools[0].book.ranks().tolist()

    def importance(self) -> Tensor:
        """(E,) g_i: the mean over the rows that the expert owns in all of the pools."""
        sums = [expert_sums(p.importance, p.owner, self.num_experts) for p in self.pools]
        counts = torch.tensor(self.ranks(), device=sums[0].device) * len(self.pools)
        mean_E = sum(sums[1:], start=sums[0]) / counts.clamp(min=1)
        # Averages after a large spike are finite, but a sum of them need not be.
        return mean_E.clamp(max=torch.finfo(mean_E.dtype).max)

    def row_scores(self) -> Tensor:
        """(R,) what rows are kept for, summed over the pools."""
        scores = torch.stack([pool.row_scores() for pool in self.pools])
        return scores.sum(dim=0)


@dataclass(frozen=True)
class Group:
    """Members that share one budget, and the plan to spend it."""

    members: tuple[Member, ...]
    plan: GrowthPlan

    @property
    def pools(self) -> list[RankPool]:
        """Of all members."""
        return [pool for member in self.members for pool in member.pools]

    @property
    def sizes(self) -> list[int]:
        """Experts of each member."""
        return [member.num_experts for member in self.members]

    def ranks(self) -> list[int]:
        """Of all experts, member by member."""
        return [rank for member in self.members for rank in member.ranks()]

    def signals(self, config: DrLoraConfig, step: int) -> Signals:
        """What the rules may know of all experts, on the CPU."""
        return Signals(
            torch.cat([member.adapter.frequency.cpu() for member in self.members]),
            torch.cat([member.importance().cpu() for member in self.members]),
            torch.tensor(self.ranks()),
            config.gamma,
            int(self.pools[0].seed) + step,
            config.options,
        )

    def weakest_rows(self, counts: Sequence[int]) -> list[list[int]]:
        """For each member the rows to free, if every expert gives up so many of its own.

        The rows of least score go; ties go to the lowest row.
        """
        freed = []
        for member, of_member in self.split(list(counts)):
            scores, owner_R = member.row_scores().tolist(), member.pools[0].book.owner_R
            rows: list[int] = []
            for expert, count in enumerate(of_member):
                own = np.flatnonzero(owner_R == expert).tolist()
                rows += sorted(own, key=lambda row: (scores[row], row))[:count]
            freed.append(sorted(rows))
        return freed

    def split(self, values: list) -> Iterator[tuple[Member, list]]:
        """Values of all experts, member by member."""
        ends = accumulate(self.sizes)
        for member, end in zip(self.members, ends, strict=True):
            yield member, values[end - member.num_experts : end]


class Scored(NamedTuple):
    """Experts that share a budget, what was known of them, and the score of each."""

    group: Group
    signals: Signals
    saliency_E: list[float]


def make_groups(
    adapters: Mapping[str, ExpertsAdapter], config: DrLoraConfig, schedule: Schedule
) -> list[Group]:
    """The groups of an adapter, each with its plan."""
    return [
        Group(tuple(members), plan_of(config, _num_experts(members), schedule))
        for members in _competing(adapters, config)
    ]


def schedule_for(
    adapters: Mapping[str, ExpertsAdapter], config: DrLoraConfig, total_steps: int, begins: bool
) -> Schedule:
    """The schedule of a run of `total_steps`.

    Args:
        adapters: block -> adapter.
        config: the settings.
        total_steps: length of the run.
        begins: whether the run has yet to begin, with the ranks that the adapters have now. One
            that is under way was checked when it began, and has the schedule that the adapter was
            trained by if that is of `total_steps`.

    Raises:
        ConfigError: if a group cannot reach its budget.
    """
    known = config.recorded("schedule")
    if not begins and isinstance(known, dict) and known.get("total_steps") == total_steps:
        return Schedule(**known)
    competing = _competing(adapters, config)
    groups = [
        Competitors(
            _num_experts(members),
            [rank for member in members for rank in member.ranks()] if begins else None,
        )
        for members in competing
    ]
    return make_schedule(config, groups, total_steps)


def _competing(adapters: Mapping[str, ExpertsAdapter], config: DrLoraConfig) -> list[list[Member]]:
    """Members that share a budget."""
    together = config.option("rank_per") == "expert"
    shares = [tuple(config.projections)] if together else [(one,) for one in config.projections]
    members = [
        [Member(name, adapter, share) for name, adapter in adapters.items()] for share in shares
    ]
    if config.budget_scope == "layer":
        # Block by block, as the growth log has always been ordered.
        members = [[member] for of_block in zip(*members, strict=True) for member in of_block]
    return members


def _num_experts(members: Iterable[Member]) -> int:
    return sum(member.num_experts for member in members)
