"""A recipe to begin with: one that comes with drlora, fitted to a model and data: `drlora init`.

    made = write_recipe("my.yaml", ["model=path/to/model", "data.train=train.jsonl"])
    print(made.path, made.notes)

The recipe `own-data` stands for a model and data that have to be named. Its numbers are chosen by
them (length, batches, longest example, what is held out), and it is rehearsed as
`drlora train --dry-run` does before it is written, so that what is written can be trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from drlora.errors import ConfigError, DataError
from drlora.io.commented import with_value, without
from drlora.io.files import home
from drlora.io.places import NO_PATHS, leads_somewhere
from drlora.io.settings import parse_yaml, split_override
from drlora.io.writing import write_at_once
from drlora.recipes import ENDING, recipe_text
from drlora.runs.data_section import DataSection
from drlora.runs.dry_run import dry_run
from drlora.runs.loading import load_architecture
from drlora.runs.recipe import LENGTHS, Recipe, load_recipe
from drlora.runs.roles import load_source, load_training_data
from drlora.trainer.objectives import OBJECTIVES, objective_of

OWN_DATA = "own-data"
EPOCHS = 3
FEWEST_STEPS, ENOUGH_STEPS = 100, 300
EXAMPLES_AT_ONCE = 4
# Examples of a step, the most first: the first with which a run has steps enough.
BATCHES = (48, 16, 4)
LONG_RUN = 2000  # steps; the published learning rate is one of such runs
LEARNING_RATES = {"short": 2e-4, "long": 2e-5}
SPLITS = {"train": "train[:90%]", "eval": "train[90%:]"}
FEW = 10  # examples; of fewer a tenth may be none, so one is held out
SPLITS_OF_FEW = {"train": "train[:-1]", "eval": "train[-1:]"}


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that was written.

    Attributes:
        path: the file.
        name: of the recipe that it was made from.
        recipe: what the file holds.
        notes: what was chosen, and what the dry run said, in sentences.
    """

    path: Path
    name: str
    recipe: Recipe
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "name": self.name,
            "recipe": self.recipe.to_dict(),
            "notes": list(self.notes),
        }


def write_recipe(
    output: str | Path | None = None, overrides: Sequence[str] = (), name: str = OWN_DATA
) -> NewRecipe:
    """Write a commented recipe.

    Args:
        output: the file; by default NAME.yaml in the working directory. It must not be there yet.
        overrides: `model=path/to/model`, `data.train=train.jsonl`, `training.max_steps=100` and the
            like. Of `own-data` the first two are needed.
        name: of a recipe that comes with drlora (`drlora.recipes.recipe_names`).

    Raises:
        ConfigError: if there is no such recipe, the file is there, or a value is refused.
        DrLoraError: what `train` would refuse.
    """
    path = new_file(output or PurePath(name).name + ENDING)
    text, notes = draft_recipe(path, overrides, name)
    recipe = load_recipe(parse_yaml(text, name))
    if name == OWN_DATA or recipe.model in NO_PATHS or leads_somewhere(recipe.model):
        notes += [" ".join(note.split()) for note in dry_run(recipe).notes]
    else:
        notes.append(f"{recipe.model} is on the hub: rehearse it with --dry-run where that is")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_at_once(path, text)
    return NewRecipe(path, name, recipe, tuple(notes))


def new_file(output: str | Path) -> Path:
    """The path of a file that is not there yet.

    Raises:
        ConfigError: if it is.
    """
    path = Path(home(str(output)))
    if path.exists():
        raise ConfigError(f"{path} is there already; name another file with -o.")
    return path


def draft_recipe(
    path: Path, overrides: Sequence[str], name: str = OWN_DATA
) -> tuple[str, list[str]]:
    """The text of a recipe that is to be written to `path`, and what was chosen, in sentences.

    Args:
        path: the file; the run's folder is called after it.
        overrides: as `write_recipe` takes them.
        name: likewise.

    Raises:
        ConfigError: if there is no such recipe, or a value is refused.
    """
    text = recipe_text(name)
    values = {".".join(key): value for key, value in map(split_override, overrides)}
    notes: list[str] = []
    values.setdefault("output_dir", f"runs/{path.stem}")
    text = _without_other_length(text, values)
    if name == OWN_DATA:
        text = _fitted(text, values, notes)
    for key, value in values.items():
        text = with_value(text, key.split("."), value)
    if name == OWN_DATA:
        text = _head(path) + text.partition("\n\n")[2]
    return text, notes


