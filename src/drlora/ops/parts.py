"""What every engine is given: the frozen experts, the LoRA pieces on them, and the sorted routing.

Shape letters: T tokens, K experts per token, S = T * K routed rows, E experts, H hidden size,
I expert width, R rows of a packed pool, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Matrix = Literal["gate_up", "down"]


class LoraPiece(NamedTuple):
    """One low-rank update, of the columns `start : start + O` of one matrix of every expert.

    Expert e's rank-many rows are `offsets[e] : offsets[e + 1]` of both factors; its update of the
    weight is `scaling * b[rows].T @ a[rows]`, added to output features `start : start + O`.

    Attributes:
        matrix: the base matrix that is updated.
        start: first output feature of the update.
        a_RI: (R, in-features of the matrix), rows ordered by expert.
        b_RO: (R, O), rows ordered by expert.
        offsets: E + 1 whole numbers, rising, from 0 to R.
        scaling: factor on the product.
    """

    matrix: Matrix
    start: int
    a_RI: Tensor
    b_RO: Tensor
    offsets: tuple[int, ...]
    scaling: float

    @property
    def columns(self) -> slice:
        """Output features that the piece adds to."""
        return slice(self.start, self.start + self.b_RO.shape[1])


@dataclass(frozen=True)
class ExpertWeights:
    """The frozen experts of one block, in the standard fused layout.

    Attributes:
        gate_up_EGH: (E, 2 * I, H), gate rows before up rows.
        down_EHI: (E, H, I).
        apply_gate: maps (n, 2 * I) to (n, I); for most models `act(gate) * up`.
        is_silu: whether `apply_gate` is exactly `silu(gate) * up`, whose derivative is known.
    """

    gate_up_EGH: Tensor
    down_EHI: Tensor
    apply_gate: Callable[[Tensor], Tensor]
    is_silu: bool

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up_EGH.shape[0]

    def gate_backward(self, gate_up_nG: Tensor, grad_nI: Tensor) -> Tensor:
        """(n, 2 * I) gradient of `apply_gate` at `gate_up_nG`, given that of its output."""
        if self.is_silu:
            gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
            grad_gate_nI = torch.ops.aten.silu_backward(grad_nI * up_nI, gate_nI)
            return torch.cat([grad_gate_nI, grad_nI * F.silu(gate_nI)], dim=-1)
        with torch.enable_grad():
            leaf = gate_up_nG.detach().requires_grad_()
            return torch.autograd.grad(self.apply_gate(leaf), leaf, grad_nI)[0]


class Routing(NamedTuple):
    """Routed rows sorted by expert.

    Attributes:
        order_S: position of each sorted row in the flattened (T * K) routing.
        token_S: the token of each sorted row.
        counts_E: rows of each expert, on the routing's device.
    """

    order_S: Tensor
    token_S: Tensor
    counts_E: Tensor

    def ends(self) -> list[int]:
        """Where each expert's rows end, on the host (a synchronisation on an accelerator)."""
        return self.counts_E.cumsum(0).tolist()


def sort_by_expert(index_TK: Tensor, num_experts: int) -> Routing:
    """Sort the routed rows by expert, keeping token order inside an expert."""
    flat_S = index_TK.reshape(-1)
    sorted_S, order_S = torch.sort(flat_S, stable=True)
    bounds_E = torch.arange(num_experts, device=flat_S.device, dtype=flat_S.dtype)
    ends_E = torch.searchsorted(sorted_S, bounds_E, right=True)
    counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    return Routing(order_S, order_S // index_TK.shape[-1], counts_E)


class DropoutMasks(NamedTuple):
    """Factors on the adapter's inputs (0 or 1 / (1 - p)), rows in sorted order, or None."""

    gate_up_SH: Tensor | None
    down_SI: Tensor | None


def draw_dropout(
    pieces: list[LoraPiece], num_rows: int, probability: float, like: Tensor
) -> DropoutMasks:
    """Dropout masks for the adapter inputs; all engines draw the same ones from the same seed."""
    widths = {piece.matrix: piece.a_RI.shape[1] for piece in pieces}
    masks: list[Tensor | None] = []
    for matrix in ("gate_up", "down"):
        if probability > 0 and matrix in widths:
            ones = torch.ones(num_rows, widths[matrix], dtype=like.dtype, device=like.device)
            masks.append(F.dropout(ones, probability))
        else:
            masks.append(None)
    return DropoutMasks(*masks)
