"""The accelerator engine without kernels of our own: grouped matrix products, plain autograd.

The base product and the two LoRA products each run as one `torch.nn.functional.grouped_mm` over
all experts. Factors are padded at compute time only, to the largest active rank rounded up to
what the alignment of grouped products asks for (16 bytes); storage stays packed.

Experts that are stored in few bits are made wide by ranges, as many at once as `WIDE_BYTES` hold,
in the forward and again in the backward pass. Autograd keeps nothing of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from drlora.ops.engine import Engine, register_engine
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing, combine
from drlora.ops.weights import ExpertMatrix, ExpertWeights, Matrix

ALIGNMENT_BYTES = 16
WIDE_BYTES = 2**28  # of experts that are wide at the same time, where they are stored in few bits
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(base: ExpertWeights) -> str | None:
    """Why torch's grouped product cannot take these weights; None if it can."""
    if not base.is_stacked and base.is_plain:
        return "the weights of all experts are not one tensor"
    if base.dtype not in _DTYPES:
        return f"grouped products do not take {base.dtype}"
    widths = (base.in_features("gate_up"), base.gate_up.parts[0].shape[1], base.width)
    if any(w * base.dtype.itemsize % ALIGNMENT_BYTES for w in widths):
        return f"rows of {widths} numbers are no multiples of {ALIGNMENT_BYTES} bytes"
    return None


def experts_grouped(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    masks: DropoutMasks,
) -> Tensor:
    """(T, H) output of the adapted experts; see `drlora.ops.adapted_experts`."""
    ends_E = routing.ends_E
    x_SH = x_TH[routing.token_S]
    gate_up_SG = _base_product("gate_up", x_SH, ends_E, routing, base)
    gate_up_SG = _add_lora("gate_up", gate_up_SG, x_SH, ends_E, pieces, masks.gate_up_SH)
    h_SI = base.apply_gate(gate_up_SG)
    y_SH = _base_product("down", h_SI, ends_E, routing, base)
    y_SH = _add_lora("down", y_SH, h_SI, ends_E, pieces, masks.down_SI)
    return combine(base.finish(y_SH), weight_TK, routing, x_TH.dtype)


def _base_product(
    matrix: Matrix, x_SI: Tensor, ends_E: Tensor, routing: Routing, base: ExpertWeights
) -> Tensor:
    outs = [_product(x_SI, ends_E, part) for part in base.matrix(matrix).parts]
    out_SO = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    bias_EO = base.bias(matrix)
    return out_SO if bias_EO is None else out_SO + bias_EO[routing.expert_S]


def _product(x_SI: Tensor, ends_E: Tensor, matrix: ExpertMatrix) -> Tensor:
    if matrix.dense() is not None:
        return by_ranges(x_SI, ends_E, matrix, turned=True)
    out_SO: Tensor = _Product.apply(x_SI, ends_E, matrix)
    return out_SO


