"""The CPU engine: one autograd function for the whole expert MLP, at the active ranks only.

Matrix products run expert by expert; everything that is done element by element runs on chunks of
neighbouring experts, large enough for all threads and small enough to stay in cache, in buffers
that are used again. LoRA products are added in place into the base product, forward and in dX; no
gradient of a base weight is computed; what is kept for backward is the input, the gate_up output
and the rank-wide intermediates z = A x.

Backward of one expert, with g the output's gradient and w the routing weight of its rows:

    dh   = g W_down + s (g B^T) A            still without w
    dw   = <dh, h>                           because <g, W h> = <W^T g, h>
    dB   = s (w z)^T g                       w put on the rank-wide factor, the narrowest place
    dA   = (w s g B^T)^T h
    dgu  = gate_backward(w dh)               and then the same for gate_up, without w

Letters as in `parts`, and c for the rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drlora.ops.parts import DropoutMasks, ExpertWeights, LoraPiece, Matrix, Routing

# Rows of a chunk: 1024 x 1024 floats are 4 MB. Smaller chunks leave threads idle.
CHUNK_ROWS = 1024


class _Plan(NamedTuple):
    """What is not a tensor, or needs no gradient."""

    base: ExpertWeights
    pieces: list[LoraPiece]
    routing: Routing
    counts: list[int]


def experts_loop(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    masks: DropoutMasks,
) -> Tensor:
    """(T, H) output of the adapted experts; see `drlora.ops.adapted_experts`."""
    plan = _Plan(base, pieces, routing, routing.counts())
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
        base, token_S = plan.base, plan.routing.token_S
        gate_up_SG = x_TH.new_empty(len(token_S), 2 * base.width)
        shrunk = [_empty_shrunk(piece, plan.counts, x_TH) for piece in plan.pieces]
        gate_up = _Projection("gate_up", plan, factors, shrunk, mask_SH)
        down = _Projection("down", plan, factors, shrunk, mask_SI)
        weight_S1 = weight_TK.reshape(-1)[plan.routing.order_S, None]
        # Sums over a token's experts are kept in float32: bfloat16 would round after each expert.
        out_TH = torch.zeros(x_TH.shape, dtype=_sum_dtype(x_TH), device=x_TH.device)
        buffers = _Buffers(plan.counts, x_TH)
        for chunk in _chunks(plan.counts):
            token_c = token_S[chunk.rows]
            x_cH = torch.index_select(x_TH, 0, token_c, out=buffers.get(0, chunk, x_TH.shape[1]))
            gate_up_cG = gate_up_SG[chunk.rows]
            gate_up.forward(chunk, gate_up_cG, x_cH)
            h_cI = base.gate_into(buffers.get(1, chunk, base.width), gate_up_cG)
            y_cH = down.forward(chunk, buffers.get(2, chunk, x_TH.shape[1]), h_cI)
            out_TH.index_add_(0, token_c, (y_cH * weight_S1[chunk.rows]).to(out_TH.dtype))
        ctx.plan = plan
        # Through save_for_backward, so that checkpointing can drop them.
        ctx.save_for_backward(x_TH, weight_TK, mask_SH, mask_SI, gate_up_SG, *shrunk, *factors)
        return out_TH.to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        base, order_S = plan.base, plan.routing.order_S
        x_TH, weight_TK, mask_SH, mask_SI, gate_up_SG, *rest = ctx.saved_tensors
        shrunk, factors = rest[: len(plan.pieces)], rest[len(plan.pieces) :]
        gate_up = _Projection("gate_up", plan, factors, shrunk, mask_SH)
        down = _Projection("down", plan, factors, shrunk, mask_SI)
        grads = [torch.zeros_like(factor) for factor in factors]
        gate_up.start_backward(grads)
        down.start_backward(grads)
        weight_S1 = weight_TK.reshape(-1)[order_S, None].to(x_TH.dtype)
        grad_w_S = x_TH.new_empty(len(order_S))
        grad_x_TH = torch.zeros(x_TH.shape, dtype=_sum_dtype(x_TH), device=x_TH.device)
        hidden, width, buffers = x_TH.shape[1], base.width, _Buffers(plan.counts, x_TH)
        for chunk in _chunks(plan.counts):
            token_c, w_c1 = plan.routing.token_S[chunk.rows], weight_S1[chunk.rows]
            x_cH = torch.index_select(x_TH, 0, token_c, out=buffers.get(0, chunk, hidden))
            g_cH = torch.index_select(grad_TH, 0, token_c, out=buffers.get(1, chunk, hidden))
            gate_up_cG = gate_up_SG[chunk.rows]
            h_cI, act_cI = base.gate_again(
                buffers.get(2, chunk, width), buffers.get(3, chunk, width), gate_up_cG
            )
            dh_cI = buffers.get(4, chunk, width)
            down.backward(chunk, dh_cI, g_cH, h_cI, w_c1)
            torch.sum(h_cI.mul_(dh_cI), dim=1, out=grad_w_S[chunk.rows])
            dgate_up_cG = buffers.get(5, chunk, 2 * width)
            base.gate_backward(dgate_up_cG, gate_up_cG, act_cI, dh_cI.mul_(w_c1))
            gate_up.backward(chunk, g_cH, dgate_up_cG, x_cH, None)  # g's buffer now takes dx
            grad_x_TH.index_add_(0, token_c, g_cH.to(grad_x_TH.dtype))
        for piece, grad_b_RO in zip(plan.pieces, grads[1::2], strict=True):
            grad_b_RO.mul_(piece.scaling)
        grad_weight = weight_TK.new_empty(weight_TK.numel())
        grad_weight[order_S] = grad_w_S.to(weight_TK.dtype)
        return (
            None, grad_x_TH.to(x_TH.dtype), grad_weight.view_as(weight_TK), None, None, *grads,
        )  # fmt: skip


class _Projection:
    """One matrix of all experts, with the LoRA pieces on it."""

    def __init__(
        self,
        matrix: Matrix,
        plan: _Plan,
        factors: Sequence[Tensor],
        shrunk: Sequence[Tensor],
        mask_SI: Tensor | None,
    ) -> None:
        self.into = plan.base.forward_matrices(matrix)
        self.back = plan.base.backward_matrices(matrix)
        self.mask_SI = mask_SI
        self.updates = []
        for number, piece in enumerate(plan.pieces):
            if piece.matrix == matrix:
                piece = piece._replace(a_RI=factors[2 * number], b_RO=factors[2 * number + 1])
                whole = piece.b_RO.shape[1] == plan.base.out_features(matrix)
                columns = None if whole else piece.columns
                self.updates.append(_Update(number, piece, columns, plan.counts, shrunk[number]))

    def forward(self, chunk: _Chunk, out_cO: Tensor, x_cI: Tensor) -> Tensor:
        """out = x W^T + s (x A^T) B, expert by expert; keeps z = x A^T."""
        adapter_cI = x_cI if self.mask_SI is None else x_cI * self.mask_SI[chunk.rows]
        for expert, out_nO, x_nI, adapter_nI in chunk.split(out_cO, x_cI, adapter_cI):
            torch.mm(x_nI, self.into[expert], out=out_nO)
            for update in self.updates:
                update.forward(expert, out_nO, adapter_nI)
        return out_cO

    def start_backward(self, grads: Sequence[Tensor]) -> None:
        """Take the buffers for the factors' gradients, zero for experts that get no rows."""
        for update in self.updates:
            update.da = grads[2 * update.number].split(update.ranks)
            update.db = grads[2 * update.number + 1].split(update.ranks)

    def backward(
        self, chunk: _Chunk, dx_cI: Tensor, g_cO: Tensor, x_cI: Tensor, weight_c1: Tensor | None
    ) -> None:
        """dx = g W + s (g B^T) A, and dA and dB / s.

        With `weight_c1`, `g_cO` and `dx_cI` are without the routing weight.
        """
        mask_cI = None if self.mask_SI is None else self.mask_SI[chunk.rows]
        adapter_cI = x_cI if mask_cI is None else x_cI * mask_cI
        # Under dropout the base part is added after the mask was put on the adapter's part.
        part_cI = dx_cI if mask_cI is None else torch.zeros_like(dx_cI)
        weights_c1 = g_cO if weight_c1 is None else weight_c1
        for expert, dx_nI, part_nI, g_nO, x_nI, w_n1 in chunk.split(
            dx_cI, part_cI, g_cO, adapter_cI, weights_c1
        ):
            torch.mm(g_nO, self.back[expert], out=dx_nI)
            for update in self.updates:
                update.backward(expert, part_nI, g_nO, x_nI, None if weight_c1 is None else w_n1)
        if mask_cI is not None:
            dx_cI.addcmul_(part_cI, mask_cI)


