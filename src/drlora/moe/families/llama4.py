"""Llama 4: the block hands ALL experts every token, times a score that is 0 unless it was chosen.

An expert of nothing but products and `act(0) * 0` gives 0 for 0, and passes no gradient there. So
computing the chosen ones alone is exact, and as much cheaper as there are experts. The score is
put on the expert's INPUT, so routed rows have an input each and the weight 1.

The experts' own call says nothing of the routing, so the block around them gets another forward.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from drlora.moe.families.base import Family, Place, gated, register_family
from drlora.moe.families.module_list import cannot_read, is_readable
from drlora.ops.weights import Apart, ExpertWeights, as_matrix

_LISTED, _NAMES = "SequentialLlama4TextExperts", ("gate_proj", "up_proj", "down_proj")


class Llama4(Family):
    """`gate_up_proj (E, H, 2I)` and `down_proj (E, I, H)`; no interface.

    Or a ModuleList of MLPs, which transformers puts in their place where a checkpoint has been
    quantised by bitsandbytes or compressed-tensors.
    """

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("Llama4TextExperts", _LISTED)

    def missing(self, module: Any) -> str | None:
        if type(module).__name__ != _LISTED:
            return None
        layers = [getattr(expert, name) for expert in module for name in _NAMES]
        unread = next((layer for layer in layers if not is_readable(layer)), None)
        return None if unread is None else cannot_read(unread)

    def places(self, module: Any) -> list[Place]:
        if type(module).__name__ == _LISTED:
            return []
        return [Place("gate_up_proj"), Place("down_proj")]

    def weights(self, module: Any) -> ExpertWeights:
        if type(module).__name__ == _LISTED:
            gate, up, down = (
                as_matrix([getattr(expert, name).weight for expert in module]) for name in _NAMES
            )
            return ExpertWeights(Apart(gate, up), down, *gated(module[0].activation_fn))
        return ExpertWeights(
            as_matrix(module.gate_up_proj, transposed=True),
            as_matrix(module.down_proj, transposed=True),
            *gated(module.act_fn),
        )

    def prepare(self, block: nn.Module) -> None:
        block_class: Any = type(block)
        block.__class__ = _sparse(block_class)

    def router_logits(self, output: Any) -> Tensor:
        return output[1]


@cache
def _sparse(block_class: Any) -> Any:
    """The class of the block, with a forward that goes through the chosen experts alone.

    A class and not a function on the block: copies of the block take it along, and hooks stay.
    """
    if getattr(block_class, "drlora_sparse", False):
        return block_class

    def forward(self: Any, hidden: Tensor) -> Any:
        if not getattr(self.experts, "needs_routing", False):
            return block_class.forward(self, hidden)
        x_TH = hidden.reshape(-1, self.hidden_dim)
        score_TE, logits_TE = self.router(x_TH)
        score_TK, index_TK = torch.topk(score_TE, self.top_k, dim=-1)
        x_SH = (x_TH[:, None] * score_TK[..., None]).flatten(0, 1)
        one_S1 = torch.ones_like(score_TK).reshape(-1, 1)
        routed_SH = self.experts(
            x_SH, index_TK.reshape(-1, 1), one_S1, routing=(index_TK, score_TK)
        )
        routed_TH = routed_SH.view(*score_TK.shape, -1).sum(dim=1)
        return self.shared_expert(x_TH) + routed_TH, logits_TE

    return type(block_class.__name__, (block_class,), {"forward": forward, "drlora_sparse": True})


register_family(Llama4())
