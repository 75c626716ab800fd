"""The CPU engine: one autograd function for the whole expert MLP, at the active ranks only.

A task is a few neighbouring experts, or a part of a large one, done from gather to output while
its rows are in cache; tasks are shared out to threads (`loop_tasks`). What is done element by
element is done for the whole task, products expert by expert (`loop_matrices`). LoRA products are
added in place into the base product, forward and in dX; no gradient of a base weight is computed;
what is kept for backward is the input, the gate_up output and the rank-wide intermediates z = A x.
Each routed row has a place of its own for its output, and a token's rows are then summed in fixed
order, so that results do not depend on which thread was faster.

Backward of one expert, with g the output's gradient and w the routing weight of its rows:

    dh   = g W_down + s (g B^T) A            still without w
    dw   = <dh, h> + <g, bias>               because <g, W h> = <W^T g, h>; few models have biases
    dB   = s (w z)^T g                       w put on the rank-wide factor, the narrowest place
    dA   = (w s g B^T)^T h
    dgu  = gate_backward(w dh)               and then the same for gate_up, without w

Where the processor has no products of the base's 16-bit type, or an expert's are too small for them
to pay, it is widened to float32 in a buffer while it is used (`working_dtype`, docs/engines.md).
Where they pay, rows and ranks are filled up to a few sizes (`loop.filling`).

Letters as in `parts`, c for the rows of a task, n for those of a segment (one expert's rows in it)
and r for an expert's rank.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, promote_types
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from drlora.ops.engine import Engine, register_engine
from drlora.ops.loop.buffers import Buffers, Widen, write_back
from drlora.ops.loop.filling import fill
from drlora.ops.loop.gate import gate_again, gate_backward, gate_into
from drlora.ops.loop.matrices import Projection, empty_shrunk
from drlora.ops.loop.plan import Plan
from drlora.ops.loop.tasks import Task, Work, cut, share_out
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing
from drlora.ops.scratch import scratch
from drlora.ops.weights import ExpertWeights

# Where products of 16 bits beat float32, measured by benchmarks/sixteen_bits.py. To widen a matrix
# takes the time that they save on so many rows, and to begin a product, or to have oneDNN write
# code for it, what they save on so many multiply-adds.
WIDENED_AS_ROWS = 16
PAYS_FROM = 4_000_000


def experts_loop(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    masks: DropoutMasks,
) -> Tensor:
    """(T, H) output of the adapted experts; see `drlora.ops.adapted_experts`."""
    counts = routing.counts()
    rows = sum(counts) / max(sum(count > 0 for count in counts), 1)
    dtype = working_dtype(x_TH, work_saved(rows, x_TH.shape[1], base.width))
    factors = [factor for piece in pieces for factor in (piece.a_RI, piece.b_RO)]
    plan = Plan(base, pieces, [None] * len(pieces), routing, cut(counts), dtype)
    if x_TH.device.type == "cpu" and dtype.itemsize == 2:
        plan, masks = fill(plan, masks, work=rows * x_TH.shape[1] * base.width)
    return _ExpertsLoop.apply(plan, x_TH, weight_TK, masks.gate_up_SH, masks.down_SI, *factors)


def _refuses(base: ExpertWeights) -> str | None:
    if base.post_norm is not None:
        return "the experts have a norm after each, whose backward pass it does not know"
    return None


def work_saved(rows: float, hidden: int, width: int) -> float:
    """What products of 16 bits save on an expert of so many rows, in multiply-adds of a product."""
    return (rows + WIDENED_AS_ROWS) * hidden * width


def working_dtype(like: Tensor, saved: float = math.inf) -> torch.dtype:
    """What products are computed in: float32 where those of the tensor's type are slower on a CPU.

    They are where the processor has none, and where an expert is small: to begin such a product
    takes longer, and now and then oneDNN writes code for one.

    Args:
        like: an input of the experts.
        saved: see `work_saved`, of an expert in the mean.
    """
    if like.device.type != "cpu" or like.dtype not in (torch.bfloat16, torch.float16):
        return like.dtype
    return like.dtype if _multiplies(like.dtype) and saved >= PAYS_FROM else torch.float32


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has products of a 16-bit type."""
    able = torch.cpu.get_capabilities()
    names = {
        torch.bfloat16: ("amx_bf16", "avx512_bf16"),
        torch.float16: ("amx_fp16", "avx512_fp16"),
    }
    return any(able.get(name, False) for name in names[dtype])


