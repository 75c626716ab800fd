"""docs/recipe-keys.md: every key of a recipe, with type, default and meaning, from the code.

python tools/make_recipe_keys.py [--check]
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from inspect import getdoc
from pathlib import Path
from typing import Any

from made_pages import write_or_check

from drlora.config.adapter import CHOICES, PRESETS, DrLoraConfig
from drlora.config.checks import AUTO
from drlora.config.methods import METHODS
from drlora.config.registry import ENGINES, REGISTRIES
from drlora.data.formats import FORMS
from drlora.evaluation.measure import DRAWS, EvaluationSection
from drlora.io.settings import described
from drlora.ranks.continue_adapter import RANKS
from drlora.runs.data_section import DataSection
from drlora.runs.quantise import QuantiseSection
from drlora.runs.recipe import (
    DTYPES,
    SECTIONS,
    Recipe,
    adapter_settings,
)
from drlora.runs.training_section import NOT_IN_RECIPES, TRAINING_DEFAULTS
from drlora.trainer.objectives import CHECKPOINTING, OBJECTIVES, OFF, OwnSettings

PAGE = Path(__file__).parents[1] / "docs" / "recipe-keys.md"
START, END = "<!-- keys -->\n", "<!-- end of keys -->\n"
CHOSEN = {
    **{name: tuple(registry.names()) for name, registry in REGISTRIES.items()},
    **CHOICES,
    "engine": (AUTO, *ENGINES.names()),
    "method": tuple(METHODS),
    "dtype": DTYPES,
    "start_from_ranks": RANKS,
    "draw": DRAWS,
    "objective": tuple(OBJECTIVES),
    "format": tuple(FORMS),
}
CONFIGS = {
    "SFTConfig": "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
    "DPOConfig": "https://huggingface.co/docs/trl/dpo_trainer#trl.DPOConfig",
    "KTOConfig": "https://huggingface.co/docs/trl/kto_trainer#trl.KTOConfig",
    "GRPOConfig": "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig",
    "TrainingArguments": "https://huggingface.co/docs/transformers/main_classes/trainer"
    "#transformers.TrainingArguments",
}
HEAD = ["| key | what it takes | default | what it is |", "|---|---|---|---|"]


def meanings(kind: Any) -> dict[str, str]:
    """Name -> what the docstring of a dataclass says of it under Args."""
    text = (getdoc(kind) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", text):
        name, _, what = entry.strip().partition(":")
        found[name] = " ".join(what.split())
    return found


def default_of(field: Field[Any]) -> str:
    """What a field is where it is not given."""
    if field.default is not MISSING:
        return shown(field.default)
    if field.default_factory is not MISSING:
        return shown(field.default_factory())
    return "must be given"


def shown(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("None", "null")


def rows(kind: Any, names: typing.Collection[str], section: str) -> Iterator[str]:
    """A line of the table for each of some fields."""
    hints, says = typing.get_type_hints(kind), meanings(kind)
    prefix = f"{section}." if section else ""
    for field in fields(kind):
        if field.name in names:
            takes = in_words(hints[field.name], field.name)
            what = says[field.name]
            yield f"| `{prefix}{field.name}` | {takes} | {default_of(field)} | {cell(what)} |"


def in_words(hint: Any, name: str) -> str:
    """What a key takes: one of some names, or a type; null is the same as not to be given."""
    if name in CHOSEN:
        return "one of " + ", ".join(f"`{choice}`" for choice in CHOSEN[name])
    words = described(hint).replace(" or null", "").replace("'auto'", "`auto`")
    return "a mapping" if words.startswith("dict[") else words


def training() -> Iterator[str]:
    """What is set otherwise than by TRL, what only drlora has, what a recipe does not set."""
    links = [f"[{name}]({url})" for name, url in CONFIGS.items()]
    objectives = [f"{one.config.__name__} (`{one.name}`)" for one in OBJECTIVES.values()]
    yield f"The fields of TRL's config for the objective: {', '.join(objectives)}, and with them"
    yield f"those of transformers' TrainingArguments, by their names: {', '.join(links)}."
    yield from ("They have TRL's defaults, but:", "", "| key | default here |", "|---|---|")
    # Its name where transformers is older; the newer one is known too.
    off = {"gradient_checkpointing" if k == CHECKPOINTING else k: v for k, v in OFF.items()}
    for name, value in {**TRAINING_DEFAULTS, **off}.items():
        yield f"| `training.{name}` | {shown(value)}{of_objectives(name)} |"
    yield from ("", "What TRL has not:", "", *HEAD)
    yield from rows(OwnSettings, [f.name for f in fields(OwnSettings)], "training")
    yield from ("", "Not to be set in a recipe:", "", "| key | instead |", "|---|---|")
    for name, why in NOT_IN_RECIPES.items():
        yield f"| `training.{name}` | {cell(why)} |"


def of_objectives(name: str) -> str:
    """Where an objective has a default of its own."""
    own = [f"{shown(o.defaults[name])} for `{o.name}`" for o in OBJECTIVES.values()
           if name in o.defaults]  # fmt: skip
    return "".join(f", {one}" for one in own)


def page() -> str:
    """All tables."""
    top = [field.name for field in fields(Recipe) if field.name not in SECTIONS]
    presets = ", ".join(f"`{name}`" for name in PRESETS)
    parts: dict[str, list[str]] = {
        "## At the top": [*HEAD, *rows(Recipe, top, "")],
        "## data": [*HEAD, *rows(DataSection, [f.name for f in fields(DataSection)], "data")],
        "## adapter": [
            *HEAD,
            f"| `adapter.preset` | one of {presets} | | published settings; what else is set here "
            f"changes them |",
            *rows(DrLoraConfig, adapter_settings(), "adapter"),
        ],
        "## quantise": [
            *HEAD,
            *rows(QuantiseSection, [f.name for f in fields(QuantiseSection)], "quantise"),
        ],
        "## training": [*training()],
        "## evaluation": [
            *HEAD,
            *rows(EvaluationSection, [f.name for f in fields(EvaluationSection)], "evaluation"),
        ],
    }
    return "\n".join(f"{title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts.items())


def with_keys(text: str) -> str:
    """The page with its tables made anew."""
    head, rest = text.split(START)
    return head + START + page() + END + rest.split(END)[1]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, with_keys, __doc__))
