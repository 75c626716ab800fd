"""What each growth event knew of every expert, in events.jsonl, for curves and reports.

growth.jsonl has a line a grant; an expert that was given nothing is in none. Here a line is a block
(and a projection, where these have ranks of their own) at one event:

    {"step": 64, "block": "model.layers.0.mlp", "projection": "gate_up+down", "ranks": [8, ...],
     "routing": [0.0956, ...], "importance": [3.72e-05, ...], "saliency": [2.55e-08, ...]}

All are what they were just before the event, in three significant digits, and once more after the
last step. Of a run with more than MOST_EVENTS events only every second, third, ... is kept, so that
the file holds at most MOST_EVENTS + 1 lines a block of about 30 bytes an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from drlora.io.jsonl import append_lines
from drlora.ranks.dynamics import RankDynamics
from drlora.ranks.event import Event, Growth
from drlora.ranks.groups import Scored

MOST_EVENTS = 64


class EventLog:
    """Writes events.jsonl beside growth.jsonl.

    Args:
        path: the file.
        dynamics: whose events are written.
        start: steps of earlier calls of `train()`, which are counted too.
    """

    def __init__(self, path: Path, dynamics: RankDynamics, start: int = 0) -> None:
        self.path = path
        self.dynamics = dynamics
        self.start = start
        self.stride = -(-len(dynamics.event_steps) // MOST_EVENTS)

    def write_event(self, event: Event) -> None:
        """What was known at an event of this step, if it is one of those that are kept."""
        group = self.dynamics.growth.groups[0]
        number = group.plan.event_number(self.dynamics.plan_step)
        if number and (number - 1) % self.stride == 0:
            self._write(event.scored)

    def write_end(self) -> None:
        """What is known after the last step."""
        growth: Growth = self.dynamics.growth
        self._write(growth.score(group, self.dynamics.run_step) for group in growth.groups)

    def _write(self, scored: Iterable[Scored]) -> None:
        step = self.start + self.dynamics.run_step
        append_lines(self.path, [line for one in scored for line in _lines(one, step)])


def _lines(scored: Scored, step: int) -> Iterator[dict[str, Any]]:
    """One entry a member of the group."""
    signals = scored.signals
    columns = zip(
        signals.ranks_E.tolist(),
        _short(signals.frequency_E),
        _short(signals.importance_E),
        map(_digits, scored.saliency_E),
        strict=True,
    )
    for member, of_member in scored.group.split(list(columns)):
        ranks, routing, importance, saliency = map(list, zip(*of_member, strict=True))
        yield {
            "step": step,
            "block": member.block,
            "projection": "+".join(member.projections),
            "ranks": ranks,
            "routing": routing,
            "importance": importance,
            "saliency": saliency,
        }


def _short(values: Tensor) -> list[float]:
    return [_digits(value) for value in values.tolist()]


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