class _ExpertsLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x_TH: Tensor,
        weight_TK: Tensor,
        mask_SH: Tensor | None,
        mask_SI: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        base, hidden, width = plan.base, x_TH.shape[1], plan.base.width
        rows = len(plan.routing.order_S)
        gate_up_SG = x_TH.new_empty(rows, base.out_features("gate_up"))
        sum_dtype = promote_types(plan.dtype, weight_TK.dtype)
        y_SH = scratch("routed rows", rows, hidden, sum_dtype, x_TH.device)
        shrunk = [empty_shrunk(piece, plan) for piece in plan.pieces]
        gate_up = Projection("gate_up", plan, factors, shrunk, mask_SH)
        down = Projection("down", plan, factors, shrunk, mask_SI)
        wide_x_TH = x_TH.to(plan.dtype)
        tokens, kept = plan.by_task(plan.routing.token_S), plan.by_task(gate_up_SG)
        outputs = plan.by_task(y_SH)

        def make_work() -> Work:
            buffers = Buffers(plan)
            widen_gate_up, widen_down = Widen(plan.dtype), Widen(plan.dtype)

            def work(task: Task) -> None:
                x_cH = buffers.get("x", task, hidden)
                torch.index_select(wide_x_TH, 0, tokens[task.number], out=x_cH)
                gate_up_cG = buffers.instead("gate_up", task, kept[task.number])
                gate_up.forward(task, widen_gate_up, gate_up_cG, x_cH)
                h_cI = gate_into(base, buffers.get("h", task, width), gate_up_cG)
                y_cH = buffers.instead("y", task, outputs[task.number])
                down.forward(task, widen_down, y_cH, h_cI)
                write_back(kept[task.number], gate_up_cG)
                write_back(outputs[task.number], y_cH)

            return work

        share_out(plan.tasks, make_work, x_TH.device)
        place_TK = plan.routing.place_S[: weight_TK.numel()].view(weight_TK.shape)  # none fills
        ctx.plan = plan
        # Through save_for_backward, so that checkpointing can drop them.
        ctx.save_for_backward(
            x_TH, weight_TK, place_TK, mask_SH, mask_SI, gate_up_SG, *shrunk, *factors
        )
        return _sum_rows(y_SH, place_TK, weight_TK).to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        base, order_S = plan.base, plan.routing.order_S
        x_TH, weight_TK, place_TK, mask_SH, mask_SI, gate_up_SG, *rest = ctx.saved_tensors
        shrunk, factors = rest[: len(plan.pieces)], rest[len(plan.pieces) :]
        gate_up = Projection("gate_up", plan, factors, shrunk, mask_SH)
        down = Projection("down", plan, factors, shrunk, mask_SI)
        hidden, width = x_TH.shape[1], base.width
        wide_x_TH, wide_grad_TH = x_TH.to(plan.dtype), grad_TH.to(plan.dtype)
        weight_of_fillers = (0, 1)  # zero, one past the end
        weight_S1 = F.pad(weight_TK.reshape(-1), weight_of_fillers)[order_S, None].to(plan.dtype)
        grad_x_SH = scratch("routed rows", len(order_S), hidden, x_TH.dtype, x_TH.device)
        grad_w_S = weight_S1.new_empty(len(order_S))
        grads = [plan.room_for(number // 2, factor) for number, factor in enumerate(factors)]
        gate_up.start_backward(plan, grads, None)
        down.start_backward(plan, grads, weight_S1)
        tokens, weights = plan.by_task(plan.routing.token_S), plan.by_task(weight_S1)
        kept, grad_xs = plan.by_task(gate_up_SG), plan.by_task(grad_x_SH)
        grad_ws = plan.by_task(grad_w_S)

        def make_work() -> Work:
            buffers = Buffers(plan)
            widen_gate_up, widen_down = Widen(plan.dtype), Widen(plan.dtype)

            def work(task: Task) -> None:
                token_c = tokens[task.number]
                g_cH = buffers.get("g", task, hidden)
                torch.index_select(wide_grad_TH, 0, token_c, out=g_cH)
                gate_up_cG = buffers.filled("gate_up", task, kept[task.number])
                h_cI, act_cI = gate_again(
                    base, buffers.get("h", task, width), buffers.get("act", task, width), gate_up_cG
                )
                dh_cI = buffers.get("dh", task, width)
                down.backward(task, widen_down, dh_cI, g_cH, h_cI)
                torch.sum(h_cI.mul_(dh_cI), dim=1, out=grad_ws[task.number])
                down.add_bias_products(task, grad_ws[task.number], g_cH)
                dgate_up_cG = buffers.get("dgate_up", task, gate_up_SG.shape[1])
                dh_cI.mul_(weights[task.number])
                gate_backward(base, dgate_up_cG, gate_up_cG, act_cI, dh_cI, h_cI)
                x_cH = torch.index_select(wide_x_TH, 0, token_c, out=g_cH)  # g is done with
                dx_cH = buffers.instead("dx", task, grad_xs[task.number])
                gate_up.backward(task, widen_gate_up, dx_cH, dgate_up_cG, x_cH)
                write_back(grad_xs[task.number], dx_cH)

            return work

        share_out(plan.tasks, make_work, x_TH.device)
        for update in gate_up.updates + down.updates:
            update.join_parts()
        grad_weight = weight_TK.new_empty(weight_TK.numel() + 1)
        grad_weight[order_S] = grad_w_S.to(weight_TK.dtype)
        grad_weight = grad_weight[:-1].view_as(weight_TK)
        grads = [
            plan.give_back(number // 2, grad, factor)
            for number, (grad, factor) in enumerate(zip(grads, factors, strict=True))
        ]
        return None, _sum_rows(grad_x_SH, place_TK, None), grad_weight, None, None, *grads


def _sum_rows(y_SH: Tensor, place_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """(T, H): each token's rows, weighted and summed; bfloat16 is summed in float32."""
    weights = None if weight_TK is None else weight_TK.to(y_SH.dtype)
    return F.embedding_bag(place_TK, y_SH, mode="sum", per_sample_weights=weights)


register_engine(Engine("loop", experts_loop, _refuses, stand_ins=("grouped", "naive")))
