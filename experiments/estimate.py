"""What recipes and plans of large models would need on their GPU: estimates, not measured.

    python experiments/estimate.py            prints the lines
    python experiments/estimate.py --write    puts them into the recipes and plans

Memory is what `drlora inspect` computes for the recipe's micro-batch. What CUDA takes (half a GB)
and quantised experts that are wide at a time (0.3 GB) are not in it. Time is arithmetic:

    operations a token = 4 x active weights (forward, and backward to the inputs alone)
                       + 2 x active weights with checkpointing + 6 x active adapter weights

over the card's peak x UTILISATION, with every example as long as max_length, so short examples
take less.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from drlora.compare.cells import compare_cells, places
from drlora.compare.plan import load_plan
from drlora.config.adapter import DrLoraConfig
from drlora.forecast.step import Batch
from drlora.runs.inspect import inspect
from drlora.runs.inspection import Inspection
from drlora.runs.quantise import QuantiseSection
from drlora.runs.recipe import Recipe, load_recipe, settings_of

ROOT = Path(__file__).parents[1]
UTILISATION = 0.25  # assumed: of a grouped MoE step with short examples, not measured
DOLLARS_AN_HOUR = 2.5  # assumed


@dataclass(frozen=True)
class Gpu:
    """A card: name, memory, and dense 16-bit operations a second, as its maker says."""

    name: str
    gb: float
    peak: float


H100 = Gpu("H100", 80, 989e12)
T4 = Gpu("T4", 16, 65e12)
RTX_4090 = Gpu("RTX 4090", 25.7, 165e12)
RTX_4080 = Gpu("RTX 4080", 17.1, 97e12)
GPUS = {
    "src/drlora/recipes/olmoe-1b-7b-t4.yaml": T4,
    "src/drlora/recipes/qwen3-30b-a3b-24gb.yaml": RTX_4090,
    "src/drlora/recipes/gpt-oss-20b-16gb.yaml": RTX_4080,
}
# File -> the config that stands for its model, which is on the hub.
CONFIGS = {
    **{f"src/drlora/recipes/paper/{task}.yaml": "olmoe-1b-7b"
       for task in ("gsm8k", "humaneval", "ifeval", "medmcqa", "wmt", "ledgar")},
    "src/drlora/recipes/qwen3-30b-a3b.yaml": "qwen3-30b-a3b",
    "src/drlora/recipes/gpt-oss-20b.yaml": "gpt-oss-20b",
    "src/drlora/recipes/olmoe-1b-7b-t4.yaml": "olmoe-1b-7b",
    "src/drlora/recipes/qwen3-30b-a3b-24gb.yaml": "qwen3-30b-a3b",
    "src/drlora/recipes/gpt-oss-20b-16gb.yaml": "gpt-oss-20b",
    "experiments/paper/olmoe.yaml": "olmoe-1b-7b",
    "experiments/paper/qwen1.5-moe.yaml": "qwen1.5-moe-a2.7b",
    "experiments/paper/llama-moe-like.yaml": "llama-moe-like-3.5b",
}  # fmt: skip


def config_of(file: str) -> str:
    """Path of the config.json that stands for the model of a recipe or plan."""
    return str(ROOT / "experiments" / "paper" / "models" / f"{CONFIGS[file]}.json")


def gpu_of(file: str) -> Gpu:
    """The card that a recipe or plan is for."""
    return GPUS.get(file, H100)


def micro_batch_tokens(recipe: Recipe) -> int:
    """Tokens of one forward and backward pass, if all examples have `max_length`."""
    return recipe.training["per_device_train_batch_size"] * (recipe.data.max_length or 1024)


@cache
def _inspected(
    config: str, settings: str, dtype: str, batch: Batch, quantise: QuantiseSection, optim: str
) -> Inspection:
    adapter = DrLoraConfig(**json.loads(settings))
    return inspect(config, adapter, None, dtype, batch, quantise, optim)


def inspected(recipe: Recipe, config: str) -> Inspection:
    """What `drlora inspect` says of the recipe's adapter on the model of `config`."""
    dtype = "bfloat16" if recipe.dtype == "auto" else recipe.dtype
    return _inspected(
        config,
        json.dumps(settings_of(recipe.adapter)),
        dtype,
        Batch(
            recipe.training["per_device_train_batch_size"],
            recipe.data.max_length or 1024,
            fuses_head=True,
            engine="grouped",
        ),
        recipe.quantise,
        str(recipe.training.get("optim", "adamw_torch")),
    )


