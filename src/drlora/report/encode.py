"""The data that a report's page draws from, small enough to stand in the page.

Ranks are the start and the grants, which are exact. Signals are quantised on a logarithmic scale,
in 16 bits where there are few and in 8 bits (steps of some percent) where there are many; of these
the events that are kept are thinned until all fit into SIGNAL_BYTES.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora.report.read import SIGNALS, Entry, RankMap, RunRecord

SIGNAL_BYTES = 800_000  # of all runs of a page together, before base64
FEW = 100_000  # values that may take two bytes each
MOST_POINTS = 1500
CURVES = {
    "loss": "training loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "rank_mean": "mean rank",
    "rank_gini": "Gini coefficient of ranks",
    "budget_spent": "share of the stored rows that experts own",
    "router_entropy": "evenness of the load of experts (1: even)",
    "router_load_max": "load of the busiest expert (1: even)",
    "router_dead": "share of experts without load",
    "router_drift": "how far trained routers have moved",
    "dynamics_share": "share of time for observing and growing",
}


def encode_runs(runs: Sequence[RunRecord]) -> str:
    """JSON that can stand in a <script> element: no `<`, `>`, `&` and no character beyond ASCII."""
    payload = {
        "curves": CURVES,
        "runs": [_run(run, SIGNAL_BYTES // len(runs)) for run in runs],
    }
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _run(run: RunRecord, signal_bytes: int) -> Entry:
    logs = run.logs[:: max(1, -(-len(run.logs) // MOST_POINTS))]
    return {
        "name": run.name,
        "steps": run.steps,
        "log": {
            "step": [entry["step"] for entry in logs],
            **{
                key: [_plain(entry.get(key)) for entry in logs]
                for key in CURVES
                if any(entry.get(key) is not None for entry in logs)
            },
        },
        "epochs_per_step": run.epochs_per_step,
        "diverged_at": run.diverged_at,
        "held_out": _held_out(run),
        "gamma": run.adapter.get("gamma"),
        "maps": [_map(rank_map, signal_bytes // len(run.maps)) for rank_map in run.maps],
    }


def _held_out(run: RunRecord) -> list[list[float]]:
    """(step, loss) pairs: before, the Trainer's evaluations, after."""
    found: dict[int, float] = {}
    for entry in run.metrics:
        loss = entry.get("eval_loss") if entry.get("kind") == "log" else entry.get("loss")
        if entry.get("kind") in ("before", "after") and isinstance(loss, dict):
            loss = loss.get("loss")
        elif "eval_loss" not in entry:
            continue
        if (plain := _plain(loss)) is not None:
            found[entry["step"]] = plain
    return [[step, loss] for step, loss in sorted(found.items())]


def _plain(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _map(rank_map: RankMap, signal_bytes: int) -> Entry:
    most = max(rank_map.experts)
    return {
        "projection": rank_map.projection,
        "blocks": list(rank_map.blocks),
        "experts": list(rank_map.experts),
        "events": list(rank_map.events),
        "start": _integers(rank_map.history[0], "<i2"),
        "grants": {
            "event": _integers([g.event for g in rank_map.grants], "<i2"),
            "cell": _integers([g.block * most + g.expert for g in rank_map.grants], "<i4"),
            "granted": _integers([g.granted for g in rank_map.grants], "<i2"),
            **{
                name: quantise(np.array([g.signals[number] for g in rank_map.grants]), 16)
                for number, name in enumerate(SIGNALS)
            },
        },
        **_signals(rank_map, signal_bytes),
    }


def _signals(rank_map: RankMap, signal_bytes: int) -> Entry:
    places = rank_map.history[0].size * len(SIGNALS)
    most = max(2, signal_bytes // places)
    known = len(rank_map.known_at)
    # Evenly spread, the first and the last always among them.
    kept = np.unique(np.linspace(0, known - 1, min(known, most)).round().astype(int))
    bits = 16 if len(kept) * places <= FEW else 8
    return {
        "known_at": [rank_map.known_at[number] for number in kept],
        "signals": {name: quantise(array[kept], bits) for name, array in rank_map.signals.items()},
    }


def quantise(values: NDArray[np.float64], bits: int) -> Entry:
    """Values >= 0 on a logarithmic scale between their least and greatest.

    0 stands for 0, 1 for the least, 2 ** bits - 2 for the greatest, 2 ** bits - 1 for NaN.
    """
    steps = 2**bits - 3
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    code = np.zeros(values.shape, dtype=np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log(values / low) / max(np.log(high / low), 1e-9) * steps
        is_positive = np.isfinite(values) & (values > 0)
    code[is_positive] = 1 + np.clip(scaled[is_positive].round(), 0, steps).astype(np.int64)
    code[np.isnan(values)] = 2**bits - 1
    return {**_integers(code, "<u2" if bits == 16 else "<u1"), "low": low, "high": high}


def _integers(values: ArrayLike, dtype: str) -> Entry:
    """Little-endian integers in base64, and what they are."""
    data = np.asarray(values).astype(dtype).tobytes()
    return {"type": dtype[1:], "data": base64.b64encode(data).decode("ascii")}
