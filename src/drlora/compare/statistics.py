"""Means, spreads, t-intervals and paired differences of a few runs, as pure functions.

    interval([0.91, 0.93, 0.90])                      # mean, standard deviation, 95 % interval
    paired_gain({1: 0.80, 2: 0.90}, {1: 0.85, 2: 0.91}, higher_is_better=True)

Runs are few, so intervals are Student's t, exact for normal values; the quantile is computed here
from the regularised incomplete beta function (Abramowitz and Stegun 26.5.8 and 26.7.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and what is known about it.

    Attributes:
        n: values behind it.
        mean: their mean.
        sd: their standard deviation (n - 1); None of a single value.
        low, high: 95 % t-interval of the mean; None of a single value.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high is not None and self.high < 0


@dataclass(frozen=True)
class Gain:
    """How much better one method is than another, on what both were run with.

    Attributes:
        difference: of the pairs; positive is better, whatever the metric's direction.
        wins, ties: pairs in which it is better, and equal.
    """

    difference: Interval
    wins: int
    ties: int


def interval(values: Sequence[float]) -> Interval:
    """Mean, standard deviation and 95 % t-interval of `values` (at least one)."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(len(values), mean, None, None, None)
    sd = stdev(values)
    half = t_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * sd / math.sqrt(len(values))
    return Interval(len(values), mean, sd, mean - half, mean + half)


def differences(
    baseline: Mapping[int, float], method: Mapping[int, float], higher_is_better: bool
) -> dict[int, float]:
    """Seed -> how much better the method is, for the seeds that both have."""
    sign = 1.0 if higher_is_better else -1.0
    return {s: sign * (method[s] - baseline[s]) for s in sorted(baseline.keys() & method.keys())}


def gain(pairs: Mapping[int, float]) -> Gain | None:
    """The gain behind differences by seed; None where there is no pair."""
    if not pairs:
        return None
    values = list(pairs.values())
    return Gain(interval(values), sum(v > 0 for v in values), sum(v == 0 for v in values))


def paired_gain(
    baseline: Mapping[int, float], method: Mapping[int, float], higher_is_better: bool
) -> Gain | None:
    """The gain of a method over a baseline, each given as seed -> metric, paired by seed."""
    return gain(differences(baseline, method, higher_is_better))


def mean_gain(by_task: Mapping[Any, Mapping[int, float]]) -> Gain | None:
    """The gain on the mean over tasks (or whatever the keys are), paired by seed.

    Each seed's differences are averaged over the tasks first, each task weighing the same; only
    seeds that every task has count. The interval is over seeds: it holds for these tasks, and says
    nothing of others.
    """
    if not by_task:
        return None
    seeds = set.intersection(*(set(pairs) for pairs in by_task.values()))
    return gain({s: fmean(pairs[s] for pairs in by_task.values()) for s in sorted(seeds)})


def item_gain(
    baseline: Sequence[Sequence[float]],
    method: Sequence[Sequence[float]],
    higher_is_better: bool,
) -> Interval:
    """The gain with its interval over test items, the runs as they are.

    Args:
        baseline, method: one sequence a run, of one value an item; the items are the same ones.

    Each item's value is averaged over the runs first, so the interval says what other items of the
    same kind would have changed, not what other seeds would have.
    """
    sign = 1.0 if higher_is_better else -1.0
    pairs = zip(zip(*baseline, strict=True), zip(*method, strict=True), strict=True)
    return interval([sign * (fmean(own) - fmean(other)) for other, own in pairs])


@cache
def t_quantile(p: float, df: int) -> float:
    """The value that Student's t with `df` degrees of freedom stays below with probability p.

    Raises:
        ValueError: unless 0.5 <= p < 1 and df >= 1.
    """
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"t_quantile(p={p}, df={df}) needs 0.5 <= p < 1 and df >= 1")
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with `df` degrees of freedom."""
    tail = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return 1 - tail if t >= 0 else tail


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for a, b > 0 and 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # The continued fraction converges fast only left of the mean; right of it, use the symmetry.
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b), evaluated forwards by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d or tiny)
    value = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            change = c * d
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return value
