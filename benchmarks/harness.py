"""Timing in alternation, in one process, and rows of results with where they came from.

An absolute time on a shared machine is worth nothing, so implementations take turns and each round
gives one ratio; what is reported is the median of the ratios with the 20th and 80th percentile.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one implementation, one value a round."""

    seconds: list[float]

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile of this over the other, round by round."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), percentile(ratios, 20), percentile(ratios, 80)

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def percentile(values: list[float], percent: int) -> float:
    """The value at `percent`, linearly interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))


def alternate(
    implementations: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Run all implementations in turn, `warmup + rounds` times; the order rotates every round."""
    names = list(implementations)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = _time(implementations[name])
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(values) for name, values in seconds.items()}


def _time(function: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def where() -> dict[str, Any]:
    """Versions and device, as they go into every row."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def rows_of(
    case: str, timings: Mapping[str, Timing], frozen: str, peft: str, **more: Any
) -> list[dict[str, Any]]:
    """One row an implementation: median, p20, p80 in seconds, ratios to frozen and to PEFT."""
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {"case": case, "implementation": name, "median_s": timing.median}
        row["p20_s"], row["p80_s"] = percentile(timing.seconds, 20), percentile(timing.seconds, 80)
        row["to_frozen"], row["to_frozen_p20"], row["to_frozen_p80"] = timing.ratio_to(
            timings[frozen]
        )
        if peft in timings:
            row["peft_over_this"] = timings[peft].ratio_to(timing)[0]
        rows.append({**row, **more, **where()})
    return rows


def append(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append rows to `benchmarks/results/NAME.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
