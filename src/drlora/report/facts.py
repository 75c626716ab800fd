"""What a report says in words and numbers: one row a fact, one column a run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from drlora.config.options import GENERAL
from drlora.ranks.concentration import gini, top_share
from drlora.report.read import RankMap, RunRecord

NONE = "–"
_FACTORS = ("r_target", "experts", "layers", "projections")  # of a budget of ranks
Row = tuple[str, list[str]]
Facts = dict[str, Callable[[RunRecord], str]]


def title(runs: Sequence[RunRecord]) -> str:
    """`DR-LoRA run NAME`, or how many runs."""
    return f"DR-LoRA run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} DR-LoRA runs"


def lead(run: RunRecord) -> str:
    """The run in one sentence or two."""
    data = training_data(run)
    what = f"{_model(run)} on {data}" if data else _model(run)
    under_way = "" if run.result else " so far"
    parts = [f"{what}, {run.steps:,} steps{under_way}." if run.steps else f"{what}."]
    losses = [_held_out(run, kind) for kind in ("before", "after")]
    if None not in losses:
        parts.append(f"Held-out loss went from {losses[0]:.4f} to {losses[1]:.4f}.")
    if reasons := run.result.get("diverged"):
        parts.insert(0, f"This run diverged, its adapter is not to be used: {'; '.join(reasons)}.")
    if run.waits_for_growth:
        parts.append("There was no growth event yet.")
    if ranks := [row for rank_map in run.maps for row in rank_map.final()]:
        highest, lowest = max(map(max, ranks)), min(map(min, ranks))
        parts.append(
            f"Ranks range from {lowest} to {highest}; the top tenth of a layer's experts holds "
            f"{fmean(map(top_share, ranks)):.0%} of its ranks."
            if highest > lowest
            else f"Every expert has rank {highest}."
        )
    return " ".join(parts)


def table(runs: Sequence[RunRecord], facts: Facts) -> list[Row]:
    """The facts that are known of at least one run."""
    rows = [(name, [_known(fact, run) for run in runs]) for name, fact in facts.items()]
    return [row for row in rows if any(value != NONE for value in row[1])]


def _known(fact: Callable[[RunRecord], str], run: RunRecord) -> str:
    return NONE if fact in _OF_RANKS and not run.maps else fact(run)


def _model(run: RunRecord) -> str:
    """The model's name; of one in a folder, the folder's."""
    found = str(run.recipe.get("model") or run.adapter.get("base_model_name_or_path") or "a model")
    return _without_folder(found)


def training_data(run: RunRecord) -> str | None:
    """The data's name; of a file in a folder, the file's."""
    found = (run.recipe.get("data") or {}).get("train")
    return _without_folder(found) if isinstance(found, str) and found else None


def _without_folder(name: str) -> str:
    """Where somebody's files lie is nothing for a page that is shown around."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if is_path(name) else name


def is_path(name: str) -> bool:
    """Whether a name is one of a file or folder, and not on the hub (`name` or `owner/name`)."""
    looks_so = (
        name[:1] in ("/", "\\", "~", ".")
        or re.match(r"[A-Za-z]:[\\/]", name)
        or len(re.findall(r"[\\/]", name)) > 1
        or Path(name).suffix in (".json", ".jsonl", ".parquet")
    )
    return bool(looks_so) or os.path.exists(name)


def _held_out(run: RunRecord, kind: str) -> float | None:
    return ((run.measured(kind) or {}).get("loss") or {}).get("loss")


def _loss(kind: str) -> Callable[[RunRecord], str]:
    return lambda run: NONE if (loss := _held_out(run, kind)) is None else f"{loss:.4f}"


def _match(kind: str) -> Callable[[RunRecord], str]:
    def fact(run: RunRecord) -> str:
        found = (run.measured(kind) or {}).get("match")
        if not found:
            return NONE
        return f"{found['accuracy']:.1%} ({found['correct']} of {found['total']})"

    return fact


def _setting(*path: str) -> Callable[[RunRecord], str]:
    def fact(run: RunRecord) -> str:
        value: Any = run.recipe
        for key in path:
            value = (value or {}).get(key)
        return NONE if value is None else str(value)

    return fact


def _adapter(*names: str) -> Callable[[RunRecord], str]:
    def fact(run: RunRecord) -> str:
        values = [run.adapter.get(name) for name in names]
        return NONE if None in values else " / ".join(map(_shown, values))

    return fact


def _option(name: str) -> Callable[[RunRecord], str]:
    return lambda run: _shown(run.adapter["options"].get(name, GENERAL[name].default))


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _result(key: str, show: Callable[[Any], str]) -> Callable[[RunRecord], str]:
    return lambda run: NONE if run.result.get(key) is None else show(run.result[key])


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _shape(run: RunRecord) -> str:
    experts = sorted(set(run.maps[0].experts))
    return f"{len(run.maps[0].blocks)} blocks of {' or '.join(map(str, experts))} experts"


def _spent(run: RunRecord) -> str:
    budget = run.result.get("budget")
    if not budget:
        return NONE
    spent, stored = budget["spent"], budget["stored"]
    planned = math.prod(budget.get(name, 0) for name in _FACTORS)
    if planned in (0, stored) or spent > planned:
        return f"{spent:,} of {stored:,}"
    return f"{spent:,} of {planned:,} (room for {stored:,})"  # of layers that share one budget


def _over_blocks(measure: Callable[[Any], float], show: str) -> Callable[[RunRecord], str]:
    def fact(run: RunRecord) -> str:
        return show.format(fmean(measure(row) for m in run.maps for row in m.final()))

    return fact


