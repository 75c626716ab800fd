"""The tables of docs/worked-runs.md, made of what the runs themselves wrote.

python tools/make_worked_runs.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from made_pages import write_or_check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "worked-runs.md"
BEGIN, END = "<!-- make_worked_runs.py: begin -->", "<!-- make_worked_runs.py: end -->"
HOUR = "benchmarks/results/first_hour.jsonl"
HOUR_BEGIN = "<!-- make_worked_runs.py: first hour -->"
# The commands that end with an adapter, and what each is called.
ENDS = {"drlora train embedded": "a first adapter", "drlora train mine": "one of own data"}
HEAD = [
    "| run | machine | steps | time of training | peak memory | held-out loss | from |",
    "|---|---|---|---|---|---|---|",
]
Row = dict[str, Any]


def row(name: str, machine: str, steps: int, seconds: float, peak_bytes: float, loss: str,
        source: str) -> str:  # fmt: skip
    """One line of the table."""
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    cells = [name, machine, f"{steps:,}", time, f"{peak_bytes / 1e9:.2f} GB", loss, f"`{source}`"]
    return f"| {' | '.join(cells)} |"


def read(path: str) -> Any:
    """A JSON file of the repository."""
    return json.loads((ROOT / path).read_text("utf-8"))


def embedded() -> str:
    """`make train`."""
    source = "docs/runs/embedded/result.json"
    run = read(source)
    before, after = run["before"]["loss"]["loss"], run["after"]["loss"]["loss"]
    return row("`embedded`: OLMoE of 6.1M parameters, a few thousand definitions",
               f"CPU, {run['threads']} threads", run["steps"], run["seconds"],
               run["peak_memory_bytes"], f"{before:.3f} to {after:.3f}", source)  # fmt: skip


def realistic() -> str:
    """Experts copied out of a real small model."""
    source = "experiments/realistic/results.json"
    found = read(source)
    run = found["training"]
    losses = [run[when]["loss"] for when in ("before", "after")]
    return row("Mixtral of 8 experts, 692M parameters, bfloat16, word problems",
               f"CPU, {found['threads']} thread, a busy machine", run["steps"], run["seconds"],
               run["peak_memory_bytes"], "{:.3f} to {:.3f}".format(*losses), source)  # fmt: skip


def full_size() -> list[str]:
    """OLMoE-1B-7B at its real shape: three steps, so no loss that would mean something."""
    source = "benchmarks/results/full_size.jsonl"
    rows = [json.loads(line) for line in (ROOT / source).read_text("utf-8").splitlines()]
    newest: dict[tuple[str, str], Row] = {}
    for found in rows:
        if " L16 " in found["case"] and "peak_gb" in found:
            newest[found["case"], found["implementation"]] = found
    names = {"ours": "experts in bfloat16", "nf4-nested": "experts in nested NF4"}
    return [
        row(f"OLMoE-1B-7B, random weights, 128 tokens a step, ranks 8/16/32, "
            f"{names.get(kind, kind)}", threads(found),
            len(found["seconds"]), sum(found["seconds"]), found["peak_gb"] * 1e9, "not measured",
            source)
        for (_, kind), found in newest.items()
    ]  # fmt: skip


def threads(found: Row) -> str:
    """On how many threads of a CPU it was measured."""
    said = found["device"].rpartition(", ")[2]
    return f"CPU, {'1 thread' if said == '1 threads' else said}"


def first_hour() -> list[str]:
    """The last whole try of the built wheel in a clean environment."""
    lines = (ROOT / HOUR).read_text("utf-8").splitlines() if (ROOT / HOUR).is_file() else []
    tries = [one for one in map(json.loads, lines) if one["whole"]]
    if not tries:
        return [f"Not recorded yet: there is no `{HOUR}`."]
    found = tries[-1]
    table = ["| command | seconds | of processors |", "|---|---|---|"]
    said, clock, cpu, start = [], 0.0, 0.0, (0.0, 0.0)
    for one in found["taken"]:
        table.append(f"| `{one['name']}` | {one['seconds']:.0f} | {one['cpu_seconds']:.0f} |")
        clock, cpu = clock + one["seconds"], cpu + one["cpu_seconds"]
        for command, what in ENDS.items():
            if one["name"].startswith(command):
                said.append(f"{what} after {(clock - start[0]) / 60:.1f} minutes "
                            f"({(cpu - start[1]) / 60:.1f} of processors)")  # fmt: skip
                start = (clock, cpu)
    busy = ", beside other work" if found["beside_other_work"] else ""
    return [
        *table,
        "",
        f"drlora {found['drlora']}, Python {found['python']}, {found['cores']} cores{busy}, on "
        f"{found['date']}: {said[0]}, installing included, and {said[1]} from there.",
    ]


def remake(text: str) -> str:
    """The page with its tables as they are now."""
    runs = [*HEAD, embedded(), realistic(), *full_size()]
    for begin, lines in ((BEGIN, runs), (HOUR_BEGIN, first_hour())):
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(END)
        text = "\n".join([f"{before}{begin}", *lines, f"{END}{after}"])
    return text


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, remake, __doc__))
