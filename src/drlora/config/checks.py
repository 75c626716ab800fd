"""What a single setting of a configuration may be; each check names the setting and its value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final, Protocol

from drlora.errors import ConfigError, shown

# Chosen by the length of the run and the budget (drlora.ranks.schedule).
AUTO: Final = "auto"


class HoldsRanks(Protocol):
    """What a configuration asks of its policy of allocation (drlora.ranks.policies)."""

    def check(self, config: Any) -> None:
        """Refuse ranks that are out of order."""

    def rows(self, config: Any, num_experts: int) -> int:
        """Rows that a block of `num_experts` experts stores for each projection."""


def target_names(names: Iterable[str]) -> list[str]:
    """A list of names, in a fixed order where they came as a set."""
    found = sorted(names) if isinstance(names, (set, frozenset)) else list(names)
    for name in found:
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"target_modules={found!r} must be a list of names, a regular expression, "
                f"'all-linear', 'all-stack' or 'all-attention'; {name!r} is no name."
            )
    return found


def refuse_other_than_names(config: Any, name: str) -> None:
    """A list of names, one name or, but for `projections`, nothing."""
    value = getattr(config, name)
    if value is None and name != "projections":
        return
    collections = (str, list, tuple, set, frozenset)
    if not isinstance(value, collections) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{name}={shown(value)} must be a list of names.")


def number(config: Any, name: str) -> float:
    """The value of a setting that is a number."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}={value!r} must be a number.")
    return value


def in_range(config: Any, name: str, low: float, high: float | None) -> None:
    """A number from `low` up to but not including `high`; None is infinity."""
    value = number(config, name)
    if not (low <= value < (math.inf if high is None else high)):
        bound = f"[{low}, {high})" if high is not None else f"at least {low} and finite"
        raise ConfigError(f"{name}={value} is out of range; it must be {bound}.")


def one_of(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """One of the names in `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; choose one of {list(choices)}.")


def whole_number(config: Any, name: str, lowest: int, unit: str, may_be_auto: bool = False) -> None:
    """A whole number of at least `lowest`, or `auto` where that is allowed."""
    value = getattr(config, name)
    if may_be_auto and value == AUTO:
        return
    if isinstance(value, float) and value.is_integer():  # as version 0.1 let settle_steps be
        value = int(value)
        setattr(config, name, value)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        other = f", or {AUTO!r}" if may_be_auto else ""
        raise ConfigError(
            f"{name}={shown(value)} must be a whole number of {unit}, at least {lowest}{other}."
        )


def refuse_other_than_tokens(config: Any, name: str) -> None:
    """A list of token ids, such a list for each name of an embedding layer, or nothing."""
    value = getattr(config, name)
    lists = list(value.values()) if isinstance(value, dict) else [value or []]
    are_ids = [isinstance(ids, list) and all(type(one) is int for one in ids) for ids in lists]
    if not all(are_ids):
        raise ConfigError(
            f"{name}={shown(value)} must be a list of token ids, or such a list for each name of "
            f"an embedding layer."
        )
