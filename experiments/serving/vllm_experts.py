"""A stand-in for the one part of vLLM that a CPU does not have: experts with LoRA.

vLLM computes those in Triton alone, and Triton has no CPU. `install` puts the same arithmetic, in
torch, into the place of that kernel. It reads the buffers that vLLM's own loader has filled, so
checks, names, packing, slots, routing and attention are vLLM's; the kernel itself is not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Of GPT-OSS.
_ALPHA, _LIMIT = 1.702, 7.0


def install() -> None:
    """Replace the kernel's `apply`."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    TritonExperts.apply = _apply


def _apply(
    self: Any, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor,
    topk_weights: Tensor, topk_ids: Tensor, activation: Any, global_num_experts: int,
    expert_map: Any, a1q_scale: Any, a2_scale: Any, workspace13: Any, workspace2: Any,
    expert_tokens_meta: Any, apply_router_weight_on_input: bool,
) -> None:  # fmt: skip
    """As `TritonExperts.apply`: output (T, H) of hidden_states (T, H)."""
    assert expert_map is None and not apply_router_weight_on_input
    lora = self._lora_context
    slots_T = torch.full((len(topk_ids),), -1)
    if lora is not None:
        slots_T = lora.punica_wrapper.token_lora_indices[: len(topk_ids)].cpu()
    found_TH = torch.zeros_like(output)
    for expert in topk_ids.unique().tolist():
        for slot in slots_T.unique().tolist():
            tokens, choice = torch.nonzero(
                (topk_ids == expert) & (slots_T[:, None] == slot), as_tuple=True
            )
            if len(tokens):
                on = lora if slot >= 0 and bool(lora.adapter_enabled[slot]) else None
                y_NH = _expert(self, hidden_states[tokens], w1, w2, activation, expert, on, slot)
                weights_N1 = topk_weights[tokens, choice, None].to(y_NH.dtype)
                found_TH.index_add_(0, tokens, y_NH * weights_N1)
    output.copy_(found_TH)


def _expert(
    self: Any, x_NH: Tensor, w1: Tensor, w2: Tensor, activation: Any, e: int, lora: Any, slot: int
) -> Tensor:
    """One expert on its tokens; `lora`: None without an adapter."""
    h = x_NH @ w1[e].T
    if lora is not None:
        stacks = zip(lora.w13_lora_a_stacked, lora.w13_lora_b_stacked, strict=True)
        h = h + torch.cat([x_NH @ a[slot, e].T @ b[slot, e].T for a, b in stacks], dim=-1)
    for_gate_up, for_down = (getattr(self, name, None) for name in ("w1_bias", "w2_bias"))
    h = h if for_gate_up is None else h + for_gate_up[e]
    if "silu" in str(activation).lower():
        gate, up = h.chunk(2, dim=-1)
        h = F.silu(gate) * up
    else:
        gate, up = h[:, ::2].clamp(max=_LIMIT), h[:, 1::2].clamp(-_LIMIT, _LIMIT)
        h = (up + 1) * gate * torch.sigmoid(_ALPHA * gate)
    y_NH = h @ w2[e].T
    y_NH = y_NH if for_down is None else y_NH + for_down[e]
    if lora is not None:
        a, b = lora.w2_lora_a_stacked[0], lora.w2_lora_b_stacked[0]
        y_NH = y_NH + h @ a[slot, e].T @ b[slot, e].T
    return y_NH
