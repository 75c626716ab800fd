"""The gate of the `loop` engine, forward and backward, in buffers that are used again.

Where an expert's gate is `silu(gate) * up` of two halves its derivative is written out; of any
other torch finds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.weights import ExpertWeights


def gate_into(base: ExpertWeights, h_nI: Tensor, gate_up_nG: Tensor) -> Tensor:
    """`base.apply_gate(gate_up_nG)`, in the given buffer where its form is known."""
    if not base.is_silu:
        return base.apply_gate(gate_up_nG)
    gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate_nI, out=h_nI).mul_(up_nI)


def gate_again(
    base: ExpertWeights, h_nI: Tensor, act_nI: Tensor, gate_up_nG: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same for backward: (h, act(gate) if known), in the given buffers."""
    if not base.is_silu:
        return base.apply_gate(gate_up_nG).clone(), None
    gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate_nI, out=act_nI)
    return torch.mul(act_nI, up_nI, out=h_nI), act_nI


def gate_backward(
    base: ExpertWeights,
    out_nG: Tensor,
    gate_up_nG: Tensor,
    act_nI: Tensor | None,
    grad_nI: Tensor,
    scratch_nI: Tensor,
) -> None:
    """Write the gradient of `base.apply_gate` at `gate_up_nG`, given that of its output."""
    if act_nI is None:
        with torch.enable_grad():
            leaf = gate_up_nG.detach().requires_grad_()
            out_nG.copy_(torch.autograd.grad(base.apply_gate(leaf), leaf, grad_nI)[0])
        return
    gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
    grad_gate_nI, grad_up_nI = out_nG.chunk(2, dim=-1)
    torch.mul(grad_nI, act_nI, out=grad_up_nI)
    torch.mul(grad_nI, up_nI, out=scratch_nI)
    torch.ops.aten.silu_backward.grad_input(scratch_nI, gate_nI, grad_input=grad_gate_nI)