class _Update:
    """One LoRA piece, cut into its experts' views at once: one by one would cost more."""

    def __init__(
        self,
        number: int,
        piece: LoraPiece,
        columns: slice | None,
        counts: list[int],
        flat_z: Tensor,
    ) -> None:
        self.number, self.ranks, self.columns = number, piece.ranks, columns
        self.a, self.a_T = piece.a_RI.split(self.ranks), piece.a_RI.T.split(self.ranks, dim=1)
        scaled_b_RO = piece.b_RO * piece.scaling
        self.b, self.b_T = scaled_b_RO.split(self.ranks), scaled_b_RO.T.split(self.ranks, dim=1)
        sizes = [count * rank for count, rank in zip(counts, self.ranks, strict=True)]
        parts = zip(flat_z.split(sizes), counts, self.ranks, strict=True)
        self.z = [z.view(count, rank) for z, count, rank in parts]
        self.da: Sequence[Tensor] = ()
        self.db: Sequence[Tensor] = ()

    def forward(self, expert: int, out_nO: Tensor, x_nI: Tensor) -> None:
        if self.ranks[expert]:
            z_nr = torch.mm(x_nI, self.a_T[expert], out=self.z[expert])
            self._own(out_nO).addmm_(z_nr, self.b[expert])

    def backward(
        self, expert: int, dx_nI: Tensor, g_nO: Tensor, x_nI: Tensor, weight_n1: Tensor | None
    ) -> None:
        if not self.ranks[expert]:
            return
        g_nO, z_nr = self._own(g_nO), self.z[expert]
        dz_nr = torch.mm(g_nO, self.b_T[expert])
        dx_nI.addmm_(dz_nr, self.a[expert])
        if weight_n1 is not None:
            z_nr, dz_nr = z_nr * weight_n1, dz_nr.mul_(weight_n1)
        torch.mm(dz_nr.T, x_nI, out=self.da[expert])
        torch.mm(z_nr.T, g_nO, out=self.db[expert])

    def _own(self, out_nO: Tensor) -> Tensor:
        return out_nO if self.columns is None else out_nO[:, self.columns]