def _range(run: RunRecord) -> str:
    rows = [row for rank_map in run.maps for row in rank_map.final()]
    mean = fmean(rank for row in rows for rank in row)
    return f"{min(map(min, rows))} / {mean:.2f} / {max(map(max, rows))}"


def _routing(run: RunRecord) -> str:
    last = last_routing(run.maps[0])
    return NONE if last is None else f"{fmean(map(gini, last)):.2f}"


def last_routing(rank_map: RankMap) -> list[list[float]] | None:
    """block -> routing frequency of each expert when it was last written; None if never."""
    if not rank_map.known_at:
        return None
    rows = rank_map.signals["routing"][-1]
    return [np.nan_to_num(row[:n]).tolist() for row, n in zip(rows, rank_map.experts, strict=True)]


def _events(run: RunRecord) -> str:
    return f"{len(run.maps[0].events)}" if run.maps[0].events else NONE


def _last(key: str, show: Callable[[float], str]) -> Callable[[RunRecord], str]:
    def fact(run: RunRecord) -> str:
        found = [e[key] for e in run.logs if e.get(key) is not None]
        return show(found[-1]) if found else NONE

    return fact


def _speed(run: RunRecord) -> str:
    found = [e["tokens_per_second"] for e in run.logs if e.get("tokens_per_second")]
    return f"{fmean(found):,.0f}" if found else NONE


def _memory_said(run: RunRecord) -> str:
    """What was forecast, with how far off it was where that is known."""
    said = (run.forecast.get("memory_bytes") or {}).get("total")
    if not said:
        return NONE
    key = "peak_gpu_memory_bytes" if "peak_gpu_memory_bytes" in run.result else "peak_memory_bytes"
    return _mib(said) + _off(said, run.result.get(key))


def _time_said(run: RunRecord) -> str:
    said = (run.forecast.get("planned") or {}).get("step_seconds")
    steps, seconds = run.result.get("steps"), run.result.get("seconds")
    return f"{said:.3f} s" + _off(said, seconds / steps if steps else None) if said else NONE


def _off(said: float, found: float | None) -> str:
    """` (4% less than measured)`."""
    if not found:
        return ""
    share = said / found - 1
    return f" ({abs(share):.0%} {'more' if share > 0 else 'less'} than measured)"


def _wrong(run: RunRecord) -> str:
    entry = run.logs[-1] if run.logs else {}
    found = [
        f"{entry[k]} {k.split('_')[0]}" for k in ("skipped_steps", "poisoned_steps") if k in entry
    ]
    return ", ".join(found) or NONE


_mean_gini = _over_blocks(gini, "{:.2f}")
_mean_top_share = _over_blocks(top_share, "{:.0%}")
# What is not known of a run that has written no ranks yet.
_OF_RANKS = (_shape, _events, _range, _routing, _mean_gini, _mean_top_share)


def _verdict(run: RunRecord) -> str:
    """Of a run that is no success; a good one needs no word."""
    reasons = run.result.get("diverged")
    return f"diverged: {'; '.join(reasons)}" if reasons else NONE


SUMMARY: Facts = {
    "Model": _model,
    "Training data": lambda run: training_data(run) or NONE,
    "Method": _setting("method"),
    "Verdict": _verdict,
    "Steps": lambda run: _count(run.steps) if run.steps else NONE,
    "Held-out loss before": _loss("before"),
    "Held-out loss after": _loss("after"),
    "Exact match before": _match("before"),
    "Exact match after": _match("after"),
    "Last training loss": _last("loss", lambda value: f"{value:.4f}"),
    "MoE blocks": _shape,
    "Growth events": _events,
    "Ranks spent": _spent,
    "Rank min / mean / max": _range,
    "Gini coefficient of ranks": _mean_gini,
    "Gini coefficient of routing": _routing,
    "Top tenth's share of ranks": _mean_top_share,
    "Evenness of the load of experts": _last("router_entropy", lambda value: f"{value:.3f}"),
    "Load of the busiest expert": _last("router_load_max", lambda value: f"{value:.1f} x even"),
    "Experts without load": _last("router_dead", lambda value: f"{value:.1%}"),
    "Trained routers moved by": _last("router_drift", lambda value: f"{value:.2%}"),
}

COST: Facts = {
    "Training time": _result("seconds", lambda value: f"{value:,.0f} s"),
    "Time a step": lambda run: (
        f"{run.result['seconds'] / run.result['steps']:.3f} s" if run.result.get("steps") else NONE
    ),
    "Time a step, forecast": _time_said,
    "Tokens a second": _speed,
    "Observing and growing": _last("dynamics_share", lambda value: f"{value:.1%} of the time"),
    "Peak memory": _result("peak_memory_bytes", _mib),
    "Peak GPU memory": _result("peak_gpu_memory_bytes", _mib),
    "Memory, forecast": _memory_said,
    "Trainable parameters": _result("trainable_parameters", _count),
    "Stored parameters": _result("stored_parameters", _count),
    "All parameters": _result("total_parameters", _count),
    "Steps that went wrong": _wrong,
}

SETUP: Facts = {
    "r_init / r_target / r_max": _adapter("r_init", "r_target", "r_max"),
    "lora_alpha": _adapter("lora_alpha"),
    "Projections": _adapter("projections"),
    "Rank for each": _option("rank_per"),
    "beta / gamma / p_grow": _adapter("beta", "gamma", "p_grow"),
    "grow_every / settle_steps": _adapter("grow_every", "settle_steps"),
    "Most ranks an expert and event": _adapter("cap"),
    "Saliency": _adapter("saliency"),
    "Router": _adapter("router"),
    "Learning rate": _setting("training", "learning_rate"),
    "Batch size a device": _setting("training", "per_device_train_batch_size"),
    "Seed": _result("seed", str),
    "Device": _result("device", str),
}
