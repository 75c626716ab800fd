"""The CPU engine: one autograd function for the whole expert MLP, at the active ranks only.

Experts run one after the other, so that an expert's activations are still in cache when the next
product needs them. LoRA products are added in place into the base product, forward and in dX; no
gradient of a base weight is computed; dropped are all buffers of the size of the routed rows but
one: what backward needs is the input, the gate_up output and the rank-wide intermediates.

The gradient of the routing weight comes from the down projection's input instead of its output:
<grad, W h> = <W^T grad, h>. Tested against `naive`; written out in docs/engines.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drlora.ops.parts import DropoutMasks, ExpertWeights, LoraPiece, Matrix, Routing


class _Plan(NamedTuple):
    """What is not a tensor, or needs no gradient."""

    base: ExpertWeights
    pieces: list[LoraPiece]
    routing: Routing
    ends: list[int]


def experts_loop(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    masks: DropoutMasks,
) -> Tensor:
    """(T, H) output of the adapted experts; see `drlora.ops.adapted_experts`."""
    plan = _Plan(base, pieces, routing, routing.ends())
    factors = [factor for piece in pieces for factor in (piece.a_RI, piece.b_RO)]
    return _ExpertsLoop.apply(plan, x_TH, weight_TK, masks.gate_up_SH, masks.down_SI, *factors)


class _ExpertsLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x_TH: Tensor,
        weight_TK: Tensor,
        mask_SH: Tensor | None,
        mask_SI: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        base, routing = plan.base, plan.routing
        pieces = _bind(plan.pieces, factors)
        num_rows = routing.order_S.numel()
        weight_S1 = weight_TK.reshape(-1)[routing.order_S, None]
        gate_up_SG = x_TH.new_empty(num_rows, base.gate_up_EGH.shape[1])
        shrunk = [_Shrunk.empty(piece, plan.ends, x_TH) for piece in pieces]
        # Sums over a token's experts are kept in float32: bfloat16 would round after each expert.
        out_TH = torch.zeros(x_TH.shape, dtype=_sum_dtype(x_TH), device=x_TH.device)
        x_bH, y_bH = _workspace(plan.ends, x_TH, x_TH.shape[1], x_TH.shape[1])
        for expert, rows in _busy(plan.ends):
            n = rows.stop - rows.start
            token_n = routing.token_S[rows]
            x_nH = torch.index_select(x_TH, 0, token_n, out=x_bH[:n])
            gate_up_nG, y_nH = gate_up_SG[rows], y_bH[:n]
            torch.mm(x_nH, base.gate_up_EGH[expert].T, out=gate_up_nG)
            _add_lora("gate_up", gate_up_nG, x_nH, expert, rows, pieces, shrunk, mask_SH)
            h_nI = base.apply_gate(gate_up_nG)
            torch.mm(h_nI, base.down_EHI[expert].T, out=y_nH)
            _add_lora("down", y_nH, h_nI, expert, rows, pieces, shrunk, mask_SI)
            out_TH.index_add_(0, token_n, y_nH.to(out_TH.dtype).mul_(weight_S1[rows]))
        ctx.plan = plan
        # Through save_for_backward, so that checkpointing can drop them.
        ctx.save_for_backward(
            x_TH, weight_TK, mask_SH, mask_SI, gate_up_SG, *(s.flat for s in shrunk), *factors
        )
        return out_TH.to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        base, routing = plan.base, plan.routing
        x_TH, weight_TK, mask_SH, mask_SI, gate_up_SG, *rest = ctx.saved_tensors
        flats, factors = rest[: len(plan.pieces)], rest[len(plan.pieces) :]
        pieces = _bind(plan.pieces, factors)
        shrunk = [_Shrunk.of(f, p, plan.ends) for f, p in zip(flats, pieces, strict=True)]
        grads = [(torch.zeros_like(p.a_RI), torch.zeros_like(p.b_RO)) for p in pieces]
        weight_S1 = weight_TK.reshape(-1)[routing.order_S, None].to(x_TH.dtype)
        grad_weight_S = weight_TK.new_zeros(weight_TK.numel())
        grad_x_TH = torch.zeros(x_TH.shape, dtype=_sum_dtype(x_TH), device=x_TH.device)
        hidden, width = x_TH.shape[1], base.down_EHI.shape[2]
        x_bH, g_bH, dx_bH, dh_bI = _workspace(plan.ends, x_TH, hidden, hidden, hidden, width)
        for expert, rows in _busy(plan.ends):
            n = rows.stop - rows.start
            token_n, w_n1 = routing.token_S[rows], weight_S1[rows]
            x_nH = torch.index_select(x_TH, 0, token_n, out=x_bH[:n])
            g_nH = torch.index_select(grad_TH, 0, token_n, out=g_bH[:n])
            gate_up_nG = gate_up_SG[rows]
            h_nI = base.apply_gate(gate_up_nG)
            dh_nI = torch.mm(g_nH, base.down_EHI[expert], out=dh_bI[:n])
            at = _At("down", expert, rows)
            _lora_backward(at, g_nH, h_nI, dh_nI, w_n1, pieces, shrunk, grads, mask_SI)
            grad_weight_S[routing.order_S[rows]] = (dh_nI * h_nI).sum(-1).to(weight_TK.dtype)
            dgate_up_nG = base.gate_backward(gate_up_nG, dh_nI.mul_(w_n1))
            dx_nH = torch.mm(dgate_up_nG, base.gate_up_EGH[expert], out=dx_bH[:n])
            at = _At("gate_up", expert, rows)
            _lora_backward(at, dgate_up_nG, x_nH, dx_nH, None, pieces, shrunk, grads, mask_SH)
            grad_x_TH.index_add_(0, token_n, dx_nH.to(grad_x_TH.dtype))
        flat_grads = [grad for pair in grads for grad in pair]
        grad_weight_TK = grad_weight_S.view_as(weight_TK)
        return None, grad_x_TH.to(x_TH.dtype), grad_weight_TK, None, None, *flat_grads


class _At(NamedTuple):
    """Where in the block: which matrix, which expert, which of the sorted rows."""

    matrix: Matrix
    expert: int
    rows: slice


class _Shrunk(NamedTuple):
    """x A^T of one piece for all experts, (rows x rank) blocks of unequal size, end to end."""

    flat: Tensor
    blocks: list[Tensor]

    @classmethod
    def empty(cls, piece: LoraPiece, ends: list[int], like: Tensor) -> _Shrunk:
        size = sum(
            (end - start) * rank
            for start, end, rank in zip([0, *ends], ends, _ranks(piece), strict=False)
        )
        return cls.of(like.new_empty(size), piece, ends)

    @classmethod
    def of(cls, flat: Tensor, piece: LoraPiece, ends: list[int]) -> _Shrunk:
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        ranks = _ranks(piece)
        parts = flat.split([count * rank for count, rank in zip(counts, ranks, strict=True)])
        views = [
            part.view(count, rank) for part, count, rank in zip(parts, counts, ranks, strict=True)
        ]
        return cls(flat, views)


def _ranks(piece: LoraPiece) -> list[int]:
    return [b - a for a, b in zip(piece.offsets, piece.offsets[1:], strict=False)]


def _bind(pieces: list[LoraPiece], factors: Any) -> list[LoraPiece]:
    """The pieces with the factors as this function received them."""
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return [p._replace(a_RI=a, b_RO=b) for p, (a, b) in zip(pieces, pairs, strict=True)]


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _busy(ends: list[int]) -> list[tuple[int, slice]]:
    """The experts that got rows, with their rows."""
    spans = zip([0, *ends], ends, strict=False)
    return [(e, slice(start, end)) for e, (start, end) in enumerate(spans) if start < end]


def _workspace(ends: list[int], like: Tensor, *widths: int) -> list[Tensor]:
    """Buffers for the busiest expert: fresh ones for each expert would cost page faults."""
    most = max((rows.stop - rows.start for _, rows in _busy(ends)), default=0)
    return [like.new_empty(most, width) for width in widths]


def _add_lora(
    matrix: Matrix,
    out_nO: Tensor,
    x_nI: Tensor,
    expert: int,
    rows: slice,
    pieces: list[LoraPiece],
    shrunk: list[_Shrunk],
    mask_SI: Tensor | None,
) -> None:
    """Add scaling * (x A^T) B into `out_nO`, keeping x A^T for backward."""
    if mask_SI is not None:
        x_nI = x_nI * mask_SI[rows]
    for piece, kept in zip(pieces, shrunk, strict=True):
        ranks = slice(piece.offsets[expert], piece.offsets[expert + 1])
        if piece.matrix != matrix or ranks.start == ranks.stop:
            continue
        z_nr = torch.mm(x_nI, piece.a_RI[ranks].T, out=kept.blocks[expert])
        out_nO[:, piece.columns].addmm_(z_nr, piece.b_RO[ranks], alpha=piece.scaling)


def _lora_backward(
    at: _At,
    g_nO: Tensor,
    x_nI: Tensor,
    dx_nI: Tensor,
    weight_n1: Tensor | None,
    pieces: list[LoraPiece],
    shrunk: list[_Shrunk],
    grads: list[tuple[Tensor, Tensor]],
    mask_SI: Tensor | None,
) -> None:
    """Write dA and dB of one expert, and add the pieces' part of dX into `dx_nI`.

    With `weight_n1`, `g_nO` still lacks the routing weight: it is put on the rank-wide
    intermediates, the narrowest place, and `dx_nI` is left without it.
    """
    mask_nI = None if mask_SI is None else mask_SI[at.rows]
    for piece, kept, (da_RI, db_RO) in zip(pieces, shrunk, grads, strict=True):
        ranks = slice(piece.offsets[at.expert], piece.offsets[at.expert + 1])
        if piece.matrix != at.matrix or ranks.start == ranks.stop:
            continue
        g_piece_nO, z_nr = g_nO[:, piece.columns], kept.blocks[at.expert]
        dz_nr = torch.mm(g_piece_nO, piece.b_RO[ranks].T).mul_(piece.scaling)
        if mask_nI is None:
            dx_nI.addmm_(dz_nr, piece.a_RI[ranks])
        else:
            dx_nI.addcmul_(torch.mm(dz_nr, piece.a_RI[ranks]), mask_nI)
        if weight_n1 is not None:
            z_nr, dz_nr = z_nr * weight_n1, dz_nr.mul_(weight_n1)
        inputs_nI = x_nI if mask_nI is None else x_nI * mask_nI
        torch.mm(dz_nr.T, inputs_nI, out=da_RI[ranks])
        torch.mm(z_nr.T, g_piece_nO, out=db_RO[ranks]).mul_(piece.scaling)
