"""Experts that are a ModuleList of small MLPs: remote code, and models as they were before fusing.

Such a block calls its experts one by one, and nothing says which routing it used. Two ways are
known: a linear `gate` whose logits go through softmax and top-k (Mixtral, OLMoE, Qwen2-MoE), and a
`gate` that returns indices and weights (DeepSeek). Whether a block really works in one of these is
tried out: its own forward and this file's must give the same, or the model is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drlora.moe.families.base import Family, Place, Run, gated, register_family
from drlora.ops.naive import experts_naive
from drlora.ops.parts import DropoutMasks
from drlora.ops.routing import sort_by_expert
from drlora.ops.storage import has_own_storage
from drlora.ops.weights import Apart, ExpertWeights, as_matrix

# Names of an expert's gate, up and down.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PROBE_TOKENS = 4


class ModuleListExperts(Family):
    """`experts` is a ModuleList; each has three Linear layers and an activation `act_fn`."""

    wraps_block = True

    def recognises(self, module: nn.Module) -> bool:
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.ModuleList) or not len(experts):
            return False
        return isinstance(getattr(module, "gate", None), nn.Module)

    def missing(self, module: Any) -> str | None:
        for expert in module.experts:
            names = _names_of(expert)
            if names is None or not hasattr(expert, "act_fn"):
                return f"its experts have no {_NAMES[0]} or {_NAMES[1]} with an act_fn"
            layers = [getattr(expert, name) for name in names]
            unread = next((layer for layer in layers if not is_readable(layer)), None)
            if unread is not None:
                return cannot_read(unread)
        return None if self._computes_the_same(module) else (
            "its block does not compute what a softmax or DeepSeek router with experts in a "
            "ModuleList would, so its routing is not known; add a family for it"
        )  # fmt: skip

    def places(self, module: Any) -> list[Place]:
        names = _names_of(module.experts[0]) or _NAMES[0]
        paths = [f"experts.{n}.{name}.weight" for n in range(len(module.experts)) for name in names]
        return [Place(path, flat_experts=1) for path in paths]

    def weights(self, module: Any) -> ExpertWeights:
        gate, up, down = _names_of(module.experts[0]) or _NAMES[0]
        matrices = {
            name: as_matrix([getattr(expert, name).weight for expert in module.experts])
            for name in (gate, up, down)
        }
        return ExpertWeights(
            Apart(matrices[gate], matrices[up]), matrices[down], *gated(module.experts[0].act_fn)
        )

    def call(self, module: Any, run: Run, hidden: Tensor) -> Any:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        scores = module.gate(hidden if _returns_routing(module) else x_TH)
        if isinstance(scores, tuple):
            index_TK, weight_TK, *_ = scores
        else:
            weight_TK, index_TK = _softmax_top_k(module, scores)
        out = run(x_TH, index_TK, weight_TK).view(hidden.shape)
        if getattr(module, "shared_experts", None) is not None:
            out = out + module.shared_experts(hidden)
        if getattr(module, "shared_expert", None) is not None:
            opened = torch.sigmoid(module.shared_expert_gate(hidden))
            out = out + opened * module.shared_expert(hidden)
        return out if isinstance(scores, tuple) else (out, scores)

    def router_logits(self, output: Any) -> Tensor | None:
        return output if isinstance(output, Tensor) else None

    def _computes_the_same(self, module: Any) -> bool:
        weights = self.weights(module)
        if weights.device.type == "meta":  # nothing to compute with; tried when it has weights
            return True
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(
            1, _PROBE_TOKENS, weights.in_features("gate_up"), generator=generator
        ).to(weights.device, weights.dtype)
        # bitsandbytes rearranges a layer for good in its first pass on a CPU without a gradient.
        hidden.requires_grad_(not weights.is_plain)

        def run(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, /, **_: Any) -> Tensor:
            routing = sort_by_expert(index_TK, weights.num_experts)
            return experts_naive(x_TH, weight_TK, routing, weights, [], DropoutMasks(None, None))

        training = module.training
        module.eval()
        try:
            with torch.set_grad_enabled(not weights.is_plain):
                own, ours = module(hidden.clone()), self.call(module, run, hidden)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False
        finally:
            module.train(training)
        if isinstance(own, tuple) != isinstance(ours, tuple):
            return False
        own, ours = (out[0] if isinstance(out, tuple) else out for out in (own, ours))
        tolerance = 16 * torch.finfo(weights.dtype).eps ** 0.75
        return bool((own - ours).norm() <= tolerance * own.norm())


def is_readable(layer: nn.Module) -> bool:
    """A plain Linear layer without bias; or a subclass of it, if its weight's storage is known."""
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        return False
    return type(layer) is nn.Linear or has_own_storage(layer.weight)


def cannot_read(layer: nn.Module) -> str:
    """Why experts with such a layer cannot be adapted."""
    return (
        f"its experts have layers that cannot be read ({layer}); what can are plain Linear layers "
        f"and bitsandbytes' Linear4bit in nf4 with blocks of 64, without a bias, and before their "
        f"first inference on a CPU, which rearranges them"
    )


def _names_of(expert: nn.Module) -> tuple[str, str, str] | None:
    return next((names for names in _NAMES if all(hasattr(expert, n) for n in names)), None)


def _returns_routing(module: Any) -> bool:
    """DeepSeek's gates are modules of their own and want (batch, length, H)."""
    return not isinstance(module.gate, nn.Linear)


def _softmax_top_k(module: Any, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    top_k = getattr(module, "top_k", None) or module.num_experts_per_tok
    weight_TK, index_TK = logits_TE.softmax(dim=1, dtype=torch.float32).topk(top_k, dim=-1)
    if getattr(module, "norm_topk_prob", True):
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return weight_TK.to(logits_TE.dtype), index_TK


register_family(ModuleListExperts())