def memory_gb(recipe: Recipe, config: str) -> float:
    """All that is counted: weights, adapter with gradients and moments, activations."""
    found = inspected(recipe, config).memory_gb
    checkpoints = recipe.training.get("gradient_checkpointing")
    activations = "activations_with_checkpointing" if checkpoints else "activations"
    return found.weights + found.adapter_at_budget + getattr(found, activations)


def parts_in_words(recipe: Recipe, config: str) -> str:
    """Memory by part."""
    found = inspected(recipe, config).memory_gb
    parts = found.parts
    rest = memory_gb(recipe, config) - found.weights - found.adapter_at_budget
    return (
        f"weights {found.weights:.1f}, adapter {parts.adapter:.1f}, gradients "
        f"{parts.gradients:.1f}, optimizer {parts.optimizer:.1f}, activations {rest:.1f}"
    )


def hours(recipe: Recipe, config: str, gpu: Gpu = H100) -> float:
    """Hours of the run's steps on one GPU; measurements before and after not included."""
    found = inspected(recipe, config)
    blocks, weights = found.blocks, found.parameters
    share = sum((b.top_k or 1) / b.experts for b in blocks) / len(blocks)
    active = weights.total - weights.experts * (1 - share)
    adapter = found.adapter.r_target.parameters * share
    factor = 6 if recipe.training.get("gradient_checkpointing") else 4
    training = recipe.training
    tokens = micro_batch_tokens(recipe) * training["gradient_accumulation_steps"]
    operations = training["max_steps"] * tokens * (factor * active + 6 * adapter)
    return operations / (gpu.peak * UTILISATION) / 3600


def recipe_line(file: str) -> str:
    """The line of a recipe."""
    recipe, config, gpu = load_recipe(ROOT / file), config_of(file), gpu_of(file)
    of_all = f"{memory_gb(recipe, config):.0f} GB of {gpu.gb:g} GB"
    if gpu is not H100:
        of_all += f" ({parts_in_words(recipe, config)})"
    return (
        f"# Estimate, not measured: {of_all}, {hours(recipe, config, gpu):.1f} hours on one "
        f"{gpu.name} (experiments/estimate.py)."
    )


def plan_line(file: str) -> str:
    """The line of a plan."""
    plan, config = load_plan(ROOT / file), config_of(file)
    cells = compare_cells(plan, {place: {} for place in places(plan)})
    # All methods have drlora's budget, so its run of a task stands for theirs.
    ours = {cell.task: cell.recipe for cell in cells if cell.method == "drlora"}
    total = sum(hours(ours[cell.task], config) for cell in cells)
    most = max(memory_gb(recipe, config) for recipe in ours.values())
    return (
        f"# Estimate, not measured: {len(cells)} runs, {total:,.0f} H100 hours, "
        f"{total * DOLLARS_AN_HOUR:,.0f} dollars, {most:.0f} GB at most (experiments/estimate.py)."
    )


def lines() -> Iterator[tuple[str, str]]:
    """(file, its line)."""
    for file in CONFIGS:
        yield file, (recipe_line if file.startswith("src/") else plan_line)(file)


def main() -> None:
    """Print the lines, or write them into their files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    for file, line in lines():
        print(f"{file}: {line[2:]}")
        if arguments.write:
            text = (ROOT / file).read_text("utf-8").splitlines()
            marks = ("# Estimate, not measured:", "# @")
            (at,) = (i for i, old in enumerate(text) if old.startswith(marks))
            text[at] = line
            (ROOT / file).write_text("\n".join(text) + "\n", "utf-8")


if __name__ == "__main__":
    main()
