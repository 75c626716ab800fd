"""DBRX: gate, up and down as 2-D parameters (E * I, H), called with (batch, length, H)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drlora.moe.families.base import Family, Place, Run, gated, register_family
from drlora.ops.weights import Apart, ExpertWeights, as_matrix


class Dbrx(Family):
    """`mlp.w1` is the gate, `mlp.v1` up, `mlp.w2` down and transposed."""

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExperts"

    def places(self, module: Any) -> list[Place]:
        return [Place(f"mlp.{key}", module.num_experts) for key in ("w1", "v1", "w2")]

    def weights(self, module: Any) -> ExpertWeights:
        mlp = module.mlp
        gate, up, down = (
            w.view(_shape(module)) if isinstance(w, Tensor) else w for w in (mlp.w1, mlp.v1, mlp.w2)
        )
        return ExpertWeights(
            Apart(as_matrix(gate), as_matrix(up)),
            as_matrix(down, transposed=True),
            *gated(mlp.activation_fn),
        )

    def call(
        self, module: Any, run: Run, hidden: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        out_TH = run(hidden.reshape(-1, hidden.shape[-1]), index_TK, weight_TK)
        return out_TH.view(hidden.shape)


def _shape(module: Any) -> tuple[int, int, int]:
    return module.num_experts, module.ffn_hidden_size, module.hidden_size


register_family(Dbrx())
