"""Checkpoints that are quantised already: a file of this folder for each way."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from drlora.moe.stored.base import FORMS, Kept, StoredForm, register_form

__all__ = ["FORMS", "Kept", "StoredForm", "register_form"]

for _file in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_file}")
