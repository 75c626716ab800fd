"""Timing in alternation, in one process, and rows of results with where they came from.

An absolute time on a shared machine is worth nothing, so implementations take turns and each round
gives one ratio; what is reported is the median of the ratios with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
LEAST_ROUNDS = 3
Row = dict[str, Any]
Case = TypeVar("Case")


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
    implementations: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    seconds: float | None = None,
    calls: int = 1,
    least: int = LEAST_ROUNDS,
) -> dict[str, Timing]:
    """Run all implementations in turn, `warmup + rounds` times; the order rotates every round.

    Args:
        implementations: name -> what is timed.
        rounds: timed rounds.
        warmup: rounds before them.
        seconds: stop early once this much has passed, though not before `least` rounds.
        calls: calls per turn, without waiting for the device between them; their mean counts.
    """
    names = list(implementations)
    taken: dict[str, list[float]] = {name: [] for name in names}
    started = time.monotonic()
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = _time(implementations[name], calls)
            if number >= warmup:
                taken[name].append(elapsed)
        late = seconds is not None and time.monotonic() - started > seconds
        if late and number + 1 - warmup >= least:
            break
    return {name: Timing(values) for name, values in taken.items()}


def _time(function: Callable[[], Any], calls: int) -> float:
    """Seconds of one call: the device's own clock where there is a device, else the wall's."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def where() -> Row:
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
) -> list[Row]:
    """One row an implementation: median, p20, p80 in seconds, ratios to frozen and to PEFT."""
    rows = []
    for name, timing in timings.items():
        row: Row = {"case": case, "implementation": name, "median_s": timing.median}
        row["p20_s"], row["p80_s"] = percentile(timing.seconds, 20), percentile(timing.seconds, 80)
        row["rounds"] = len(timing.seconds)
        if frozen in timings:
            ratios = timing.ratio_to(timings[frozen])
            row["to_frozen"], row["to_frozen_p20"], row["to_frozen_p80"] = ratios
        if peft in timings:
            row["peft_over_this"] = timings[peft].ratio_to(timing)[0]
        rows.append({**row, **more, **where()})
    return rows


def append(name: str, rows: Iterable[Row]) -> Path:
    """Append rows to `benchmarks/results/NAME.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(name: str) -> list[Row]:
    """All rows of `benchmarks/results/NAME.jsonl`, oldest first; none if there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def line_of(row: Row) -> str:
    """A timed row on one line, as the commands print it."""
    text = f"{row['case']:56} {row['implementation']:13} {row['median_s'] * 1e3:9.2f} ms"
    if "to_frozen" in row:
        text += (
            f"  to frozen {row['to_frozen']:.3f} [{row['to_frozen_p20']:.3f},"
            f" {row['to_frozen_p80']:.3f}]"
        )
    if "peft_over_this" in row:
        text += f"  PEFT/this {row['peft_over_this']:.2f}"
    if "mean_rank_met" in row:
        text += f"  rank met {row['mean_rank_met']}"
    return text


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The arguments that all timed benchmarks share."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds, {rounds} if unset")
    made.add_argument("--seconds", type=float, help="per case: no new round after this long")
    made.add_argument("--dry", action="store_true", help="append no rows")
    return made


def add_names(made: argparse.ArgumentParser, known: Iterable[str]) -> None:
    """The argument `names`: which of the known to run, all by default."""
    listed = list(known)

    class Check(argparse.Action):
        def __call__(self, owner: Any, namespace: Any, values: Any, option: Any = None) -> None:
            for name in values:
                if name not in listed:
                    owner.error(f"{name!r} is not one of {', '.join(listed)}")
            namespace.names = list(values) or listed

    made.add_argument(
        "names", nargs="*", default=listed, action=Check, help=f"of {', '.join(listed)}; or all"
    )


def run_cases(
    name: str, cases: Iterable[Case], measure: Callable[[Case], list[Row]], dry: bool
) -> list[Row]:
    """Measure case by case; print the rows of each and append them to NAME.jsonl at once."""
    done = []
    for case in cases:
        rows = measure(case)
        for row in rows:
            print(line_of(row), flush=True)
        if not dry:
            append(name, rows)
        done += rows
    return done


def peak_resident_bytes() -> int:
    """Of this process. Not `ru_maxrss`: that begins at what the parent process had in use."""
    status = Path("/proc/self/status")
    if not status.exists():  # not on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(peak_kb) * 1024
