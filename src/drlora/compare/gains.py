"""The gain of a method over a baseline, by task and seed, from the results of a matrix.

    baselines = best_baselines(matrix, "loss", "tiny", tasks)  # or {task: "lora"}
    gains_by_task(matrix, "loss", "tiny", baselines, "drlora")

A baseline is given for each task, since the best one need not be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from drlora.compare.metrics import METRICS
from drlora.compare.results import Matrix
from drlora.compare.statistics import differences

GainsByTask = dict[str, dict[int, float]]
"""Task -> seed -> gain; positive is better."""


def gains_by_task(
    matrix: Matrix, metric: str, model: str, baselines: Mapping[str, str], method: str
) -> GainsByTask:
    """The gain of `method` over the baseline of each task, in the metric's shown unit."""
    higher = METRICS[metric].higher_is_better
    return {
        task: differences(
            matrix.values(metric, (model, task, baseline)),
            matrix.values(metric, (model, task, method)),
            higher,
        )
        for task, baseline in baselines.items()
    }


def relative(
    matrix: Matrix, metric: str, model: str, baselines: Mapping[str, str], method: str
) -> GainsByTask | None:
    """`gains_by_task` in per cent of the baseline's mean; None where one has no mean above zero.

    Tasks whose metrics are of different sizes weigh the same in the mean of these.
    """
    found: GainsByTask = {}
    gains = gains_by_task(matrix, metric, model, baselines, method)
    for task, baseline in baselines.items():
        values = matrix.values(metric, (model, task, baseline)).values()
        mean = fmean(values) if values else 0.0
        if mean <= 0:
            return None
        found[task] = {seed: 100 * value / mean for seed, value in gains[task].items()}
    return found


def relative_over_models(
    matrix: Matrix, metric: str, baselines: Mapping[str, Mapping[str, str]], method: str
) -> dict[tuple[str, str], dict[int, float]] | None:
    """(model, task) -> seed -> gain in per cent; `baselines` are by model, then by task.

    None where `relative` is for one of the models.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for model, by_task in baselines.items():
        shares = relative(matrix, metric, model, by_task, method)
        if shares is None:
            return None
        found |= {(model, task): by_seed for task, by_seed in shares.items()}
    return found


def best_baselines(matrix: Matrix, metric: str, model: str, tasks: Sequence[str]) -> dict[str, str]:
    """Task -> the plan's baseline with the best mean, of those with a run for every seed.

    It is chosen by the very runs that it is then compared on, which flatters it: a gain over it
    is stated a little too small.
    """
    higher = METRICS[metric].higher_is_better
    found = {}
    for task in tasks:
        seeds = set(matrix.plan.seeds_of(task))
        means = {
            baseline: fmean(values.values())
            for baseline in matrix.plan.baselines
            if (values := matrix.values(metric, (model, task, baseline))).keys() >= seeds
        }
        if means:
            found[task] = (max if higher else min)(means, key=means.__getitem__)
    return found
