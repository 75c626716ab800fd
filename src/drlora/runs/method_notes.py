"""What a method decides otherwise than the section `adapter` of a recipe: told once, not silent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from drlora.config.adapter import DrLoraConfig
from drlora.errors import shown

logger = logging.getLogger(__name__)


def tell_of_method(method: str, given: Mapping[str, Any], adapter: DrLoraConfig) -> None:
    """Log the settings and options that the method fixes to something else, or leaves out.

    Args:
        method: its name.
        given: the section `adapter`, as the recipe has it.
        adapter: what came of it.
    """
    options = given.get("options") or {}
    decided = [
        f"{name} is {shown(getattr(adapter, name))} instead of {shown(value)}"
        for name, value in given.items()
        if name not in ("options", "preset") and getattr(adapter, name) != value
    ]
    for name, value in options.items():
        if name not in adapter.options:
            decided.append(f"options.{name}={shown(value)} has no effect and is left out")
        elif adapter.options[name] != value:
            decided.append(f"options.{name} is {shown(adapter.options[name])}, not {shown(value)}")
    if decided:
        logger.warning("method %s decides: adapter.%s", method, "; adapter.".join(decided))
