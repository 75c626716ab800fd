"""What runs take against what was said before: `python -m benchmarks.plan [--budget] [name ...]`.

Each case of `plan_cases` is a run of `drlora train` in a process of its own, on one thread. Memory
is the most that the process had resident, against forecast.json, which the run writes before its
weights are loaded; time is the processor's of a step, the first left out, against what
`measure_pace` found on a few layers, in another process, before the run.
Pages stay resident once they are (`pages_locked` in a row says whether the system allowed it).

With --budget `drlora plan` writes three recipes for each case: for all the memory there can be, for
none, and for half of what lies between these two. The last is run: the peak must stay below what
was given. That budget can be met by construction, and unchanged the recipe is forecast to take more
than it. The recipe for no memory must be refused.

Rows are appended to benchmarks/results/plan.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, append, where
from benchmarks.plan_cases import CASES, Case, make

STEPS = 4
# What was resident once stays so, as where memory is not short: beside other work the system takes
# pages of libraries and of the file of weights back, and a peak would be that of what it left.
LOCK = """
import ctypes, os
CURRENT, FUTURE, ON_FAULT = 1, 2, 4
locked = ctypes.CDLL(None, use_errno=True).mlockall(CURRENT | FUTURE | ON_FAULT) == 0
"""
TRAIN = (
    LOCK
    + """
import json, sys, time
import torch
torch.set_num_threads(1)
from transformers.trainer_callback import CallbackHandler
marks, ended = [], CallbackHandler.on_step_end
def note(self, *args, **kwargs):
    marks.append(time.process_time())
    return ended(self, *args, **kwargs)
CallbackHandler.on_step_end = note
from benchmarks.harness import peak_resident_bytes
from drlora.runs.recipe import load_recipe
from drlora.runs.train import train
train(load_recipe(sys.argv[1], sys.argv[2:]))
print("FOUND", json.dumps({"marks": marks, "peak": peak_resident_bytes(), "locked": locked}))
"""
)
PACE = """
import json, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from drlora.forecast.pace import measure_pace
from drlora.runs.arguments import training_arguments
from drlora.runs.forecast import batches
from drlora.runs.job import prepare
from drlora.runs.loading import load_architecture
from drlora.runs.recipe import load_recipe
from drlora.runs.rundir import RunDir
recipe = load_recipe(sys.argv[1])
run = RunDir(Path(recipe.output_dir) / "not-made")
job = prepare(recipe, run, training_arguments(recipe, run), None)
usual = batches(job, on_cpu=True)[1]
architecture = load_architecture(recipe.model)
storage = recipe.quantise.experts
found = measure_pace(architecture, recipe.adapter_config(), usual, architecture.dtype, storage)
passes = recipe.training.get("gradient_accumulation_steps", 1)
print("FOUND", json.dumps({"seconds": passes * found.seconds, "layers": found.layers}))
"""
PLAN = """
import json, sys
import torch
torch.set_num_threads(1)
import drlora
from drlora.planning.plan import shortfall
from drlora.planning.room import MARGIN
model, data, folder, *words = sys.argv[1:]
def planned(name, memory):
    where = [f"output_dir={folder}/{name}"]
    path = f"{folder}/{name}.yaml"
    return drlora.plan(model, data, path, words + where, memory=memory, measures=False)
full, least = planned("full", "10000GB"), planned("least", "1MB")
whole, part = (made.memory.total for made in (full, least))
budget = round((part + 0.5 * (whole - part)) / (1 - MARGIN) / 1e6)
made = planned("planned", f"{budget}MB")
print("FOUND", json.dumps({
    "unchanged_bytes": whole, "least_bytes": part, "budget_bytes": budget * 1e6,
    "fits": made.fits, "forecast_bytes": made.memory.total, "changed": list(made.changed),
    "none_is_refused": not least.fits, "refused_in_words": shortfall(least),
    "least_changed": list(least.changed)}))
