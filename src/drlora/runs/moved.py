"""A run that lies elsewhere than where it was started: its recipe and its checkpoints, from here.

See `drlora.io.places` for what a stored path means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drlora.io.places import Place, leads_somewhere
from drlora.io.run_files import CHECKPOINTS, CONFIG

if TYPE_CHECKING:
    from drlora.runs.recipe import Recipe

_PATHS = ("model", "tokenizer", "start_from", "start_ranks", "chat_template")


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe stored in the run directory `folder`, with the paths that it means now."""
    place = Place.of(folder, recipe.output_dir)
    data, evaluation = recipe.data.moved(place.find), recipe.evaluation.moved(place.find)
    found = _found(place, recipe, _PATHS)
    return replace(recipe, data=data, evaluation=evaluation, output_dir=str(folder), **found)


def located_at(recipe: Recipe, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """`recipe` as it is, unless `path`, which it was read from, is the config.yaml of a run.

    Args:
        recipe: read from `path`, with `overrides`.
        path: a YAML file.
        overrides: `key=value`; an output_dir among them stays.
    """
    folder = Path(path).expanduser().parent
    is_of_a_run = Path(path).name == CONFIG and (folder / CHECKPOINTS).is_dir()
    if not is_of_a_run or any(word.startswith("output_dir=") for word in overrides):
        return recipe
    return located(recipe, folder)


def _found(place: Place, section: Any, names: Sequence[str]) -> dict[str, Any]:
    given = {name: getattr(section, name) for name in names}
    return {name: place.find(value) for name, value in given.items() if value}


class FindBest(TrainerCallback):
    """Lets the Trainer find the best checkpoint so far, whose path it has stored, after a move."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the checkpoint among those of the run."""
        stored = state.best_model_checkpoint
        if stored and not leads_somewhere(stored):
            here = Path(str(args.output_dir)) / Path(stored).name
            if here.is_dir():
                state.best_model_checkpoint = str(here)
