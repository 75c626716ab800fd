"""What a user may hand to `drlora export` and `drlora eval`: where its model and its data are.

    a run directory            `drlora train`
    a folder with an adapter   `save_pretrained`, a checkpoint, an export as peft or per-expert
    a folder with a model      an export as merged

An export says which run it came from; where that is still there, its data and settings are used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drlora.errors import CheckpointError
from drlora.export import RECORD
from drlora.recipe import DataSection, EvaluationSection, Recipe
from drlora.rundir import RunDir

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """An adapter or a model; reads as drlora.assemble's `NamesModel`.

    Attributes:
        folder: what the user named.
        adapter: PEFT's name of the adapter's type, `DRLORA` or `LORA`; None for a whole model.
        model: the base model, or the model.
        data: of the run's recipe, or None.
        evaluation: of the run's recipe, or the default.
    """

    folder: Path
    adapter: str | None
    model: str
    tokenizer: str | None
    dtype: str
    trust_remote_code: bool
    data: DataSection | None = None
    evaluation: EvaluationSection = EvaluationSection()


def find_source(folder: Path, model: str | None = None, trust_remote_code: bool = False) -> Source:
    """What is in `folder`.

    Args:
        folder: a run directory, or a folder with an adapter or a model.
        model: the base model, where the adapter does not say or it has moved.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: if there is nothing, the run is unfinished, or the model is not known.
    """
    run = RunDir(folder)
    if run.config.is_file():
        recipe = run.read_config()
        if not run.adapter.is_file():
            raise CheckpointError(
                f"{folder} has no {WEIGHTS}: the run is not finished. Continue it with: "
                f"{run.resume_command}"
            )
        return _of_run(folder, "DRLORA", recipe, model, trust_remote_code)
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return _of_model(folder, trust_remote_code)
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is neither a run directory nor a saved adapter: it has no {name}."
            )
    said = read_json(folder / "adapter_config.json")
    kind = str(said.get("peft_type"))
    run_recipe = _recipe_of_export(folder)
    if run_recipe is not None:
        return _of_run(folder, kind, run_recipe, model, trust_remote_code)
    base = model or said.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"the adapter in {folder} does not say what its base model is; name it with --model."
        )
    return Source(folder, kind, base, None, "auto", trust_remote_code)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: if it holds anything else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold one JSON object.")
    return value


def _of_run(
    folder: Path, kind: str, recipe: Recipe, model: str | None, trust_remote_code: bool
) -> Source:
    return Source(
        folder,
        kind,
        model or recipe.model,
        recipe.tokenizer,
        recipe.dtype,
        trust_remote_code or recipe.trust_remote_code,
        recipe.data,
        recipe.evaluation,
    )


def _of_model(folder: Path, trust_remote_code: bool) -> Source:
    recipe = _recipe_of_export(folder)
    if recipe is None:
        return Source(folder, None, str(folder), None, "auto", trust_remote_code)
    trust = trust_remote_code or recipe.trust_remote_code
    return Source(folder, None, str(folder), None, "auto", trust, recipe.data, recipe.evaluation)


def _recipe_of_export(folder: Path) -> Recipe | None:
    """The recipe of the run that an export was made from, where that run is still there."""
    if not (folder / RECORD).is_file():
        return None
    run = RunDir(Path(str(read_json(folder / RECORD).get("adapter"))))
    return run.read_config() if run.config.is_file() else None
