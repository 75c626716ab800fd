"""What runs take against what was said before: `python -m benchmarks.plan [--budget] [name ...]`.

Each case of `plan_cases` is a run of `drlora train` in a process of its own, on one thread. Memory
is the most that the process had resident, against forecast.json of that run; time is the
processor's of a step, the first left out, against what `measure_pace` finds on a few layers, in
another process.

With --budget `drlora plan` is given so much memory that half of the step's does not fit, and what
it writes is run: the peak must stay below what was given.

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
from drlora.planning.room import MARGIN

STEPS = 4
TRAIN = """
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
print("FOUND", json.dumps({"marks": marks, "peak": peak_resident_bytes()}))
"""
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
model, data, output, memory, *words = sys.argv[1:]
made = drlora.plan(model, data, output, words, memory=memory, measures=False)
print("FOUND", json.dumps({"fits": made.fits, "changed": list(made.changed)}))
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
    ran = found_by(TRAIN, recipe)
    said = json.loads((folder / "run" / "forecast.json").read_text("utf-8"))
    pace = found_by(PACE, recipe)
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
        **where(),
    }


def budget_row(case: Case, folder: Path, parts: dict[str, float]) -> Row:
    """What `drlora plan` writes for less memory than the case takes, run."""
    make(case, folder, STEPS)
    budget = (parts["total"] - 0.5 * (parts["step"] + parts["allocator"])) / (1 - MARGIN)
    output = folder / "planned.yaml"
    short = ["training.max_steps=2", "training.save_strategy=no", "training.warmup_steps=0",
             f"output_dir={folder / 'planned'}", f"data.eval={folder / 'eval.jsonl'}",
             "evaluation.before=false", "evaluation.exact_match=false", "evaluation.samples=0",
             f"evaluation.loss_examples={case.batch}", f"data.max_length={case.length}",
             "training.gradient_accumulation_steps=1", "adapter.r_init=16"]  # fmt: skip
    words = [
        str(folder / "model"),
        str(folder / "train.jsonl"),
        str(output),
        f"{budget / 1e6:.0f}MB",
    ]
    made = found_by(PLAN, *words, *short)
    ran = found_by(TRAIN, str(output)) if made["fits"] else None
    return {
        "case": f"{case.name}, planned for less",
        "budget_bytes": budget,
        **made,
        "measured_bytes": ran and ran["peak"],
        "stays_below": ran and ran["peak"] <= budget,
        **where(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="words in the names of cases; default: all")
    parser.add_argument("--budget", action="store_true", help="run what is planned for less")
    parser.add_argument("--dry", action="store_true", help="append no rows")
    options = parser.parse_args(argv)
    for case in CASES:
        if options.names and not any(name in case.name for name in options.names):
            continue
        with tempfile.TemporaryDirectory() as name:
            row = row_of(case, Path(name))
        show(row)
        rows = [row]
        if options.budget:
            with tempfile.TemporaryDirectory() as name:
                rows.append(budget_row(case, Path(name), row["parts"]))
            print(
                f"  planned for less: {rows[-1]['stays_below']}, {rows[-1]['changed']}", flush=True
            )
        if not options.dry:
            append("plan", rows)
    return 0


def show(row: Row) -> None:
    """On one line."""
    print(
        f"{row['case']:46} {row['measured_bytes'] / 1e6:6.0f} MB ({row['memory_error']:+.1%})  "
        f"{row['measured_cpu_s']:6.2f} CPU s a step ({row['time_error']:+.1%})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
