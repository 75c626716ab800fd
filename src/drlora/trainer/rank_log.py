"""Where the ranks are, in a few numbers for the Trainer's log, and what finding them cost.

rank_mean           mean rank of an expert
rank_gini           Gini coefficient of the ranks of a block's experts, mean over blocks
rank_top_share      share of a block's ranks that its top tenth of experts has, mean over blocks
budget_spent        share of the stored rows that experts own
dynamics_share      share of the time since training began that observing and growing took
tokens_per_second   real tokens that were learned from, of all processes, since the last entry
rank_gini/layer_03, rank_top_share/layer_03         of one block, after its ranks have changed
growth_events, grow_every, settle_steps, grant_cap  once, at first: the schedule, as it was chosen
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch.distributed as dist
from torch import Tensor

from drlora.ranks.concentration import gini, top_share
from drlora.ranks.dynamics import RankDynamics


class RankLog:
    """The entries of one run.

    Attributes:
        seconds: host time spent inside `timed`. On a GPU the work goes on after that.
    """

    def __init__(self, dynamics: RankDynamics) -> None:
        self.dynamics = dynamics
        self.seconds = 0.0
        self.has_changed = True
        self._told_schedule = False
        self._started = time.perf_counter()
        self._known: dict[str, float] = {}
        # Counted on the device, so that an ordinary step does not make the host wait.
        self._tokens: Tensor | float = 0.0
        self._counted_since = self._started

    def count_tokens(self) -> None:
        """Count the tokens of a step; call it before the dynamics take their signals."""
        meter = next(iter(self.dynamics.adapters.values())).meter
        self._tokens = self._tokens + meter.num_tokens.detach()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of what is done inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun

    def entries(self) -> dict[str, float]:
        """What is to be logged now; the values of single blocks only after a change."""
        entries: dict[str, float] = {}
        if self.has_changed:
            layers = [_mean_ranks(projections) for projections in self.dynamics.ranks().values()]
            ginis, shares = [gini(row) for row in layers], [top_share(row) for row in layers]
            owned, stored = self.dynamics.budget()
            self._known = {
                "rank_mean": float(np.mean(np.concatenate(layers))),
                "rank_gini": float(np.mean(ginis)),
                "rank_top_share": float(np.mean(shares)),
                "budget_spent": owned / stored,
            }
            for number, (unequal, share) in enumerate(zip(ginis, shares, strict=True)):
                entries[f"rank_gini/layer_{number:02}"] = unequal
                entries[f"rank_top_share/layer_{number:02}"] = share
            self.has_changed = False
        entries |= self._schedule_once()
        share = self.seconds / (time.perf_counter() - self._started)
        speed = {"dynamics_share": share, "tokens_per_second": self._tokens_per_second()}
        return {**self._known, **speed, **entries}

    def _schedule_once(self) -> dict[str, float]:
        if self._told_schedule or not self.dynamics.event_steps:
            return {}
        self._told_schedule = True
        schedule = self.dynamics.schedule
        return {
            "growth_events": len(self.dynamics.event_steps),
            "grow_every": schedule.grow_every,
            "settle_steps": schedule.settle_steps,
            "grant_cap": schedule.cap,
        }

    def _tokens_per_second(self) -> float:
        processes = dist.get_world_size() if dist.is_initialized() else 1
        now = time.perf_counter()
        speed = processes * float(self._tokens) / (now - self._counted_since)
        self._tokens, self._counted_since = 0.0, now
        return speed


def _mean_ranks(projections: Mapping[str, Sequence[int]]) -> np.ndarray:
    """(E,) mean over the projections."""
    return np.mean([row for row in projections.values()], axis=0)
