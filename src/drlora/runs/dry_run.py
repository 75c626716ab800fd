"""What a run would do, before any weight is loaded: `drlora train --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drlora.runs.arguments import training_arguments
from drlora.runs.forecast import batches
from drlora.runs.held_out import evaluation_notes
from drlora.runs.inspect import inspect
from drlora.runs.inspection import Inspection
from drlora.runs.job import prepare
from drlora.runs.recipe import Recipe
from drlora.runs.rundir import RunDir


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    Attributes:
        recipe: with all defaults.
        steps: optimizer steps of the run.
        examples: role -> how many are `used`, `dropped` and `truncated`.
        notes: what would be said of them.
        model: what `inspect` says of it, with the growth plan and the memory of this recipe's
            batches.
    """

    recipe: Recipe
    steps: int
    examples: dict[str, dict[str, int]]
    notes: tuple[str, ...]
    model: Inspection

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "steps": self.steps,
            "examples": self.examples,
            "notes": list(self.notes),
            "model": self.model.to_dict(),
        }


def dry_run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> DryRun:
    """Check everything that can be checked without the weights.

    Args:
        recipe: what would be done.
        resume: whether the run in output_dir would be continued.
        overwrite: whether it would be replaced.

    Raises:
        DrLoraError: what `train` would refuse.
    """
    run = RunDir(Path(recipe.output_dir))
    run.refuse(recipe, resume, overwrite)
    checkpoint = run.newest_checkpoint() if resume else None
    job = prepare(recipe, run, training_arguments(recipe, run), checkpoint, resume)
    dtype = None if recipe.dtype == "auto" else recipe.dtype
    batch = batches(job, job.arguments.device.type == "cpu")[0]
    found = inspect(
        recipe.model,
        recipe.adapter_config(),
        job.plan_steps,
        dtype,
        replace(batch, checkpoints=False, fuses_head=False),
        recipe.quantise,
        getattr(job.arguments.optim, "value", job.arguments.optim),
        recipe.trust_remote_code,
    )
    notes = (*job.notes(), *evaluation_notes(job.measured, recipe.evaluation))
    return DryRun(recipe, job.total_steps, job.counts(), notes, found)
