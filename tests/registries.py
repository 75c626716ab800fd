"""Registries as they were: what a test registers is gone after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from drlora.config.methods import METHODS
from drlora.config.registry import REGISTRIES
from drlora.io import plugins
from drlora.moe.families import FAMILIES
from drlora.ops.storage import STORAGES


@contextmanager
def as_they_were() -> Iterator[None]:
    """Forget every name that is registered, and every plugin that is run, inside of this."""
    registries = [*REGISTRIES.values(), METHODS]
    kept = [set(registry.names()) for registry in registries]
    lists: list[list[Any]] = [FAMILIES, STORAGES]
    before = [list(found) for found in lists]
    try:
        yield
    finally:
        for found, as_it_was in zip(lists, before, strict=True):
            found[:] = as_it_was
        for registry, names in zip(registries, kept, strict=True):
            for name in set(registry.names()) - names:
                registry.remove(name)
        plugins._LOADED.clear()
        for module in [name for name in sys.modules if name.startswith("drlora_plugin_")]:
            del sys.modules[module]
