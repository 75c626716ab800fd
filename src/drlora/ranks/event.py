"""One event: experts that compete for ranks are scored, and rows of their pools change hands.

What is due comes from the plan (schedule), who competes for it from the groups, who is to have it
from a rule (saliency), how it is shared out from the allocator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.config.adapter import DrLoraConfig
from drlora.config.options import Option
from drlora.config.registry import ALLOCATIONS, SALIENCIES
from drlora.ranks.allocator import allocate_in_layers, least_important, reserve, take_back
from drlora.ranks.groups import Group, Scored, make_groups
from drlora.ranks.optimizer_rows import unwrap_optimizer
from drlora.ranks.row_starter import RowStarter
from drlora.ranks.saliency import Signals
from drlora.ranks.schedule import Schedule, StepCounts, certain_ranks


@dataclass(frozen=True)
class Grant:
    """Ranks that one expert was given at an event, and the signals that decided it.

    `projection` names the projections that grew together, joined by "+"; `granted` is negative
    where ranks were taken away; `rank` is the rank after the grant; `routing`, `importance` and
    `saliency` are f, g and S just before it. `step` counts skipped steps too, as the Trainer does.
    """

    step: int
    block: str
    projection: str
    expert: int
    granted: int
    rank: int
    routing: float
    importance: float
    saliency: float


@dataclass(frozen=True)
class Event(Sequence[Grant]):
    """What came of one step: its grants, as a sequence, and what decided them.

    Attributes:
        grants: the changes of rank, empty if there was none.
        scored: what was known of all experts before any was changed, one entry a group that had an
            event; empty if none had.
    """

    grants: tuple[Grant, ...] = ()
    scored: tuple[Scored, ...] = ()

    def __len__(self) -> int:
        return len(self.grants)

    @overload
    def __getitem__(self, index: int) -> Grant: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Grant]: ...

    def __getitem__(self, index: int | slice) -> Grant | Sequence[Grant]:
        return self.grants[index]


class Growth:
    """The events of all groups over a run.

    Attributes:
        groups: what shares a budget.
    """

    def __init__(
        self, adapters: Mapping[str, ExpertsAdapter], config: DrLoraConfig, schedule: Schedule
    ) -> None:
        self.config = config
        self.groups = make_groups(adapters, config, schedule)
        self._rule: Callable[[Signals], Tensor] = SALIENCIES[config.saliency]
        self._starter: RowStarter | None = None
        self._has_warned = False

    @property
    def done_share(self) -> float:
        """How much of the planned change in ranks has happened, from 0 to 1."""
        planned = sum(group.plan.budget for group in self.groups)
        moved = sum(abs(sum(g.ranks()) - g.plan.start) for g in self.groups)
        return moved / planned if planned else 1.0

    def is_event(self, plan_step: int) -> bool:
        """Whether the plan of any group has an event there."""
        return any(group.plan.event_number(plan_step) for group in self.groups)

    def event(self, now: StepCounts, optimizer: object) -> Event:
        """What happens now; nothing, unless the plan has an event."""
        starter = self._starter_for(optimizer)
        grants: list[Grant] = []
        scored: list[Scored] = []
        for group in self.groups:
            if number := group.plan.event_number(now.plan):
                known = self.score(group, now.run)
                scored.append(known)
                grants += self._change(known, number, now, starter)
        return Event(tuple(grants), tuple(scored))

    def score(self, group: Group, step: int) -> Scored:
        """What is known of the experts of a group at a step of the run."""
        signals = group.signals(self.config, step)
        return Scored(group, signals, self._rule(signals).tolist())

    def _change(
        self, scored: Scored, event: int, now: StepCounts, starter: RowStarter
    ) -> list[Grant]:
        group, signals, saliency_E = scored
        before = group.ranks()
        if not any(saliency_E):
            if self._can_wait(group, event):
                return []
            self._warn_of_no_saliency(group, now)
        if self.config.allocation == "prune":
            excess = sum(before) - group.plan.owned(event)
            self._release(group, self._least_important(group, excess), now, starter)
        else:
            taken = self._take_back(group, event, saliency_E)
            if any(taken):
                self._release(group, self._weakest_of(group, taken), now, starter)
            grants = self._share_out(group, event, saliency_E, taken)
            self._grant(group, grants, now, starter)
        return list(_grants(group, now.run, before, signals, saliency_E))

    def _can_wait(self, group: Group, event: int) -> bool:
        """Whether the budget is certain to be reached without this event."""
        if event == len(group.plan.event_steps):
            return False
        if self.config.allocation == "prune":
            return True
        num_experts, ranks = sum(group.sizes), group.ranks()
        owned = certain_ranks(self.config, num_experts, group.plan, ranks, first_event=event + 1)
        return owned >= group.plan.owned(len(group.plan.event_steps))

    def _take_back(self, group: Group, event: int, saliency_E: list[float]) -> list[int]:
        """(experts of the group,) ranks that are to move to others."""
        ranks = group.ranks()
        return take_back(
            saliency_E,
            ranks=ranks,
            quota=group.plan.owned(event) - sum(ranks),
            share=self.config.option("move_share"),
            cap=group.plan.cap,
            r_max=self.config.r_max,
        )

    def _share_out(
        self, group: Group, event: int, saliency_E: list[float], taken: list[int]
    ) -> list[int]:
        """(experts of the group,) grants: what is due, less what was handed out before."""
        ranks = group.ranks()
        reserved = reserve(
            [
                sum(now) - member.num_experts * self.config.r_init
                for member, now in group.split(ranks)
            ],
            group.sizes,
            due=group.plan.due(event),
            share=self.config.option("layer_floor"),
        )
        # Who just gave ranks up does not get them back.
        full = [self.config.r_max if gave else r for r, gave in zip(ranks, taken, strict=True)]
        return allocate_in_layers(
            saliency_E,
            ranks=full,
            quota=group.plan.owned(event) - sum(ranks),
            cap=group.plan.cap,
            r_max=self.config.r_max,
            sizes=group.sizes,
            reserved=reserved,
        )

    def _grant(self, group: Group, grants: list[int], now: StepCounts, starter: RowStarter) -> None:
        for member, granted in group.split(grants):
            for pool in member.pools:
                starter.start(pool, pool.grant(granted, now.taken), now)

    def _least_important(self, group: Group, count: int) -> list[list[int]]:
        """For each member the rows to free, if `count` ranks go, whosever they are."""
        scores = [member.row_scores().tolist() for member in group.members]
        owners = [member.pools[0].book.owner_R.tolist() for member in group.members]
        return least_important(scores, owners, count)

    def _weakest_of(self, group: Group, taken: list[int]) -> list[list[int]]:
        """For each member the rows to free, if every expert gives up so many of its own."""
        freed = []
        for member, counts in group.split(taken):
            scores, owner_R = member.row_scores().tolist(), member.pools[0].book.owner_R
            rows: list[int] = []
            for expert, count in enumerate(counts):
                own = np.flatnonzero(owner_R == expert).tolist()
                rows += sorted(own, key=lambda row: (scores[row], row))[:count]
            freed.append(sorted(rows))
        return freed

    def _release(
        self, group: Group, freed: list[list[int]], now: StepCounts, starter: RowStarter
    ) -> None:
        for member, rows in zip(group.members, freed, strict=True):
            for pool in member.pools if rows else ():
                index = torch.tensor(rows, dtype=torch.int64, device=pool.owner.device)
                pool.release(index, now.run)
                starter.forget(pool, index)

    def _starter_for(self, optimizer: object) -> RowStarter:
        """One for as long as the optimizer is the same, so that it warns once."""
        if self._starter is None or self._starter.optimizer is not unwrap_optimizer(optimizer):
            self._starter = RowStarter(self.config, optimizer)
        return self._starter

    def _warn_of_no_saliency(self, group: Group, now: StepCounts) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{group.members[0].block}: at step {now.run} no expert has any saliency, so ranks "
                f"go by expert number. Was the model in training mode, and before_optimizer_step "
                f"called before the gradients were cleared?",
                stacklevel=6,
            )


def _grants(
    group: Group, step: int, before: list[int], signals: Signals, saliency_E: list[float]
) -> Iterable[Grant]:
    """One entry an expert whose rank changed."""
    values = zip(
        before,
        group.ranks(),
        signals.frequency_E.tolist(),
        signals.importance_E.tolist(),
        saliency_E,
        strict=True,
    )
    for member, of_member in group.split(list(values)):
        projection = "+".join(member.projections)
        for expert, (old, new, f, g, s) in enumerate(of_member):
            if new != old:
                yield Grant(step, member.block, projection, expert, new - old, new, f, g, s)


_OF_GROWTH = {
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
    "importance_reset": Option(
        "grown",
        "whose rank importance restarts from 0 after an event: the grown experts' (the paper's "
        "text), or that of all (its Algorithm 1)",
        choices=("grown", "all"),
    ),
    "young_a": Option(
        "random",
        "rows of A that wake up late: random, or along the part of the gradient that their "
        "expert's A does not reach yet",
        choices=("random", "gradient"),
    ),
}
ALLOCATIONS.add("grow", "grow", _OF_GROWTH)
ALLOCATIONS.add("prune", "prune")
