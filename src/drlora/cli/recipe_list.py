"""`drlora init --list`: the recipes that come along, which needs no torch."""

from __future__ import annotations

import json

from drlora.recipes import about, recipe_names


def print_recipes(as_json: bool) -> int:
    """Name and purpose of each; returns the exit code."""
    known = {name: about(name) for name in recipe_names()}
    if as_json:
        print(json.dumps(known, indent=2))
    else:
        print("\n".join(f"{name:16} {what}" for name, what in known.items()))
    return 0