class _Product(torch.autograd.Function):
    """x W^T of experts that are no tensor; only where the rows of each expert end is kept."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, ends_E: Tensor, matrix: ExpertMatrix) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.matrix = matrix
        return by_ranges(x_SI, ends_E, matrix, turned=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ends_E,) = ctx.saved_tensors
        return by_ranges(grads[0], ends_E, ctx.matrix, turned=False), None, None


def by_ranges(x_SI: Tensor, ends_E: Tensor, matrix: ExpertMatrix, turned: bool) -> Tensor:
    """x W^T, or x W where not `turned`, with one range of experts wide at a time.

    All of them are one range where they are one tensor. The host learns the ends of ranges, and
    waits for the device, only where there are several.
    """
    dense_EOI = matrix.dense()
    if dense_EOI is not None:
        weight_EIO = dense_EOI.transpose(1, 2) if turned else dense_EOI
        return F.grouped_mm(x_SI, weight_EIO, offs=ends_E)
    experts, outputs, inputs = matrix.shape
    at_once = min(experts, max(1, WIDE_BYTES // (outputs * inputs * x_SI.element_size())))
    wide_EOI = x_SI.new_empty(at_once, outputs, inputs)
    ends = [0] * experts if at_once == experts else ends_E.tolist()
    outs = []
    for low in range(0, experts, at_once):
        high, first = min(low + at_once, experts), ends[low - 1] if low else 0
        last = len(x_SI) if at_once == experts else ends[high - 1]
        if first == last:
            continue
        for number, expert in enumerate(range(low, high)):
            matrix.read(expert, wide_EOI[number])
        range_EOI = wide_EOI[: high - low]
        outs.append(
            F.grouped_mm(
                x_SI[first:last],
                range_EOI.transpose(1, 2) if turned else range_EOI,
                offs=ends_E[low:high] - first,
            )
        )
    return torch.cat(outs) if outs else x_SI.new_zeros(0, outputs if turned else inputs)


def _add_lora(
    matrix: Matrix,
    out_SO: Tensor,
    x_SI: Tensor,
    ends_E: Tensor,
    pieces: list[LoraPiece],
    mask_SI: Tensor | None,
) -> Tensor:
    if mask_SI is not None:
        x_SI = x_SI * mask_SI
    for piece in pieces:
        if piece.matrix != matrix:
            continue
        if piece.a_RI.shape[0] == 0:
            # Adds zero, but keeps the factors in the graph: data-parallel engines wait for them.
            out_SO = out_SO + (piece.a_RI.sum() + piece.b_RO.sum())
            continue
        padding = padded_rows(piece.offsets, ALIGNMENT_BYTES // x_SI.element_size(), x_SI.device)
        a_EPI, b_EPO = pad_rows(piece.a_RI, padding), pad_rows(piece.b_RO, padding)
        z_SP = F.grouped_mm(x_SI, a_EPI.transpose(1, 2), offs=ends_E)
        update_SO = F.grouped_mm(z_SP, b_EPO, offs=ends_E) * piece.scaling
        out_SO = out_SO + piece.spread(update_SO, out_SO.shape[1])
    return out_SO


class Padding(NamedTuple):
    """How R rows are laid out as P for each expert.

    Attributes:
        rows_EP: (E, P) rows of each expert; R stands for a row of zeros.
        slot_R: (R,) where each row is among the E * P.
    """

    rows_EP: Tensor
    slot_R: Tensor


def pad_rows(factor_RO: Tensor, padding: Padding) -> Tensor:
    """(E, P, O): each expert's rows, filled up with zero rows."""
    padded_EPO: Tensor = _PadRows.apply(factor_RO, *padding)
    return padded_EPO


class _PadRows(torch.autograd.Function):
    """That of an index would add up the gradients of all zero rows, one after the other."""

    @staticmethod
    def forward(ctx: Any, factor_RO: Tensor, rows_EP: Tensor, slot_R: Tensor) -> Tensor:
        ctx.save_for_backward(slot_R)
        zero_1O = factor_RO.new_zeros(1, factor_RO.shape[1])
        filled = torch.cat([factor_RO, zero_1O]).index_select(0, rows_EP.flatten())
        return filled.view(*rows_EP.shape, factor_RO.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slot_R,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, slot_R), None, None


@lru_cache(maxsize=512)
def padded_rows(offsets: tuple[int, ...], multiple: int, device: torch.device) -> Padding:
    """The layout with the largest rank, rounded up to a multiple, for every expert."""
    start_E = torch.tensor(offsets[:-1])
    rank_E = torch.tensor(offsets[1:]) - start_E
    width = -(-int(rank_E.max()) // multiple) * multiple
    step_P = torch.arange(width)
    is_row_EP = step_P < rank_E[:, None]
    rows_EP = torch.where(is_row_EP, start_E[:, None] + step_P, offsets[-1])
    return Padding(rows_EP.to(device), is_row_EP.flatten().nonzero()[:, 0].to(device))


register_engine(
    Engine("grouped", experts_grouped, refuses, stand_ins=("loop", "naive"), traced="grouped")
)
