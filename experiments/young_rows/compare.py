"""Which second moment should a row that wakes up late have in Adam?

    python experiments/young_rows/compare.py

Runs the embedded model on the embedded tasks with `young_rows` at each of its settings and several
seeds, two processes at a time, and writes results.json beside this file: the held-out loss of every
run, mean and standard deviation. Runs that are there already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "src/drlora/recipes/embedded.yaml"
MODES = ("inherit", "own", "shared")
TASKS = ("kinds", "pronunciation")
SEEDS = (1, 2, 3)
RATES = (3e-3,)
SETTINGS = [
    "training.max_steps=200",
    "training.warmup_steps=10",
    "training.per_device_train_batch_size=32",
    "training.save_strategy=no",
    "training.logging_steps=50",
    "adapter.r_init=2",
    "adapter.r_target=4",
    "adapter.r_max=16",
    "adapter.p_grow=0.2",
    "adapter.grow_every=10",
    "adapter.settle_steps=40",
    "evaluation.exact_match=false",
    "dtype=float32",
]


def run(task: str, mode: str, rate: float, seed: int, folder: str) -> dict:
    """One run; its held-out loss before and after."""
    import torch

    from drlora.runs.recipe import load_recipe
    from drlora.runs.train import train

    torch.set_num_threads(1)
    overrides = [
        *SETTINGS,
        f"data.train=embedded:{task}",
        f"adapter.young_rows={mode}",
        f"training.learning_rate={rate}",
        f"training.seed={seed}",
        f"output_dir={folder}/{task}-{mode}-{rate}-{seed}",
    ]
    result = train(load_recipe(RECIPE, overrides))
    assert result.after is not None
    return {
        "task": task, "mode": mode, "rate": rate, "seed": seed,
        "before": result.before.loss.loss, "after": result.after.loss.loss,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/young-rows", help="where the runs go")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args(argv)
    path = HERE / "results.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(r["task"], r["mode"], r["rate"], r["seed"]) for r in runs}
    wanted = [c for c in itertools.product(TASKS, MODES, RATES, SEEDS) if c not in done]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(run, *cell, arguments.folder) for cell in wanted]
        for future in waiting:
            runs.append(future.result())
            _write(path, runs)
            print(runs[-1], flush=True)
    for row in _table(runs):
        print(row)
    return 0


def _table(runs: list[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of each task, rate and mode."""
    rows = []
    for task, rate, mode in itertools.product(TASKS, RATES, MODES):
        losses = [
            r["after"] for r in runs if (r["task"], r["rate"], r["mode"]) == (task, rate, mode)
        ]
        if len(losses) > 1:
            mean, spread = statistics.mean(losses), statistics.stdev(losses)
            rows.append(
                {"task": task, "rate": rate, "mode": mode, "seeds": len(losses),
                 "loss": round(mean, 4), "sd": round(spread, 4)}
            )  # fmt: skip
    return rows


def _write(path: Path, runs: list[dict]) -> None:
    from drlora.io.writing import write_at_once
    from drlora.runs.environment import versions

    content = {"settings": SETTINGS, "versions": versions(), "table": _table(runs), "runs": runs}
    write_at_once(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
