"""LongCat-Flash: after the real experts come "zero experts", which give a token back as it is.

The router chooses among both. Zero experts have no weights to adapt and get no rank; a token's
part that goes to them is its own hidden state times their routing weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drlora.moe.families.base import Family, Run, gated, register_family, run_routed_rows
from drlora.ops.weights import ExpertWeights, as_matrix


class LongcatFlash(Family):
    """`gate_up_proj` has rows for the zero experts too, which nothing reads; `down_proj` not."""

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ == "LongcatFlashExperts"

    def missing(self, module: Any) -> str | None:
        return None if module.num_routed_experts > 0 else "it has zero experts only"

    def weights(self, module: Any) -> ExpertWeights:
        gate_up_EGH = module.gate_up_proj[: module.num_routed_experts]
        gate_up, down = as_matrix(gate_up_EGH), as_matrix(module.down_proj)
        return ExpertWeights(gate_up, down, *gated(module.act_fn))

    def num_choices(self, module: Any) -> int:
        return module.total_experts

    def call(
        self, module: Any, run: Run, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        num_experts = module.num_routed_experts
        kept_T1 = weight_TK.masked_fill(index_TK < num_experts, 0).sum(dim=1, keepdim=True)
        routed_TH = run_routed_rows(run, x_TH, index_TK, weight_TK, num_experts)
        return routed_TH + (x_TH * kept_T1).to(x_TH.dtype)


register_family(LongcatFlash())
