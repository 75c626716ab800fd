"""How frozen experts are kept in memory: a file of this folder for each way.

`as_matrix` finds the way by itself. A file registers its storage when it is imported, and all files
of this folder are: a storage more is a file more. What lies outside of the package registers itself
in the same manner (`register_storage`).
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from drlora.ops.storage import plain as _plain  # first, so that it is asked last
from drlora.ops.storage.matrix import (
    STORAGES,
    Coded,
    ExpertMatrix,
    Storage,
    as_matrix,
    has_own_storage,
    register_storage,
    storage_of,
)

for _file in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_file}")

Apart, Dense, Listed = _plain.Apart, _plain.Dense, _plain.Listed

__all__ = [
    "Apart",
    "Coded",
    "Dense",
    "ExpertMatrix",
    "Listed",
    "STORAGES",
    "Storage",
    "as_matrix",
    "has_own_storage",
    "register_storage",
    "storage_of",
]
