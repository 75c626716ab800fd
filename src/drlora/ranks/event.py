"""One event: experts that compete for ranks are scored, and rows of their pools change hands.

What is due comes from the plan (schedule), who competes for it from the groups, who is to have it
from a rule (saliency), and what changes from the policy (policies). Rows that are granted start as
row_starter says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import ALLOCATIONS, SALIENCIES
from drlora.errors import ConfigError
from drlora.ranks.event_probe import EventProbes
from drlora.ranks.groups import Group, Scored, make_groups
from drlora.ranks.optimizer_rows import unwrap_optimizer
from drlora.ranks.policies import Policy
from drlora.ranks.policies.policy import broken_law
from drlora.ranks.row_starter import RowStarter
from drlora.ranks.saliency import Signals
from drlora.ranks.schedule import Schedule, StepCounts


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
        self._policy: Policy = ALLOCATIONS[config.allocation]
        self._rule: Callable[[Signals], Tensor] = SALIENCIES[config.saliency]
        self._starter: RowStarter | None = None
        has_probes = config.options.get("young_a") == "probe"
        self._probes = EventProbes(adapters, schedule.cap) if has_probes else None
        self._has_warned = False

    @property
    def noun(self) -> str:
        """What happens to ranks, in a word: growth, pruning."""
        return self._policy.noun

    @property
    def done_share(self) -> float:
        """How much of the planned change in ranks has happened, from 0 to 1."""
        planned = sum(group.plan.budget for group in self.groups)
        moved = sum(abs(sum(g.ranks()) - g.plan.start) for g in self.groups)
        return moved / planned if planned else 1.0

    def is_event(self, plan_step: int) -> bool:
        """Whether the plan of any group has an event there."""
        return any(group.plan.event_number(plan_step) for group in self.groups)

    def prepare(self, plan_step: int) -> None:
        """Probes stand in a step that the plan has an event at, and in no other."""
        if self._probes is None:
            return
        if self.is_event(plan_step):
            self._probes.attach()
        else:
            self._probes.detach()

    def release(self) -> None:
        """Leave nothing beside the experts."""
        if self._probes is not None:
            self._probes.detach()

    def event(self, now: StepCounts, optimizer: object) -> Event:
        """What happens now; nothing, unless the plan has an event."""
        starter = self._starter_for(optimizer)
        starter.sketches = self._probes.take() if self._probes is not None else {}
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
            if self._policy.can_wait(self.config, group, event):
                return []
            self._warn_of_no_saliency(group, now)
        change = self._policy.change(self.config, scored, event)
        if broken := broken_law(change, group, self.config, event):
            raise ConfigError(
                f"allocation={self.config.allocation!r} breaks a law at step {now.run}, "
                f"{group.members[0].block}: {broken}. Nothing was changed there; correct the "
                f"policy (drlora.ranks.contract.check_allocation tries it out)."
            )
        self._release(group, change.freed, now, starter)
        self._grant(group, change.granted, now, starter)
        return list(_grants(group, now.run, before, signals, saliency_E))

    def _release(
        self, group: Group, freed: Sequence[Sequence[int]], now: StepCounts, starter: RowStarter
    ) -> None:
        for member, rows in zip(group.members, freed, strict=True) if freed else ():
            for pool in member.pools if rows else ():
                index = torch.tensor(rows, dtype=torch.int64, device=pool.owner.device)
                pool.release(index, now.run)
                starter.forget(pool, index)

    def _grant(
        self, group: Group, granted: Sequence[int], now: StepCounts, starter: RowStarter
    ) -> None:
        for member, of_member in group.split(list(granted)) if granted else ():
            for pool in member.pools:
                starter.start(pool, pool.grant(of_member, now.taken), now)

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
