"""The metrics that runs can be compared by, and where a run's measurement has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        title: for tables.
        path: where it is in a run's measurement (`drlora.evaluation.measure.Measurement.to_dict`).
        higher_is_better: its direction.
        scale: factor to the shown unit: 100 for a share shown in per cent.
        digits: shown behind the decimal point.
    """

    title: str
    path: tuple[str, str]
    higher_is_better: bool
    scale: float = 1.0
    digits: int = 4


METRICS = {
    "loss": Metric("held-out loss (nats a token)", ("loss", "loss"), False),
    "forgetting": Metric("loss on other data (nats a token)", ("forgetting", "loss"), False),
    "exact_match": Metric("exact match (%)", ("match", "accuracy"), True, 100.0, 2),
    "error_rate": Metric("word error rate (%)", ("match", "error_rate"), False, 100.0, 2),
}


def value_of(metric: str, measured: Mapping[str, Any]) -> float | None:
    """The metric in a measurement, in its shown unit; None where it was not measured or not finite.

    A loss that is not finite is written as null, and comes back as None as well.
    """
    found: Any = measured
    for key in METRICS[metric].path:
        found = (found or {}).get(key)
    return None if found is None else float(found) * METRICS[metric].scale


def items_of(metric: str, result: Mapping[str, Any]) -> list[float] | None:
    """A result's value of each held-out item, with the metric as their mean; None where not kept.

    A loss weighs each token the same, so an item's share of it is its loss over the mean number of
    target tokens.
    """
    items = result.get("items") or {}
    if metric == "loss" and items.get("loss_centinats"):
        nats = items["loss_centinats"]
        if None in nats:  # the run diverged
            return None
        scale = len(nats) / result["after"]["loss"]["target_tokens"] / 100
        return [value * scale for value in nats]
    if metric == "exact_match" and items.get("is_correct"):
        return [METRICS[metric].scale * (right == "1") for right in items["is_correct"]]
    return None