def _without_other_length(text: str, values: dict[str, Any]) -> str:
    """A length in steps takes the place of one in epochs, and the other way round."""
    for one, other in (LENGTHS, LENGTHS[::-1]):
        if f"training.{one}" in values and f"training.{other}" not in values:
            text = without(text, ["training", other])
    return text


def _head(path: Path) -> str:
    return (
        f"# Written by drlora init. Every key: docs/recipe-keys.md. Look, then train:\n"
        f"#   drlora train {path} --dry-run\n"
        f"#   drlora train {path}\n\n"
    )


def _fitted(text: str, values: dict[str, Any], notes: list[str]) -> str:
    """The recipe `own-data` with what the model and the data decide; values that are given stay."""
    for key in ("model", "data.train"):
        if not values.get(key):
            raise ConfigError(
                f"a recipe for a model and data of your own needs {key}: drlora init "
                f"model=path/to/model data.train=path/to/train.jsonl. drlora init --list shows "
                f"recipes that need neither."
            )
    text = _held_out(text, values, notes)
    section = _data_section(text, values)
    longest = _longest(values)
    if section.max_length and longest < section.max_length and "data.max_length" not in values:
        values["data.max_length"] = longest
        notes.append(f"the model takes {longest} tokens, so longer examples are cut")
    train, _ = load_training_data(section)
    _choose_objective(train.rows.column_names, values, notes)
    if not {f"training.{name}" for name in LENGTHS} & values.keys():
        _choose_length(len(train.rows), values)
    return text


def _choose_objective(columns: Sequence[str], values: dict[str, Any], notes: list[str]) -> None:
    """Pairs and verdicts are learned from as such, where nothing else is asked for."""
    for name in ("dpo", "kto"):
        fits = any(set(needed) <= set(columns) for needed in OBJECTIVES[name].columns)
        if fits and "objective" not in values:
            values["objective"] = name
            notes.append(f"objective {name}: the data has {OBJECTIVES[name].summary}")


def _held_out(text: str, values: dict[str, Any], notes: list[str]) -> str:
    """Where nothing is named to be held out, a tenth of the data is, or what an own task has."""
    if "data.eval" in values:
        return text
    text = without(text, ["data", "eval"])
    is_embedded = str(values["data.train"]).startswith("embedded:")
    if not is_embedded and not any(key.startswith("data.splits") for key in values):
        values["data.splits"] = SPLITS
        section = _data_section(text, values)
        count = len(load_source(section, section.source("train")[0], "train", None).rows)
        if count < 2:
            raise DataError(
                f"data.train={values['data.train']!r} has 1 example, so none can be held out; name "
                f"data.eval."
            )
        if count < FEW:
            values["data.splits"] = SPLITS_OF_FEW
        part = "tenth of the data" if count >= FEW else "example"
        notes.append(f"the last {part} is held out, for data.eval is not named")
    return text


def _data_section(text: str, values: dict[str, Any]) -> DataSection:
    for key, value in values.items():
        text = with_value(text, key.split("."), value)
    return load_recipe(parse_yaml(text, OWN_DATA)).data


def _longest(values: dict[str, Any]) -> float:
    """Tokens that the model takes."""
    trusted = bool(values.get("trust_remote_code"))
    config = load_architecture(home(values["model"]), trusted).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def _choose_length(examples: int, values: dict[str, Any]) -> None:
    """Three epochs in steps of as many examples as leave steps enough for ranks to grow."""
    in_all = EPOCHS * examples
    batch = next((b for b in BATCHES if in_all / b >= ENOUGH_STEPS), BATCHES[-1])
    steps = max(FEWEST_STEPS, math.ceil(in_all / batch))
    rate = LEARNING_RATES["long" if steps >= LONG_RUN else "short"]
    rate = objective_of(values.get("objective", "sft")).defaults.get("learning_rate", rate)
    chosen = {
        "max_steps": steps,
        "per_device_train_batch_size": EXAMPLES_AT_ONCE,
        "gradient_accumulation_steps": batch // EXAMPLES_AT_ONCE,
        "learning_rate": rate,
        "save_steps": min(500, max(10, steps // 4)),
    }
    for key, value in chosen.items():
        values.setdefault(f"training.{key}", value)