class _Chunk(NamedTuple):
    """Neighbouring experts: their rows, and how many each has."""

    rows: slice
    experts: range
    counts: list[int]

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    def split(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """(expert, its rows of each tensor) for the experts that have rows."""
        cut = [tensor.split(self.counts) for tensor in tensors]
        for position, (expert, count) in enumerate(zip(self.experts, self.counts, strict=True)):
            if count:
                yield expert, *(parts[position] for parts in cut)


def _chunks(counts: list[int]) -> Iterator[_Chunk]:
    """Experts in order, joined until a chunk has CHUNK_ROWS rows."""
    first_expert = first_row = row = 0
    for expert, count in enumerate(counts):
        row += count
        if row - first_row >= CHUNK_ROWS or (expert == len(counts) - 1 and row > first_row):
            experts = range(first_expert, expert + 1)
            yield _Chunk(slice(first_row, row), experts, counts[first_expert : expert + 1])
            first_expert, first_row = expert + 1, row


class _Buffers:
    """Numbered buffers for the largest chunk: fresh ones each time would cost page faults."""

    def __init__(self, counts: list[int], like: Tensor) -> None:
        self.rows = max((chunk.size for chunk in _chunks(counts)), default=0)
        self.like = like
        self.kept: dict[int, Tensor] = {}

    def get(self, number: int, chunk: _Chunk, width: int) -> Tensor:
        """Buffer `number`, (rows of the chunk, width); its content is whatever was there."""
        if number not in self.kept:
            self.kept[number] = self.like.new_empty(self.rows, width)
        return self.kept[number][: chunk.size]


def _empty_shrunk(piece: LoraPiece, counts: list[int], like: Tensor) -> Tensor:
    """Room for z = x A^T of all experts: (rows x rank) blocks of unequal size, end to end."""
    return like.new_empty(sum(n * rank for n, rank in zip(counts, piece.ranks, strict=True)))


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
