"""Ragged LoRA on grouped experts: `naive` defines it, `loop`, `grouped` and `triton` are fast.

All engines take the same arguments and agree in the output and in every gradient (`contract`).
Under torch.compile `compiled` takes their place.

An engine registers itself when its file is imported, and every file here is: an engine more is a
file (or a folder) more.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from drlora.ops.compiled import TracedPiece
from drlora.ops.engine import Engine, choose_engine, register_engine
from drlora.ops.experts import adapted_experts, traced_experts
from drlora.ops.parts import DropoutMasks, LoraPiece, draw_dropout
from drlora.ops.routing import Routing, sort_by_expert
from drlora.ops.storage import Apart, ExpertMatrix, as_matrix, register_storage
from drlora.ops.weights import MATRICES, ExpertWeights, Matrix

for _file in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_file}")

__all__ = [
    "Apart",
    "DropoutMasks",
    "Engine",
    "ExpertMatrix",
    "ExpertWeights",
    "LoraPiece",
    "MATRICES",
    "Matrix",
    "Routing",
    "TracedPiece",
    "adapted_experts",
    "as_matrix",
    "choose_engine",
    "draw_dropout",
    "register_engine",
    "register_storage",
    "sort_by_expert",
    "traced_experts",
]
