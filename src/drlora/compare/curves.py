"""Held-out loss on the way: mean curves, and how soon a method is where a baseline ends.

    share_until(matrix, "tiny", "backwards", "lora", "drlora")   # seed -> 0.4: at 40 % of the steps

Curves are what the Trainer evaluated during a run (`eval_strategy: steps`), on the data that the
run is compared on. A point of one is not what a shorter run would end at: the learning rate has
the schedule of the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from drlora.compare.results import Matrix, Place

Curve = Sequence[Sequence[float]]
"""[step, held-out loss in nats a token], steps ascending."""


def curves(matrix: Matrix, place: Place) -> dict[int, Curve]:
    """Seed -> curve of the finished compared runs of a place that have one."""
    found = {}
    for cell in matrix.compare:
        if cell.place == place and cell.key in matrix.results:
            curve = matrix.results[cell.key].get("held_out_curve")
            if curve and len(curve) > 1:
                found[cell.seed] = curve
    return found


def mean_curve(by_seed: Mapping[int, Curve]) -> list[tuple[float, float]]:
    """The mean loss at the steps that all seeds have."""
    losses = [{step: loss for step, loss in curve} for curve in by_seed.values()]
    if not losses:
        return []
    common = set(losses[0]).intersection(*losses[1:])
    return [(step, fmean(of[step] for of in losses)) for step in sorted(common)]


def step_at(curve: Curve, loss: float) -> float | None:
    """The first step at which a curve is at `loss` or below, linear between points; or None."""
    before: Sequence[float] | None = None
    for point in curve:
        if point[1] <= loss:
            if before is None:
                return point[0]
            share = (before[1] - loss) / (before[1] - point[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def lowest(by_seed: Mapping[int, Curve]) -> dict[int, float]:
    """Seed -> the lowest loss of its curve: what stopping early would have kept.

    It is chosen on the data that it is measured on, which flatters every method a little.
    """
    return {seed: min(loss for _, loss in curve) for seed, curve in by_seed.items()}


def share_until(
    matrix: Matrix, model: str, task: str, baseline: str, method: str
) -> dict[int, float | None]:
    """Seed -> share of the steps until the method's curve is where the baseline's ends.

    None of a seed where it never is. Only seeds that both have.
    """
    ends, own = (curves(matrix, (model, task, which)) for which in (baseline, method))
    found: dict[int, float | None] = {}
    for seed in sorted(ends.keys() & own.keys()):
        step = step_at(own[seed], ends[seed][-1][1])
        found[seed] = None if step is None else step / own[seed][-1][0]
    return found
