"""DBRX: gate, up and down as 2-D parameters (E * I, H), called with (batch, length, H)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drlora.moe.families.base import Family, Run, gated, register_family
from drlora.ops.weights import Apart, ExpertWeights, as_matrix


class Dbrx(Family):
    """`mlp.w1` is the gate, `mlp.v1` up, `mlp.w2` down and transposed."""

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExperts"

    def weights(self, module: Any) -> ExpertWeights:
        mlp, shape = module.mlp, (module.num_experts, module.ffn_hidden_size, module.hidden_size)
        return ExpertWeights(
            Apart(as_matrix(mlp.w1.view(shape)), as_matrix(mlp.v1.view(shape))),
            as_matrix(mlp.w2.view(shape), transposed=True),
            *gated(mlp.activation_fn),
        )

    def call(
        self, module: Any, run: Run, hidden: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        out_TH = run(hidden.reshape(-1, hidden.shape[-1]), index_TK, weight_TK)
        return out_TH.view(hidden.shape)


register_family(Dbrx())
