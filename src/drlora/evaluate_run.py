"""Measure a finished run on its own or on other data: `drlora eval`."""

from __future__ import annotations

from pathlib import Path

import torch

from drlora.assemble import (
    encode,
    load_adapter,
    load_architecture,
    load_base_model,
    load_source,
    load_tokenizer,
    vocabulary_size,
)
from drlora.errors import CheckpointError
from drlora.measure import Measurement, measure
from drlora.recipe import ROLES, DataSection, default_split
from drlora.rundir import RunDir


def evaluate_run(folder: str | Path, split: str = "eval", data: str | None = None) -> Measurement:
    """Loss and exact match of the run in `folder`.

    Args:
        folder: a run directory.
        split: train, eval or test, as the recipe names them, or the name of a split.
        data: other data than the recipe's: a file, a hub data set or `embedded:TASK`.

    Raises:
        CheckpointError: if the run is unfinished, damaged, or was made for another model.
        DataError: if the data is missing or malformed.
    """
    run = RunDir(Path(folder))
    recipe = run.read_config()
    if not run.adapter.is_file():
        raise CheckpointError(
            f"{run.path} has no adapter_model.safetensors: the run is not finished. Continue it "
            f"with: {run.resume_command}"
        )
    raw = load_source(recipe.data, *_asked_for(recipe.data, split, data))
    architecture = load_architecture(recipe.model, recipe.trust_remote_code)
    base = load_base_model(recipe)
    tokenizer = load_tokenizer(recipe, vocabulary_size(base))
    examples = encode(raw, tokenizer, recipe, architecture)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = load_adapter(base, str(run.path)).to(device)
    return measure(model, tokenizer, examples, recipe.evaluation)


def _asked_for(section: DataSection, split: str, data: str | None) -> tuple[str, str, int | None]:
    """(source, split, limit) of the examples to measure on."""
    if data is not None:
        return data, default_split(data, split) if split in ROLES else split, None
    if split in ROLES:
        return *section.source(split), section.limits.get(split)
    return section.source("eval")[0], split, None
