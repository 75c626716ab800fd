"""The tables of docs/planning.md, made of what was measured.

python tools/make_planning.py [--check]

cases    benchmarks/results/plan.jsonl, the last row of each case whose forecast came before the run
budgets  the same file, the rows "planned for a budget"
rates    experiments/results/learning-rate, the plan experiments/learning-rate.yaml
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from made_pages import write_or_check

from drlora.compare.packed import read_packed
from drlora.compare.plan import load_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "planning.md"
ROWS = ROOT / "benchmarks" / "results" / "plan.jsonl"
BUDGET = ", planned for a budget"
NEAR = 2.0  # per cent above the best rate's loss that a proposed rate may be
BLOCK = re.compile(
    r"(?P<head><!-- make_planning\.py: (?P<name>[a-z]+)(?: (?P<plan>[\w-]+))? -->\n)"
    r".*?(?P<end><!-- end -->\n)",
    re.DOTALL,
)
Row = dict[str, Any]


def measured() -> list[Row]:
    """The last row of each case and budget.

    Rows whose forecast was counted after the run do not count, nor do rows of a process whose pages
    the system could take back: their peak is too low where memory is short.
    """
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    kept = [row for row in rows if row.get("pages_locked") or row["case"].endswith(BUDGET)]
    return list({row["case"]: row for row in kept}.values())


def cases(_: str) -> list[str]:
    """Memory and time beside what was forecast."""
    rows = [row for row in measured() if "memory_error" in row]
    table = [
        "| run on a CPU, one thread | memory, measured | forecast off by | CPU time a step | "
        "forecast off by |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        table.append(
            f"| {row['case']} | {row['measured_bytes'] / 1e6:,.0f} MB | {row['memory_error']:+.1%} "
            f"| {row['measured_cpu_s']:.2f} s | {row['time_error']:+.0%} |"
        )
    worst = {key: max(abs(row[key]) for row in rows) for key in ("memory_error", "time_error")}
    busy = sum(bool(row["beside_other_work"]) for row in rows)
    return [
        *table,
        "",
        f"The largest error of memory is {worst['memory_error']:.1%}, of time "
        f"{worst['time_error']:.0%}, over {len(rows)} runs, {busy} of them beside other work on "
        f"the same two cores.",
    ]


def budgets(_: str) -> list[str]:
    """What was planned for less memory than it takes."""
    rows = [row for row in measured() if row["case"].endswith(BUDGET)]
    table = [
        "| run | unchanged, forecast | budget | planned, forecast | measured | changes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [f"{row[key] / 1e6:,.0f} MB" if row[key] else "not run"
                 for key in ("unchanged_bytes", "budget_bytes", "forecast_bytes",
                             "measured_bytes")]  # fmt: skip
        changes = "; ".join(text.partition(":")[0] for text in row["changed"])
        table.append(f"| {row['case'].removesuffix(BUDGET)} | {' | '.join(sizes)} | {changes} |")
    below = sum(bool(row["stays_below"]) for row in rows)
    locked = sum(bool(row.get("pages_locked")) for row in rows)
    refused = sum(bool(row["none_is_refused"]) for row in rows)
    return [
        *table,
        "",
        f"{below} of {len(rows)} stayed below their budget. Given 1 MB, {refused} of {len(rows)} "
        f"plans were refused with the memory that they need. Of the peaks {locked} are with locked "
        f"pages; the others leave out what the system took back meanwhile.",
    ]


def rates(name: str) -> list[str]:
    """The proposed learning rate in a sweep."""
    plan = load_plan(ROOT / "experiments" / f"{name}.yaml")
    (rule,) = plan.baselines
    # As they were packed, not by the keys of cells: the data of one task are made by a script.
    rows = [r for r in read_packed(ROOT / plan.output_dir).values() if r["stage"] == "compare"]
    heads = [method.replace("-", " ") for method in plan.methods]
    table = [f"| task | seeds | {' | '.join(heads)} | {rule.replace('-', ' ')} over the best |",
             "|---|" + "---|" * (len(heads) + 2)]  # fmt: skip
    near = 0
    for task in plan.tasks:
        losses: dict[str, dict[int, float]] = {method: {} for method in plan.methods}
        for row in rows:
            if row["task"] == task:
                losses[row["method"]][row["seed"]] = row["after"]["loss"]["loss"]
        known = {m: by_seed for m, by_seed in losses.items() if by_seed}
        # Rates are compared on the seeds that all of them were run with.
        seeds = sorted(set.intersection(*map(set, known.values())))
        found = {m: [by_seed[seed] for seed in seeds] for m, by_seed in known.items()}
        means = {m: fmean(values) for m, values in found.items()}
        best = min(means, key=means.__getitem__)
        over = 100 * (means[rule] / means[best] - 1)
        near += over <= NEAR
        cells = [_loss(found.get(m, []), m == best) for m in plan.methods]
        table.append(f"| {task} | {len(seeds)} | {' | '.join(cells)} | {over:+.1f} % |")
    done, total = len(rows), len(plan.tasks) * len(plan.methods) * len(plan.seeds)
    return [
        *table,
        "",
        f"Held-out loss on dev, mean ± standard deviation over seeds, the best in bold; {done} of "
        f"{total} runs. Within {NEAR:g} % of the best on {near} of {len(plan.tasks)} tasks.",
    ]


def _loss(values: list[float], is_best: bool) -> str:
    """Mean and spread; of one seed the value alone."""
    if not values:
        return "failed"
    mean = f"{'**' if is_best else ''}{fmean(values):.3f}{'**' if is_best else ''}"
    return f"{mean} ± {stdev(values):.3f}" if len(values) > 1 else mean


TABLES: dict[str, Callable[[str], list[str]]] = {
    "cases": cases,
    "budgets": budgets,
    "rates": rates,
}


def remake(text: str) -> str:
    """The page with its tables as they are now."""
    return BLOCK.sub(
        lambda found: (
            found["head"]
            + "\n".join(TABLES[found["name"]](found["plan"] or ""))
            + f"\n{found['end']}"
        ),
        text,
    )


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, remake, __doc__))
