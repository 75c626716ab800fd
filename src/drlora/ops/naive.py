"""The definition: every other engine must agree with this one, output and every gradient.

For each expert, in plain autograd:

    h = apply_gate(W_gu x + s B_gu A_gu x)        y = W_down h + s B_down A_down h

(with a bias where the model has one, and y through its norm where the model has that), and the
token's output is the routing-weighted sum of its experts' y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.engine import Engine, register_engine
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing
from drlora.ops.weights import ExpertWeights, Matrix


def experts_naive(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    masks: DropoutMasks,
) -> Tensor:
    """(T, H) output of the adapted experts; see `drlora.ops.adapted_experts`."""
    out_TH = torch.zeros_like(x_TH)
    weight_S = weight_TK.reshape(-1)[routing.order_S]
    start = 0
    for expert, count in enumerate(routing.counts()):
        rows, start = slice(start, start + count), start + count
        if not count:
            continue
        token_n = routing.token_S[rows]
        x_nH = x_TH[token_n]
        gate_up_nG = base.linear("gate_up", expert, x_nH) + _lora(
            "gate_up", x_nH, expert, rows, base.out_features("gate_up"), pieces, masks.gate_up_SH
        )
        h_nI = base.apply_gate(gate_up_nG)
        y_nH = base.linear("down", expert, h_nI) + _lora(
            "down", h_nI, expert, rows, base.out_features("down"), pieces, masks.down_SI
        )
        y_nH = base.finish(y_nH)
        out_TH = out_TH.index_add(0, token_n, (y_nH * weight_S[rows, None]).to(out_TH.dtype))
    return out_TH


def _lora(
    matrix: Matrix,
    x_nI: Tensor,
    expert: int,
    rows: slice,
    out_features: int,
    pieces: list[LoraPiece],
    mask_SI: Tensor | None,
) -> Tensor:
    total_nO = x_nI.new_zeros(x_nI.shape[0], out_features)
    if mask_SI is not None:
        x_nI = x_nI * mask_SI[rows]
    for piece in pieces:
        if piece.matrix != matrix:
            continue
        ranks = piece.rows(expert)
        update_nO = x_nI @ piece.a_RI[ranks].T @ piece.b_RO[ranks] * piece.scaling
        total_nO[:, piece.columns] = total_nO[:, piece.columns] + update_nO
    return total_nO


register_engine(Engine("naive", experts_naive, stand_ins=()))
