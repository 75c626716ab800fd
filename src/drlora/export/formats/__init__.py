"""The formats of an export by name: those of this folder, and what a program adds.

A file of this folder is a format: NAME.py defines `FORMAT`, a `drlora.export.format.Format` of that
name. So names are known without importing torch, and a new format is one file. A program adds its
own with

    register_format(MyFormat())
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from drlora.errors import ConfigError, shown

if TYPE_CHECKING:
    from drlora.export.format import Format


class _Formats(Mapping[str, "Format"]):
    """Name -> format, imported when it is first asked for."""

    def __init__(self) -> None:
        self._files = {m.name.replace("_", "-"): m.name for m in pkgutil.iter_modules(__path__)}
        self._added: dict[str, Format] = {}

    def __getitem__(self, name: str) -> Format:
        """The format of that name.

        Raises:
            ConfigError: with the names that there are.
        """
        if name in self._added:
            return self._added[name]
        if name not in self._files:
            raise ConfigError(f"format={shown(name)} is not known; choose one of {list(self)}.")
        return import_module(f"{__name__}.{self._files[name]}").FORMAT

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._added

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from self._added

    def __len__(self) -> int:
        return len(self._files) + len(self._added)

    def add(self, format: Format) -> None:
        """Refuses a name that is taken, unless by the same object."""
        name = format.name
        if name in self._files or self._added.get(name, format) is not format:
            raise ConfigError(f"the format {name!r} is there already; choose another name.")
        self._added[name] = format


FORMATS = _Formats()


def register_format(format: Format) -> None:
    """Make a format of a program's own known to `export_adapter` and `make_plan`.

    Args:
        format: an object with what `drlora.export.format.Format` asks.

    Raises:
        ConfigError: if there is another format of that name.
    """
    FORMATS.add(format)
