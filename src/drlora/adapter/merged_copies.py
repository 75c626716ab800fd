"""Modules that adapters train in full, while adapters are merged: whose copy is used.

PEFT keeps a copy for each adapter (routers with `router="train"`, and `modules_to_save`), and uses
that of the active one, whichever adapters are merged.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeAlias

from peft.utils import ModulesToSaveWrapper
from torch import nn

from drlora.errors import ConfigError

# Wrappers, and the adapter whose copy each used before, as PEFT notes it: a name, or no names.
InUse: TypeAlias = list[tuple[ModulesToSaveWrapper, Any]]


def use_copies_of(model: nn.Module, names: Collection[str]) -> InUse:
    """Have every such module be the copy that the merged adapters have of it, or the original.

    Args:
        model: with its adapters.
        names: of all adapters that are merged, or are about to be.

    Returns:
        What `put_back` takes to undo it.

    Raises:
        ConfigError: if two of them have a copy of the same module. Nothing is changed then.
    """
    chosen: InUse = []
    for place, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            owners = [name for name in names if name in module.modules_to_save]
            if len(owners) > 1:
                raise ConfigError(
                    f"adapters {owners} cannot be merged together: each has trained {place} in "
                    f"full, and a model has one. Merge one of them."
                )
            chosen.append((module, owners[0] if owners else []))
    before: InUse = [(module, module._active_adapter) for module, _ in chosen]
    _use(chosen)
    return before


def put_back(before: InUse) -> None:
    """Use the copies that were used before, once: the list is empty afterwards."""
    _use(before)
    before.clear()


def _use(copies: InUse) -> None:
    for module, owner in copies:
        module._active_adapter = owner  # what asks for a gradient stays as it is
