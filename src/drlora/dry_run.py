"""What a run would do, before any weight is loaded: `drlora train --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from drlora.assemble import training_arguments
from drlora.inspection import inspect_model
from drlora.inspection_text import print_inspection
from drlora.recipe import Recipe
from drlora.rundir import RunDir
from drlora.train import prepare


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Check everything that can be checked without the weights.

    Returns:
        `recipe` (with all defaults), `steps`, `examples` (role -> how many are used, dropped and
        truncated), and `model`: what `inspect_model` says of it, with the growth plan.

    Raises:
        DrLoraError: what `train` would refuse.
    """
    run = RunDir(Path(recipe.output_dir))
    run.refuse_second_run()
    job = prepare(recipe, run, training_arguments(recipe, run), checkpoint=None)
    examples = {
        role: {"used": len(e.dataset), "dropped": e.dropped, "truncated": e.truncated}
        for role, e in (("train", job.train.encoded), ("eval", job.held_out.encoded))
    }
    dtype = None if recipe.dtype == "auto" else recipe.dtype
    found = inspect_model(recipe.model, recipe.adapter_config(), job.total_steps, dtype)
    return {
        "recipe": recipe.to_dict(),
        "steps": job.total_steps,
        "examples": examples,
        "model": found,
    }


def print_dry_run(found: dict[str, Any], console: Console) -> None:
    """The same, for people."""
    print_inspection(found["model"], console)
    for role, counts in found["examples"].items():
        left_out = f", {counts['dropped']} left out" if counts["dropped"] else ""
        cut = f", {counts['truncated']} cut" if counts["truncated"] else ""
        console.print(f"{role:8} {counts['used']:,} examples{left_out}{cut}")
    console.print(f"steps    {found['steps']:,}")
    console.print(f"dry run: nothing was written to {found['recipe']['output_dir']}")
