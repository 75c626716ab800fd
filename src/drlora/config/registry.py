"""Choices by name, open to the outside: rules of saliency, allocations, starts, engines.

    @SALIENCIES.register("count-only")
    def count_only(signals): ...

    DrLoraConfig(saliency="count-only")

A registry knows names and hands out what was registered under them. What comes with the package
registers itself when its module is imported, in just the same way as what a user adds. A choice may
bring options of its own: values of `DrLoraConfig.options` that have an effect with it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from drlora.config.options import GENERAL, Option
from drlora.errors import ConfigError, shown

T = TypeVar("T")


class Registry(Generic[T]):
    """What one setting may be.

    Args:
        setting: its name in DrLoraConfig.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self._found: dict[str, T] = {}
        self._options: dict[str, Mapping[str, Option]] = {}

    def add(self, name: str, value: T, options: Mapping[str, Option] | None = None) -> T:
        """Register `value`; the same name twice is refused, unless it is the same value.

        Args:
            name: as the setting names it.
            value: what the registry is of.
            options: of this choice: name -> what it may be.

        Raises:
            ConfigError: if the name is taken, or none.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{self.setting}={shown(name)} is no name to register; give a text.")
        if self._found.get(name, value) is not value:
            raise ConfigError(
                f"{self.setting}={name!r} is registered already; choose another name."
            )
        self._found[name] = value
        self._options[name] = dict(options or {})
        return value

    def register(self, name: str, options: Mapping[str, Option] | None = None) -> Callable[[T], T]:
        """The same as a decorator."""
        return lambda value: self.add(name, value, options)

    def remove(self, name: str) -> None:
        """Forget a name; for tests, and to register a changed rule in a notebook."""
        self._found.pop(name, None)
        self._options.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._found

    def __getitem__(self, name: str) -> T:
        """What is registered under `name`.

        Raises:
            ConfigError: with the known names, if nothing is.
        """
        if name not in self:
            raise ConfigError(
                f"{self.setting}={shown(name)} is not known; choose one of {list(self.names())}, "
                f"or import the module that registers it first (--plugin FILE, on the command "
                f"line)."
            )
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def names(self) -> tuple[str, ...]:
        """In the order in which they were registered."""
        return tuple(self._found)

    def options_of(self, name: Any) -> Mapping[str, Option]:
        """The options that have an effect with this choice."""
        return self._options[name] if name in self else {}


SALIENCIES: Registry[Any] = Registry("saliency")
"""Rules of saliency: from `drlora.ranks.saliency.Signals` to one number an expert."""

ALLOCATIONS: Registry[Any] = Registry("allocation")
"""Policies of events: who gives ranks up and who gets them (`drlora.ranks.policies`)."""

STARTS: Registry[Any] = Registry("start")
"""Ways to place ranks before the first step (`drlora.ranks.starts`)."""

ENGINES: Registry[Any] = Registry("engine")
"""How adapted experts are computed (`drlora.ops`)."""

REGISTRIES = {r.setting: r for r in (SALIENCIES, ALLOCATIONS, STARTS, ENGINES)}

WITH_OPTIONS = ("saliency", "allocation", "start")  # settings whose choices may bring options


def known_options(rules: Mapping[str, str]) -> dict[str, Option]:
    """Every option that has an effect with these rules: setting -> choice."""
    known = dict(GENERAL)
    for setting, choice in rules.items():
        known |= REGISTRIES[setting].options_of(choice)
    return known


def registered_options() -> dict[str, str]:
    """Option -> a choice that takes it, as `setting=choice`; without the general ones."""
    return {
        option: f"{setting}={choice}"
        for setting in WITH_OPTIONS
        for choice in REGISTRIES[setting].names()
        for option in REGISTRIES[setting].options_of(choice)
    }
