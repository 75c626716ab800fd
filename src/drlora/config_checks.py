"""Checks of settings that are names or numbers of things in the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from drlora.errors import ConfigError
from drlora.files import shown


def in_order(target_modules: Iterable[str]) -> list[str]:
    """A list of names, in a fixed order where they came as a set.

    Raises:
        ConfigError: if one is no name.
    """
    is_set = isinstance(target_modules, (set, frozenset))
    found = sorted(target_modules) if is_set else list(target_modules)
    for name in found:
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"target_modules={found!r} must be a list of names, a regular expression or "
                f"'all-linear'; {name!r} is no name."
            )
    return found


def refuse_other_than_names(setting: str, value: Any) -> None:
    """Raises:
    ConfigError: if `value` is neither a name nor a collection of names.
    """
    collections = (str, list, tuple, set, frozenset)
    if not isinstance(value, collections) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{setting}={shown(value)} must be a list of names.")


def refuse_other_than_tokens(value: Any) -> None:
    """Raises:
    ConfigError: if `trainable_token_indices` is neither a list of ids, nor one for each name.
    """
    lists = list(value.values()) if isinstance(value, dict) else [value or []]
    are_ids = [isinstance(ids, list) and all(type(one) is int for one in ids) for ids in lists]
    if not all(are_ids):
        raise ConfigError(
            f"trainable_token_indices={shown(value)} must be a list of token ids, or such a list "
            f"for each name of an embedding layer."
        )
