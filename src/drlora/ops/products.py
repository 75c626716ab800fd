"""A frozen matrix of all experts with LoRA on it, forward and backward, in two ways.

They are what the operator of `compiled` does: one expert after the other, or grouped products over
all of them. Dropout is the caller's: `adapter_SI` is the input with the masks on it.

Letters as in `parts`; P largest rank, rounded up, C output features of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from drlora.ops.grouped import ALIGNMENT_BYTES, by_ranges, pad_rows, padded_rows
from drlora.ops.loop.buffers import Widen
from drlora.ops.parts import LoraPiece
from drlora.ops.weights import ExpertMatrix


def forward_loop(
    x_SI: Tensor, adapter_SI: Tensor, weight: ExpertMatrix, ends_E: Tensor, pieces: list[LoraPiece]
) -> Tensor:
    """(S, O) x W^T + s (x A^T) B, expert by expert."""
    out_SO, widen = x_SI.new_empty(x_SI.shape[0], weight.shape[1]), Widen(x_SI.dtype)
    for expert, rows in _rows_of_experts(ends_E):
        torch.mm(x_SI[rows], _wide(weight, expert, widen).T, out=out_SO[rows])
        for piece in pieces:
            a_rI, b_rO = piece.a_RI[piece.rows(expert)], piece.b_RO[piece.rows(expert)]
            z_nr = adapter_SI[rows] @ a_rI.T
            out_SO[rows, piece.columns].addmm_(z_nr, b_rO, alpha=piece.scaling)
    return out_SO


def backward_loop(
    grad_SO: Tensor,
    adapter_SI: Tensor,
    weight: ExpertMatrix,
    ends_E: Tensor,
    pieces: list[LoraPiece],
    grads: list[Tensor],
    part_SI: Tensor | None,
) -> Tensor:
    """dX; writes `grads`, and adds the pieces' part of dX to `part_SI` if that is given."""
    dx_SI, widen = torch.empty_like(adapter_SI), Widen(adapter_SI.dtype)
    part_SI = dx_SI if part_SI is None else part_SI
    for expert, rows in _rows_of_experts(ends_E):
        torch.mm(grad_SO[rows], _wide(weight, expert, widen), out=dx_SI[rows])
        for piece, da_RI, db_RO in zip(pieces, grads[::2], grads[1::2], strict=True):
            ranks, grad_nO = piece.rows(expert), grad_SO[rows, piece.columns]
            z_nr = adapter_SI[rows] @ piece.a_RI[ranks].T
            dz_nr = (grad_nO @ piece.b_RO[ranks].T).mul_(piece.scaling)
            part_SI[rows].addmm_(dz_nr, piece.a_RI[ranks])
            torch.mm(dz_nr.T, adapter_SI[rows], out=da_RI[ranks])
            torch.mm(z_nr.mul_(piece.scaling).T, grad_nO, out=db_RO[ranks])
    return dx_SI


def _wide(weight: ExpertMatrix, expert: int, widen: Widen) -> Tensor:
    """(O, I) of one expert in the working type."""
    dense_EOI = weight.dense()
    return widen.read(weight, expert) if dense_EOI is None else widen(dense_EOI[expert])


def _rows_of_experts(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for the experts that have rows."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if start < end:
            yield expert, slice(start, end)
        start = end


def forward_grouped(
    x_SI: Tensor, adapter_SI: Tensor, weight: ExpertMatrix, ends_E: Tensor, pieces: list[LoraPiece]
) -> Tensor:
    """As `forward_loop`."""
    out_SO = by_ranges(x_SI, ends_E, weight, turned=True)
    for piece in pieces:
        if piece.offsets[-1]:
            a_EPI, b_EPO, _ = _padded(piece)
            z_SP = F.grouped_mm(adapter_SI, a_EPI.transpose(1, 2), offs=ends_E)
            update_SO = F.grouped_mm(z_SP, b_EPO, offs=ends_E)
            out_SO[:, piece.columns].add_(update_SO, alpha=piece.scaling)
    return out_SO


def backward_grouped(
    grad_SO: Tensor,
    adapter_SI: Tensor,
    weight: ExpertMatrix,
    ends_E: Tensor,
    pieces: list[LoraPiece],
    grads: list[Tensor],
    part_SI: Tensor | None,
) -> Tensor:
    """As `backward_loop`."""
    dx_SI = by_ranges(grad_SO, ends_E, weight, turned=False)
    part_SI = dx_SI if part_SI is None else part_SI
    for piece, da_RI, db_RO in zip(pieces, grads[::2], grads[1::2], strict=True):
        if piece.offsets[-1]:
            a_EPI, b_EPO, slot_R = _padded(piece)
            grad_SC = grad_SO[:, piece.columns].contiguous()
            z_SP = F.grouped_mm(adapter_SI, a_EPI.transpose(1, 2), offs=ends_E)
            dz_SP = F.grouped_mm(grad_SC, b_EPO.transpose(1, 2), offs=ends_E).mul_(piece.scaling)
            part_SI += F.grouped_mm(dz_SP, a_EPI, offs=ends_E)
            da_EPI = F.grouped_mm(dz_SP.T, adapter_SI, offs=ends_E)
            db_EPC = F.grouped_mm(z_SP.mul_(piece.scaling).T, grad_SC, offs=ends_E)
            da_RI[: len(slot_R)] = da_EPI.flatten(0, 1).index_select(0, slot_R)
            db_RO[: len(slot_R)] = db_EPC.flatten(0, 1).index_select(0, slot_R)
    return dx_SI


def _padded(piece: LoraPiece) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors with P rows for each expert, and where among these their own are."""
    multiple = ALIGNMENT_BYTES // piece.a_RI.element_size()
    padding = padded_rows(piece.offsets, multiple, piece.a_RI.device)
    return pad_rows(piece.a_RI, padding), pad_rows(piece.b_RO, padding), padding.slot_R
