"""How concentrated is routing on each task, and do unequal ranks gain more where it is?

    python experiments/concentration.py [--only-relations]

Before the first step, the routing of some batches of a task's training data is counted, by the
weights of the top k, and each expert's gradient is probed. Concentration is one minus the effective
share of the experts, 1 - exp(entropy) / E, averaged over layers: 0 where all experts are used
alike. `of_gradient` is the same of the squared gradients of the experts' weights, in the directions
that the probe finds. It is done for every model and task that has been compared at 200 steps with
rates tuned for each method; the gains over LoRA stand in those results.

Writes results/concentration.json: one entry a model and task, and for each method Spearman's rank
correlation of concentration and gain, with a 95 % bootstrap interval over these pairs. Models and
tasks come again in them, so they are no independent draws, and the interval is rather too narrow.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import drlora
from drlora.compare.gains import relative
from drlora.compare.plan import Plan, load_plan, merged
from drlora.compare.results import Folder, read_matrix
from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import STARTS
from drlora.ranks.starts import Evidence, Start
from drlora.runs.recipe import recipe_from
from drlora.runs.train import train

HERE = Path(__file__).parent
FILE = HERE / "results" / "concentration.json"
PLANS = ("development", "other-models", "confirmation", "fine-experts")
METHODS = ("hot", "static", "drlora", "lora-gradient")
SIGNALS = ("of_routing", "of_gradient")
BATCHES = 16
RESAMPLES = 10_000
SETTINGS: dict[str, Any] = {
    "adapter": {"start": "watched", "r_init": 4, "options": {"start_batches": BATCHES}},
    "training": {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "seed": 0},
    "evaluation": {"exact_match": False, "before": False, "loss_examples": 1, "samples": 0,
                   "forgetting": None},
}  # fmt: skip


def concentration(shares_E: Sequence[float]) -> float:  # noqa: N803
    """One minus the effective share of the experts: 0 if all are alike, 1 - 1/E if one has all."""
    total = sum(shares_E)
    entropy = -sum(s / total * math.log(s / total) for s in shares_E if s > 0)
    return 1 - math.exp(entropy) / len(shares_E)


_SEEN: list[Evidence] = []


def _watch(found: Evidence, config: DrLoraConfig) -> list[int]:
    """A start that places ranks evenly and keeps what it was told of the block."""
    _SEEN.append(found)
    return [config.r_init] * len(found.share_E)


def watched(plan: Plan, model: str, task: str) -> dict[str, float]:
    """Concentration of routing and of the gradient, each the mean over layers."""
    _SEEN.clear()
    with tempfile.TemporaryDirectory() as folder:
        tree = merged({"output_dir": f"{folder}/run"}, plan.base, plan.models[model],
                      plan.tasks[task], SETTINGS)  # fmt: skip
        train(recipe_from(tree))
    energies = [
        sum(of.strength_ED.double().square().sum(1) for of in found.directions.values())
        for found in _SEEN
    ]
    return {
        "of_routing": fmean(concentration(found.share_E) for found in _SEEN),
        "of_gradient": fmean(concentration(energy_E.tolist()) for energy_E in energies),
    }


def gains(plan: Plan, model: str, task: str) -> dict[str, float]:
    """Method -> its mean gain over LoRA in held-out loss, in per cent."""
    matrix = read_matrix(plan, Folder.of(plan))
    found = {}
    for method in plan.methods:
        by_task = relative(matrix, "loss", model, {task: "lora"}, method)
        if method in METHODS and by_task is not None:
            found[method] = fmean(by_task[task].values())
    return found


def entries() -> Iterator[dict[str, Any]]:
    """One for each model and task of the plans."""
    STARTS.add("watched", Start(_watch, needs_routing=True, needs_gradient=True))
    for name in PLANS:
        plan = load_plan(HERE / f"{name}.yaml")
        for model in plan.models:
            for task in plan.tasks:
                row = {"plan": name, "model": model, "task": task, **watched(plan, model, task)}
                print(row, flush=True)
                yield {**row, "gain_over_lora_in_per_cent": gains(plan, model, task)}


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation; ties have their mean rank."""
    ranks = [
        np.array([(np.sum(of < x) + np.sum(of <= x) - 1) / 2 for x in of]) for of in (left, right)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


def relation(rows: Sequence[dict[str, Any]], signal: str, method: str) -> dict[str, Any]:
    """The rank correlation of a signal and a method's gain, with a bootstrap interval."""
    pairs = np.array(
        [
            (row[signal], row["gain_over_lora_in_per_cent"][method])
            for row in rows
            if method in row["gain_over_lora_in_per_cent"]
        ]
    )
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        sample = pairs[random.integers(len(pairs), size=len(pairs))]
        if len(np.unique(sample[:, 0])) > 1 and len(np.unique(sample[:, 1])) > 1:
            drawn.append(spearman(sample[:, 0], sample[:, 1]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    half = np.median(pairs[:, 0])
    return {
        "pairs": len(pairs),
        "spearman": round(spearman(pairs[:, 0], pairs[:, 1]), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "mean_gain_below_the_median": round(float(pairs[pairs[:, 0] < half, 1].mean()), 2),
        "mean_gain_from_the_median_on": round(float(pairs[pairs[:, 0] >= half, 1].mean()), 2),
    }


def main() -> None:
    """Measure, relate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-relations", action="store_true", help="of what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(FILE.read_text("utf-8"))["pairs"] if options.only_relations else [*entries()]
    found = {
        "command": "python experiments/concentration.py",
        "versions": {"drlora": drlora.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "batches": BATCHES,
        "pairs": rows,
        "relations": {
            signal: {method: relation(rows, signal, method) for method in METHODS}
            for signal in SIGNALS
        },
    }  # fmt: skip
    FILE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found["relations"], indent=1))


if __name__ == "__main__":
    main()
