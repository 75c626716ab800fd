"""What a user may hand to `drlora export` and `drlora eval`: where its model and its data are.

    a run directory            `drlora train`
    a folder with an adapter   `save_pretrained`, a checkpoint, an export as peft or per-expert
    a folder with a model      an export as merged

An export says which run it came from; where that is still there, its data and settings are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from drlora.errors import CheckpointError
from drlora.export import RECORD
from drlora.files import read_adapter_config, read_json, shown
from drlora.recipe import DataSection, EvaluationSection, Recipe
from drlora.rundir import RunDir

KINDS = ("DRLORA", "LORA")


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
                f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: the run is not finished. Continue it "
                f"with: {run.resume_command}"
            )
        read_adapter_config(folder, SAFETENSORS_WEIGHTS_NAME)
        return _of_run(folder, "DRLORA", recipe, model, trust_remote_code)
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file():
        return _of_model(folder, trust_remote_code)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is neither a run directory nor a saved adapter: it has no {name}."
            )
    said = read_adapter_config(folder, SAFETENSORS_WEIGHTS_NAME)
    kind = said.get("peft_type")
    if kind not in KINDS:
        raise CheckpointError(
            f"the adapter in {folder} is of type {shown(kind)}; {' and '.join(KINDS)} can be read."
        )
    run_recipe = _recipe_of_export(folder)
    if run_recipe is not None:
        return _of_run(folder, kind, run_recipe, model, trust_remote_code)
    base = model or said.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(
            f"the adapter in {folder} does not say what its base model is; name it with --model."
        )
    return Source(folder, kind, base, None, "auto", trust_remote_code)


def _of_run(
    folder: Path, kind: str, recipe: Recipe, model: str | None, trust_remote_code: bool
) -> Source:
    _refuse_trust_on_hearsay(recipe, folder, trust_remote_code)
    source = Source(
        folder, kind, model or recipe.model, recipe.tokenizer, recipe.dtype, trust_remote_code
    )
    return replace(source, data=recipe.data, evaluation=recipe.evaluation)


def _of_model(folder: Path, trust_remote_code: bool) -> Source:
    source = Source(folder, None, str(folder), None, "auto", trust_remote_code)
    recipe = _recipe_of_export(folder)
    if recipe is None:
        return source
    _refuse_trust_on_hearsay(recipe, folder, trust_remote_code)
    return replace(source, data=recipe.data, evaluation=recipe.evaluation)


def _refuse_trust_on_hearsay(recipe: Recipe, folder: Path, trust_remote_code: bool) -> None:
    """A folder may come from somebody else; that its config.yaml trusts code is not enough."""
    if recipe.trust_remote_code and not trust_remote_code:
        raise CheckpointError(
            f"the run of {folder} was made with trust_remote_code: true; code that comes with a "
            f"model runs only where you say so too, with --trust-remote-code."
        )


def _recipe_of_export(folder: Path) -> Recipe | None:
    """The recipe of the run that an export was made from, where that run is still there."""
    if not (folder / RECORD).is_file():
        return None
    run = RunDir(Path(str(read_json(folder / RECORD).get("adapter"))))
    try:
        is_there = run.config.is_file()
    except (OSError, ValueError):  # no path at all
        return None
    return run.read_config() if is_there else None
