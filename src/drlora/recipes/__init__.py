"""The recipes that come with drlora, by name: `drlora train embedded`.

recipe_names()                 # ["definitions", "embedded", ..., "paper/gsm8k", ...]
resolve_recipe("embedded")     # the path of its file
"""

from __future__ import annotations

import difflib
from pathlib import Path

from drlora.errors import ConfigError

FOLDER = Path(__file__).parent
ENDING = ".yaml"


def recipe_names() -> list[str]:
    """The recipes that come along, sorted."""
    files = FOLDER.rglob(f"*{ENDING}")
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in files)


def recipe_text(name: str) -> str:
    """A recipe that comes along, comments included.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in recipe_names():
        raise ConfigError(f"{name!r} is no recipe that comes with drlora{_way_out(name)}")
    return (FOLDER / f"{name}{ENDING}").read_text("utf-8")


def about(name: str) -> str:
    """The first sentence of a recipe that comes along."""
    head = recipe_text(name).partition("\n\n")[0]
    words = " ".join(line.removeprefix("#").strip() for line in head.splitlines())
    return words.partition(". ")[0].removesuffix(".") + "."


def resolve_recipe(name: str) -> str:
    """`name` as it is where it is a file or looks like one; else the file of that recipe.

    Raises:
        ConfigError: if it is neither a file nor the name of a recipe.
    """
    looks_like_a_file = Path(name).suffix in (ENDING, ".yml", ".json")
    if looks_like_a_file or _exists(name):
        return name
    if name not in recipe_names():
        raise ConfigError(
            f"{name!r} is neither a file nor a recipe that comes with drlora{_way_out(name)}"
        )
    return str(FOLDER / f"{name}{ENDING}")


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def _way_out(name: str) -> str:
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{hint} There are {', '.join(recipe_names())}."
