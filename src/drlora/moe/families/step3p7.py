"""Step-3.7: the common layout and call, and a gate of its own, but without the interface's flags.

Its routed output is scaled after the experts (`routed_scaling_factor`), by the block itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from drlora.moe.families.base import Family, Place, register_family
from drlora.ops.weights import ExpertWeights, as_matrix


class Step3p7(Family):
    """`gate_up_proj (E, 2I, H)`, `down_proj (E, H, I)`, `_apply_gate` with a clamp."""

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Step3p7Experts"

    def places(self, module: Any) -> list[Place]:
        return [Place("gate_up_proj"), Place("down_proj")]

    def weights(self, module: Any) -> ExpertWeights:
        gate_up, down = as_matrix(module.gate_up_proj), as_matrix(module.down_proj)
        return ExpertWeights(gate_up, down, module._apply_gate, is_silu=False)


register_family(Step3p7())
