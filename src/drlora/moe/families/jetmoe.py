"""JetMoE: two `ParallelExperts` in a block that sorts the rows itself.

Its attention is a mixture of experts too, of another kind (projections of queries and outputs, with
no gate between them). Those are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drlora.moe.families.base import Family, Place, Run, gated, register_family
from drlora.ops.weights import ExpertWeights, as_matrix


class JetMoe(Family):
    """`input_linear.weight (E, 2I, H)`, `output_linear.weight (E, H, I)`, a bias after the sum."""

    wraps_block = True
    left_alone = ("JetMoeMoA",)

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ == "JetMoeMoE"

    def places(self, module: Any) -> list[Place]:
        return [Place("input_linear.weight"), Place("output_linear.weight")]

    def weights(self, module: Any) -> ExpertWeights:
        return ExpertWeights(
            as_matrix(module.input_linear.weight),
            as_matrix(module.output_linear.weight),
            *gated(module.activation),
        )

    def call(self, module: Any, run: Run, hidden: Tensor) -> Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        # Rows sorted by expert: which they are, their weights, and how many each expert has.
        order_S, _, weight_S, counts, _ = module.router(x_TH)
        expert_S = torch.arange(len(counts), device=x_TH.device).repeat_interleave(
            torch.tensor(counts, device=x_TH.device)
        )
        index_S = torch.empty_like(expert_S).scatter(0, order_S, expert_S)
        weight_S = torch.zeros_like(weight_S).scatter(0, order_S, weight_S)
        shape = (len(x_TH), module.router.top_k)
        out_TH = run(x_TH, index_S.view(shape), weight_S.view(shape))
        return out_TH.view(hidden.shape) + module.bias

    def router_logits(self, output: tuple[Any, ...]) -> Tensor:
        return output[4]


register_family(JetMoe())
