"""What rounding costs a merge in held-out loss, over seeds: stochastic, nearest and exact.

    python experiments/realistic/build.py                                   # see there
    .cache/gym/bin/python experiments/realistic/problems.py                 # see there
    python experiments/realistic/merges.py --seeds 1 2 3 4 5
    python experiments/realistic/merges.py --model embedded --seeds 1 2 3 4 5

For each seed a run is trained and merged into bfloat16 with both kinds of rounding. All losses are
of the same held-out examples, computed in float32 from what is stored: `exact` is the adapter
beside the weights, which is what a merge in float32 would be. A seed is of the data's order and of
the adapter's start; rounding has the same number. merges.json keeps what is done, seed by seed.
About ten minutes a seed on a core of its own, 7 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import drlora
from drlora.runs import export as exporting

HERE = Path(__file__).parent
WORK = Path(".cache/realistic/merges")
MODES = ("stochastic", "nearest")


def recipe(model: str, steps: int, seed: int, output: Path) -> Any:
    """The run of a seed; the base is in bfloat16."""
    common = [f"output_dir={output}", f"training.seed={seed}", f"training.max_steps={steps}"]
    small = ["evaluation.exact_match_examples=1", "evaluation.loss_examples=8"]
    if model == "embedded":
        few = ["adapter.grow_every=10", "adapter.settle_steps=40", "training.save_steps=1000"]
        return drlora.load_recipe("embedded", [*common, *few, *small, "dtype=bfloat16"])
    few = ["adapter.grow_every=1", "adapter.settle_steps=1", "training.save_steps=1000"]
    return drlora.load_recipe(HERE / "recipe.yaml", [*common, *few, small[1]])


def of_seed(model: str, steps: int, seed: int, examples: int) -> dict[str, Any]:
    """Losses of a seed, and what rounding did."""
    run = WORK / f"{model}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    drlora.train(recipe(model, steps, seed, run))
    found: dict[str, Any] = {}
    for mode in MODES:
        out = WORK / f"{model}-{seed}-{mode}"
        shutil.rmtree(out, ignore_errors=True)
        with mock.patch.object(exporting, "EXAMPLES", examples):
            made = drlora.export_adapter(run, "merged", out, rounding=mode, seed=seed)
        assert made.difference is not None and made.difference.loss is not None
        losses = made.difference.loss
        found |= {"base": losses["base"], "exact": losses["adapter"], mode: losses["export"]}
        found[f"{mode} off by"] = losses["export"] / losses["adapter"] - 1
        record = json.loads((out / "drlora_export.json").read_text("utf-8"))
        found[f"{mode} rounding"] = record["rounding"]
        found["tokens"] = made.difference.tokens
        shutil.rmtree(out)
    shutil.rmtree(run)
    return found


def main() -> None:
    """Run the seeds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="realistic", choices=("realistic", "embedded"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--out", type=Path, default=HERE / "merges.json")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    known = json.loads(asked.out.read_text("utf-8")) if asked.out.is_file() else {}
    for seed in asked.seeds:
        found = of_seed(asked.model, asked.steps, seed, asked.examples)
        how = {"steps": asked.steps, "examples": asked.examples, "torch": torch.__version__}
        known.setdefault(asked.model, {})[str(seed)] = {**how, **found}
        asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        said = {mode: f"{found[f'{mode} off by']:+.3%}" for mode in MODES}
        print(asked.model, seed, f"exact {found['exact']:.4f}", said, flush=True)


if __name__ == "__main__":
    main()
