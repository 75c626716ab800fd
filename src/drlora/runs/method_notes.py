"""What of a recipe's section `adapter` is decided otherwise, or idle: told once, not silent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from drlora.config.adapter import DrLoraConfig
from drlora.errors import shown

# Settings and options of growth by events.
_OF_GROWTH = ("p_grow", "grow_every", "settle_steps", "young_rows")
_OPTIONS_OF_GROWTH = ("young_a", "young_a_scale")

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


def tell_of_idle_growth(given: Mapping[str, Any], adapter: DrLoraConfig) -> None:
    """Log what is set for growth where no rank is left to grow, and none moves.

    Args:
        given: the section `adapter`, as the recipe has it.
        adapter: what came of it.
    """
    if adapter.grows or adapter.allocation != "grow" or adapter.options.get("move_share"):
        return
    options = given.get("options") or {}
    usual = DrLoraConfig()
    idle = [
        f"{name}={shown(given[name])}"
        for name in _OF_GROWTH
        if name in given and given[name] != getattr(usual, name)
    ]
    idle += [
        f"options.{name}={shown(options[name])}"
        for name in _OPTIONS_OF_GROWTH
        if name in options and options[name] != usual.option(name)
    ]
    if idle:
        logger.warning(
            "ranks do not grow, since r_init and r_target are both %d: adapter.%s has no effect",
            adapter.r_target,
            ", adapter.".join(idle),
        )
