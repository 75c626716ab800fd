"""One event: experts that compete for ranks are scored, and rows of their pools change hands.

What is due comes from the plan (schedule), who competes for it from the groups, who is to have it
from a rule (saliency), how it is shared out from the allocator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drlora.adapter.layer import ExpertsAdapter, RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.config.options import Option
from drlora.config.registry import ALLOCATIONS, SALIENCIES
from drlora.ranks.allocator import allocate_in_layers, least_important, reserve, take_back
from drlora.ranks.directions import point_along_gradient
from drlora.ranks.groups import Group, Scored, make_groups
from drlora.ranks.saliency import Signals
from drlora.ranks.schedule import Schedule, certain_ranks
from drlora.ranks.young_rows import (
    decays_weights,
    forget_rows,
    inherit_second_moment,
    is_adam,
    unwrap_optimizer,
)


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


class Moment(NamedTuple):
    """Where a run is. All three are the same unless a GradScaler skipped steps.

    Attributes:
        plan: the step of the plan of growth.
        taken: steps that the optimizer took, its own count.
        run: all steps of the run; no two events have the same.
    """

    plan: int
    taken: int
    run: int


class Growth:
    """The events of all groups over a run.

    Attributes:
        groups: what shares a budget.
        scored: what the latest event knew of all experts, one entry a group, before it changed any.
    """

    def __init__(
        self, adapters: Mapping[str, ExpertsAdapter], config: DrLoraConfig, schedule: Schedule
    ) -> None:
        self.config = config
        self.groups = make_groups(adapters, config, schedule)
        self._rule: Callable[[Signals], Tensor] = SALIENCIES[config.saliency]
        self.scored: list[Scored] = []
        self._warned: set[str] = set()

    @property
    def done_share(self) -> float:
        """How much of the planned change in ranks has happened, from 0 to 1."""
        planned = sum(group.plan.budget for group in self.groups)
        moved = sum(abs(sum(g.ranks()) - g.plan.start) for g in self.groups)
        return moved / planned if planned else 1.0

    def is_event(self, plan_step: int) -> bool:
        """Whether the plan of any group has an event there."""
        return any(group.plan.event_number(plan_step) for group in self.groups)

    def event(self, now: Moment, optimizer: object) -> list[Grant]:
        """What happens now; nothing, unless the plan has an event."""
        self.scored = []
        return [
            grant
            for group in self.groups
            if (number := group.plan.event_number(now.plan))
            for grant in self._change(group, number, now, unwrap_optimizer(optimizer))
        ]

    def score(self, group: Group, step: int) -> Scored:
        """What is known of the experts of a group at a step of the run."""
        signals = group.signals(self.config, step)
        return Scored(group, signals, self._rule(signals).tolist())

    def _change(self, group: Group, event: int, now: Moment, optimizer: object) -> list[Grant]:
        scored = self.score(group, now.run)
        self.scored.append(scored)
        signals, saliency_E, before = scored.signals, scored.saliency_E, group.ranks()
        if not any(saliency_E):
            if self._can_wait(group, event):
                return []
            self._warn_once(
                "saliency",
                f"{group.members[0].block}: at step {now.run} no expert has any saliency, so ranks "
                f"go by expert number. Was the model in training mode, and before_optimizer_step "
                f"called before the gradients were cleared?",
            )
        if self.config.allocation == "prune":
            excess = sum(before) - group.plan.owned(event)
            self._release(group, self._least_important(group, excess), now, optimizer)
        else:
            taken = self._take_back(group, event, saliency_E)
            if any(taken):
                self._release(group, self._weakest_of(group, taken), now, optimizer)
            grants = self._share_out(group, event, saliency_E, taken)
            self._grant(group, grants, now, optimizer)
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

    def _grant(self, group: Group, grants: list[int], now: Moment, optimizer: object) -> None:
        for member, granted in group.split(grants):
            for pool in member.pools:
                rows = pool.grant(granted, now.taken)
                self._restart_importance(pool, granted)
                self._start_rows(pool, rows, now, optimizer)

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
        self, group: Group, freed: list[list[int]], now: Moment, optimizer: object
    ) -> None:
        for member, rows in zip(group.members, freed, strict=True):
            for pool in member.pools if rows else ():
                index = torch.tensor(rows, dtype=torch.int64, device=pool.owner.device)
                pool.release(index, now.run)
                _forget(pool, index, optimizer)

    def _start_rows(self, pool: RankPool, rows: Tensor, now: Moment, optimizer: object) -> None:
        """Claimed rows begin like those of a new adapter, whatever weight decay did to them."""
        if not isinstance(optimizer, torch.optim.Optimizer) or not len(rows):
            return
        _forget(pool, rows, optimizer)
        for parameter in (pool.lora_A, pool.lora_B):
            state = optimizer.state.get(parameter, {})
            if self._rows_inherit(optimizer) and not inherit_second_moment(
                parameter, state, pool.owner, pool.book.num_experts, rows
            ):
                self._warn_unknown(optimizer)
        if decays_weights(optimizer.param_groups):
            pool.redraw(rows, now.run)
        if self.config.option("young_a") == "gradient":
            self._point_rows(pool, rows, optimizer)

    def _point_rows(self, pool: RankPool, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """An average of the gradient, where the optimizer keeps one; else that of this step."""
        state = optimizer.state.get(pool.lora_A, {})
        gradient = state.get("exp_avg", state.get("momentum_buffer", pool.lora_A.grad))
        if not isinstance(gradient, Tensor) or gradient.shape != pool.lora_A.shape:
            self._warn_once(
                "young_a",
                f"young_a='gradient' found no gradient of rows in {type(optimizer).__name__}: "
                f"young rows of A stay random.",
            )
            return
        point_along_gradient(pool.lora_A, gradient, pool.owner, rows, pool.row_norm)

    def _restart_importance(self, pool: RankPool, grants: list[int]) -> None:
        if self.config.option("importance_reset") == "all":
            pool.importance.zero_()
            return
        # The extra last entry stands for the free rows, whose owner is -1.
        grown_E1 = torch.tensor([*(granted > 0 for granted in grants), False])
        pool.importance[grown_E1.to(pool.owner.device)[pool.owner.long()]] = 0.0

    def _rows_inherit(self, optimizer: object) -> bool:
        mode = self.config.young_rows
        return mode == "inherit" or (mode == "own" and not is_adam(optimizer))

    def _warn_unknown(self, optimizer: object) -> None:
        if type(optimizer).__name__ != "SGD":
            self._warn_once(
                "optimizer",
                f"{type(optimizer).__name__} has no second moment per element (exp_avg_sq): with "
                f"young_rows={self.config.young_rows!r} rows that wake up late are treated as "
                f"with 'shared', and may take larger first steps.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            warnings.warn(message, stacklevel=6)
        self._warned.add(kind)


def _forget(pool: RankPool, rows: Tensor, optimizer: object) -> None:
    """Zero what the optimizer keeps of some rows."""
    if isinstance(optimizer, torch.optim.Optimizer):
        for parameter in (pool.lora_A, pool.lora_B):
            forget_rows(parameter, optimizer.state.get(parameter, {}), rows)


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
