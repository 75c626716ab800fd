"""Seconds of training until the held-out loss that a script of TRL and PEFT ends with.

    PYTHONPATH=src python -m benchmarks.to_the_loss [embedded] [slice] [--seeds 0 1 2]
        [--rate 4e-3] [--threads 2]

Models, files and programs are those of `benchmarks.end_to_end`, in more steps and with a rate that
decays. `drlora train` runs as it does without a word (ranks that grow by the published rule) and
with the method that is recommended for short runs, TRL and PEFT with LoRA of one rank on the same
experts; all train as many numbers. Each has the rate of its own, of `GRID` and beyond while the
best lies at its end, whose run of one seed more ends with the lowest held-out loss; or all have the
one that is given.

Only steps count, not evaluations and not what comes before the first step; what a start from data
takes is in `startup_s`. A time is that of the first measurement whose loss is no higher: the loss
is measured twenty times on the embedded model, six times on the slice. Rows go to
benchmarks/results/to_the_loss.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.end_to_end import MINE, OLMOE_SLICE, RANK, THEIRS, Case, figures, measure, prepare
from benchmarks.harness import Row, add_names, append, where

RECOMMENDED = "lora-all-gradient"
# What each implementation is called -> its program, and the method in its recipe.
ARMS: dict[str, tuple[str, str | None]] = {
    THEIRS: (THEIRS, None),
    MINE: (MINE, None),
    f"{MINE}, {RECOMMENDED}": (MINE, RECOMMENDED),
}
GRID = (2e-3, 4e-3)
TUNING_SEED, EXTENSIONS = 100, 4
CASES = {
    "embedded": Case(None, "float32", 32, 120, GRID[0], 20, 300, decay=True),
    "slice": Case(OLMOE_SLICE, "bfloat16", 32, 12, GRID[0], 6, decay=True),
}


def set_run(folder: Path, method: str | None, rate: float, seed: int) -> None:
    """Method, rate and seed of the next run, into the recipe of the folder."""
    path = folder / "recipe.yaml"
    recipe: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    recipe["training"].update(learning_rate=rate, seed=seed)
    recipe.pop("method", None)
    if method is not None:
        recipe["method"] = method
    path.write_text(yaml.safe_dump(recipe), "utf-8")


def run_arm(name: str, folder: Path, rate: float, seed: int, threads: int, tokens: float) -> Row:
    """One run of one implementation, in a process of its own."""
    program, method = ARMS[name]
    set_run(folder, method, rate, seed)
    row = figures(measure(program, folder, threads), tokens)
    print(f"  {name:32} rate {rate:g} seed {seed}: {last(row):.4f} after "
          f"{row['steps_s'][-1]:.1f} s, start {row['startup_s']:.1f} s", flush=True)  # fmt: skip
    return row


def last(row: Row) -> float:
    """The held-out loss of a run at its end."""
    return float(list(row["held_out"].values())[-1])


def tuned_rate(name: str, folder: Path, threads: int, tokens: float) -> tuple[float, Row]:
    """The rate with the lowest loss at the end, and all losses by rate."""
    losses: Row = {}

    def loss(rate: float) -> float:
        if rate not in losses:
            losses[rate] = last(run_arm(name, folder, rate, TUNING_SEED, threads, tokens))
        return float(losses[rate])

    for rate in GRID:
        loss(rate)
    for _ in range(EXTENSIONS):
        best = min(losses, key=loss)
        if min(losses) < best < max(losses):
            break
        loss(best / 2 if best == min(losses) else best * 2)
    return min(losses, key=loss), losses


def until(row: Row, loss: float) -> float | None:
    """Seconds of training until the held-out loss was no more than `loss`; None if it never was."""
    for step, found in row["held_out"].items():
        if found <= loss:
            return float(row["steps_s"][step - 1])
    return None


def compare(name: str, seeds: list[int], threads: int, rate: float | None = None) -> list[Row]:
    """Rows of one case, one an implementation; `rate`: of all, which is not tuned then."""
    case, taken, rates = CASES[name], {arm: [] for arm in ARMS}, {}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tokens = prepare(case, folder) * case.batch
        for arm in ARMS:
            rates[arm] = (rate, {}) if rate else tuned_rate(arm, folder, threads, tokens)
        for seed in seeds:
            for arm, rows in taken.items():
                rows.append(run_arm(arm, folder, rates[arm][0], seed, threads, tokens))
    told = f"to the loss {name}, {case.dtype}, {case.steps} steps of {tokens:.0f} tokens, r{RANK}"
    found = []
    for arm, rows in taken.items():
        own, tried = rates[arm]
        row: Row = {"case": told, "implementation": arm, "seeds": seeds, "rate": own,
                    "tuning": {str(key): value for key, value in tried.items()}}  # fmt: skip
        goals = [last(one) for one in taken[THEIRS]]
        row["held_out"] = [last(one) for one in rows]
        row["goal_s"] = [until(one, goal) for one, goal in zip(rows, goals, strict=True)]
        row["whole_s"] = [one["steps_s"][-1] for one in rows]
        row["startup_s"] = statistics.median(one["startup_s"] for one in rows)
        row["peak_bytes"] = statistics.median(one["peak_bytes"] for one in rows)
        row["tokens_per_s"] = statistics.median(one["tokens_per_s"] for one in rows)
        row["curves"] = [one["held_out"] for one in rows]
        found.append({**row, **where()})
    theirs = found[0]["goal_s"]
    for row in found:
        reached = [a / b for a, b in zip(theirs, row["goal_s"], strict=True) if a and b]
        row["theirs_over_this"] = reached
        said = ", ".join(f"{ratio:.2f}" for ratio in reached) or "never reached"
        print(f"{told}: {row['implementation']:32} rate {row['rate']:g}, loss "
              f"{statistics.mean(row['held_out']):.4f}, TRL + PEFT's time over this {said} "
              f"({len(reached)} of {len(seeds)} seeds)", flush=True)  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_names(parser, CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, help="of all, in place of one tuned for each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)  # as the rows say
    for name in options.names:
        rows = compare(name, options.seeds, options.threads, options.rate)
        if not options.dry:
            append("to_the_loss", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
