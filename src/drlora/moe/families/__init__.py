"""The kinds of experts that can be adapted: the interface of transformers, and the exceptions.

A family registers itself when its file is imported, and every file of this folder is: a family more
is a file more. What lies outside of the package registers itself in the same manner.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from drlora.moe.families.base import FAMILIES, Family, Place, Run, family_of, register_family

__all__ = ["FAMILIES", "Family", "Place", "Run", "family_of", "register_family"]

_files = sorted(module.name for module in iter_modules(__path__))
# What registers last is asked first; models grow into the interface, so it goes before exceptions.
for _file in sorted(_files, key=lambda name: name == "interface"):
    import_module(f"{__name__}.{_file}")
