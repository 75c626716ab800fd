"""What statistics and growth cost: `python -m benchmarks.dynamics`.

One model, engine and batch, at the ranks that a run of growth ended with: with these ranks fixed,
unobserved, and with routing counted, importance taken in each step and the updates of
young rows corrected. Half of the rows are young throughout, as at the end of a run; a second case
has as many as a run of the paper (`paper-v5`, 3,750 steps) has in the mean over its steps. One rank
for all, of the same sum, is timed beside them: experts that see more tokens have more ranks, so
unequal ranks are more arithmetic, which is no cost of the dynamics.

Beside the ratio of whole steps, which is as noisy as the machine, stands the time that is spent in
the calls themselves, as a share of the step, and what one growth event takes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Row, alternate, append, line_of, parser, rows_of
from benchmarks.models import ModelShape, make_base, optimizer_step, ours, twin_of
from drlora import DrLoraConfig, RankDynamics
from drlora.adapter.layer import DrLoraExperts
from drlora.adapter.pool import RankPool
from drlora.ranks.schedule import plan_growth
from drlora.ranks.young_rows import Clock, Cohort, young_spans

SHAPE = ModelShape(512, 256, 64, 8, 4, 1024)
RANK = 16
GROWTH = {"r_init": 8, "r_target": RANK, "r_max": 64, "p_grow": 0.2, "grow_every": 4,
          "warmup_steps": 1, "settle_steps": 1}  # fmt: skip
STEPS = 12
PAPER_STEPS = 3750


class Stopwatch:
    """Adds up the seconds spent in some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


class Growing:
    """A model whose ranks have grown to the budget, all claimed rows young.

    Attributes:
        step: one training step with dynamics.
        shares: of each step, the part that was spent observing, scoring and correcting.
        event_seconds: time in `after_optimizer_step` at each event of the growth.
    """

    def __init__(self, base: nn.Module) -> None:
        self.model = ours(twin_of(base), RANK, **GROWTH)
        self.shares: list[float] = []
        self.event_seconds: list[float] = []
        self._watch = Stopwatch()
        for layer in experts_of(self.model):
            layer._observe = self._watch.around(layer._observe)  # type: ignore[method-assign]
        dynamics = RankDynamics(self.model, total_steps=STEPS)
        dynamics.before_optimizer_step = self._watch.around(  # type: ignore[method-assign]
            dynamics.before_optimizer_step
        )
        dynamics.after_optimizer_step = self._watch.around(  # type: ignore[method-assign]
            self._note_events(dynamics.after_optimizer_step)
        )
        self._plain = same_batch(self.model, dynamics)
        for _ in range(STEPS):
            self._plain()
        spent, stored = dynamics.budget()
        assert spent == stored, "all arms work at the same mean rank"

    def step(self) -> None:
        """One training step; notes the share of dynamics."""
        self._watch.seconds, start = 0.0, time.perf_counter()
        self._plain()
        self.shares.append(self._watch.seconds / (time.perf_counter() - start))

    def _note_events(self, call: Callable[..., list]) -> Callable[..., list]:
        def noted(*args: Any) -> list:
            start = time.perf_counter()
            grants = call(*args)
            if grants:
                self.event_seconds.append(time.perf_counter() - start)
            return grants

        return noted

    def grow_up(self, young_share: float) -> None:
        """Let the rows that were claimed first be old, but for `young_share` of all rows."""
        for pool in pools_of(self.model):
            pool.birth[: round(len(pool.birth) * (1 - young_share))] = 0


def experts_of(model: nn.Module) -> Iterator[DrLoraExperts]:
    """The adapted layers."""
    return (module for module in model.modules() if isinstance(module, DrLoraExperts))


def pools_of(model: nn.Module) -> Iterator[RankPool]:
    """All rank pools."""
    return (module for module in model.modules() if isinstance(module, RankPool))


def same_batch(model: nn.Module, dynamics: RankDynamics | None = None) -> Callable[[], None]:
    """A training step; all of them see the same tokens."""
    torch.manual_seed(1)
    return optimizer_step(model, SHAPE, dynamics)


def unobserved(base: nn.Module, like: nn.Module | None = None) -> nn.Module:
    """Fixed ranks, all alike or those of another model, and nothing counted."""
    model = ours(twin_of(base), RANK)
    for layer in experts_of(model):
        layer._observe = lambda adapter, out, *rest: out  # type: ignore[method-assign]
    if like is not None:
        for mine, other in zip(pools_of(model), pools_of(like), strict=True):
            mine.set_owners(other.book.owner_R)
    return model


def paper_young_share() -> float:
    """Young rows over all rows of a pool, in the mean over the steps of a run of the paper."""
    config = DrLoraConfig.preset("paper-v5")
    plan = plan_growth(config, SHAPE.experts, PAPER_STEPS)
    start = SHAPE.experts * config.r_init
    bounds = [start + plan.due(k) for k in range(len(plan.event_steps) + 1)]
    births = zip(bounds, bounds[1:], plan.event_steps, strict=False)
    cohorts = [Cohort(*cohort) for cohort in births]
    young = [
        sum(map(len, young_spans(cohorts, Clock(step, 0.9, 0.999, 1e-8))))
        for step in range(1, PAPER_STEPS + 1)
    ]
    return statistics.mean(young) / (SHAPE.experts * config.r_target)


def run(rounds: int, seconds: float | None = None) -> list[Row]:
    """Time both cases, fixed ranks and one rank for all in turn."""
    base, share = make_base(SHAPE), paper_young_share()
    half, fewer = Growing(base), Growing(base)
    fewer.grow_up(share)
    steps = {
        "one rank": same_batch(unobserved(base)),
        "fixed ranks": same_batch(unobserved(base, half.model)),
        "with dynamics": half.step,
        "mean of a run": fewer.step,
    }
    timings = alternate(steps, rounds, seconds=seconds)
    case = f"dynamics {SHAPE.name} r{RANK}"
    rows = rows_of(case, timings, "fixed ranks", "")
    for row, grown, young in ((rows[2], half, 0.5), (rows[3], fewer, share)):
        row["young_share"] = young
        row["share_of_step"] = statistics.median(grown.shares)
        row["event_s"] = statistics.median(grown.event_seconds)
    rows[3]["case"] = f"{case}, {share:.0%} of the rows young"
    rows[3]["implementation"] = "with dynamics"
    return rows


def main(argv: list[str] | None = None) -> int:
    """Time it and append the rows to benchmarks/results/dynamics.jsonl."""
    arguments = parser(__doc__, rounds=15).parse_args(argv)
    rows = run(arguments.rounds, arguments.seconds)
    for row in rows:
        more = f"  in the calls {row['share_of_step']:.2%}" if "share_of_step" in row else ""
        print(line_of(row) + more)
    if not arguments.dry:
        append("dynamics", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