"""


def found_by(script: str, *words: str) -> dict[str, Any]:
    """What a script prints, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.rpartition("FOUND")[2])


def row_of(case: Case, folder: Path) -> Row:
    """The run as the case has it."""
    recipe = str(make(case, folder, STEPS))
    pace = found_by(PACE, recipe)
    ran = found_by(TRAIN, recipe)
    said = json.loads((folder / "run" / "forecast.json").read_text("utf-8"))
    memory, marks = said["memory_bytes"], ran["marks"]
    seconds = (marks[-1] - marks[0]) / (len(marks) - 1)
    return {
        "case": case.name,
        "measured_bytes": ran["peak"],
        "memory_error": memory["total"] / ran["peak"] - 1,
        "parts": memory,
        "measured_cpu_s": seconds,
        "forecast_s": pace["seconds"],
        "time_error": pace["seconds"] / seconds - 1,
        "layers_tried": pace["layers"],
        "forecast_counted": "before the run",
        "pages_locked": ran["locked"],
        **where(),
    }


def budget_row(case: Case, folder: Path) -> Row:
    """What `drlora plan` writes for less memory than its own first proposal takes, run."""
    make(case, folder, STEPS)
    short = {
        "training.save_strategy": "no",
        "training.warmup_steps": 0,
        "data.eval": folder / "eval.jsonl",
        "evaluation.before": "false",
        "evaluation.exact_match": "false",
        "evaluation.samples": 0,
        "evaluation.loss_examples": case.batch,
        # The two steps that are run leave no room to grow in.
        "method": "lora",
        **{f"quantise.{key}": value for key, value in case.quantise.items()},
        **{f"adapter.{key}": json.dumps(value) for key, value in case.adapter.items()},
    }
    words = [f"{key}={value}" for key, value in short.items()]
    made = found_by(PLAN, str(folder / "model"), str(folder / "train.jsonl"), str(folder), *words)
    short_run = (str(folder / "planned.yaml"), "training.max_steps=2")
    ran = found_by(TRAIN, *short_run) if made["fits"] else None
    return {
        "case": f"{case.name}, planned for a budget",
        **made,
        "measured_bytes": ran and ran["peak"],
        "pages_locked": ran and ran["locked"],
        "stays_below": ran and ran["peak"] <= made["budget_bytes"],
        **where(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="words in the names of cases; default: all")
    parser.add_argument("--budget", action="store_true", help="run what is planned for less")
    parser.add_argument("--only-budget", action="store_true", help="and nothing else")
    parser.add_argument("--beside", action="store_true", help="say that the machine was busy")
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args(argv)
    kinds: list[tuple[Any, Any]] = [] if options.only_budget else [(row_of, show)]
    if options.budget or options.only_budget:
        kinds.append((budget_row, show_budget))
    for case in CASES:
        if options.names and not any(name in case.name for name in options.names):
            continue
        for measure, tell in kinds:
            with tempfile.TemporaryDirectory() as name:
                row = measure(case, Path(name)) | {"beside_other_work": options.beside}
            tell(row)
            if not options.dry:
                append("plan", [row])
    return 0


def show(row: Row) -> None:
    """On one line."""
    print(
        f"{row['case']:46} {row['measured_bytes'] / 1e6:6.0f} MB ({row['memory_error']:+.1%})  "
        f"{row['measured_cpu_s']:6.2f} CPU s a step ({row['time_error']:+.1%})",
        flush=True,
    )


def show_budget(row: Row) -> None:
    """On two lines."""
    took = "not run" if row["measured_bytes"] is None else f"{row['measured_bytes'] / 1e6:.0f} MB"
    print(
        f"  of {row['budget_bytes'] / 1e6:.0f} MB: {took}, below it: {row['stays_below']}; "
        f"unchanged {row['unchanged_bytes'] / 1e6:.0f}, least {row['least_bytes'] / 1e6:.0f} MB\n"
        f"  {row['changed']}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
