"""What every engine is given: the frozen experts, the LoRA pieces on them, and the sorted routing.

Shape letters: T tokens, K experts per token, S = T * K routed rows, E experts, H hidden size,
I expert width, R rows of a packed pool, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    @property
    def ranks(self) -> list[int]:
        """The rank of each expert."""
        return [end - start for start, end in zip(self.offsets, self.offsets[1:], strict=False)]


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

    @property
    def width(self) -> int:
        """I, the in-features of down."""
        return self.down_EHI.shape[2]

    def out_features(self, matrix: Matrix) -> int:
        """Output features of one expert's matrix."""
        return self._stack(matrix).shape[1]

    def forward_matrices(self, matrix: Matrix) -> Sequence[Tensor]:
        """E matrices (in-features, out-features), for `x @ W^T`; views, not copies."""
        return self._stack(matrix).transpose(1, 2).unbind()

    def backward_matrices(self, matrix: Matrix) -> Sequence[Tensor]:
        """E matrices (out-features, in-features), for `g @ W`; views, not copies."""
        return self._stack(matrix).unbind()

    def _stack(self, matrix: Matrix) -> Tensor:
        return self.gate_up_EGH if matrix == "gate_up" else self.down_EHI

    def gate_into(self, h_nI: Tensor, gate_up_nG: Tensor) -> Tensor:
        """`apply_gate(gate_up_nG)`, in the given buffer where its form is known."""
        if not self.is_silu:
            return self.apply_gate(gate_up_nG)
        gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
        return torch.ops.aten.silu.out(gate_nI, out=h_nI).mul_(up_nI)

    def gate_again(
        self, h_nI: Tensor, act_nI: Tensor, gate_up_nG: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same for backward: (h, act(gate) if known), in the given buffers."""
        if not self.is_silu:
            return self.apply_gate(gate_up_nG).clone(), None
        gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate_nI, out=act_nI)
        return torch.mul(act_nI, up_nI, out=h_nI), act_nI

    def gate_backward(
        self,
        out_nG: Tensor,
        gate_up_nG: Tensor,
        act_nI: Tensor | None,
        grad_nI: Tensor,
        scratch_nI: Tensor,
    ) -> None:
        """Write the gradient of `apply_gate` at `gate_up_nG`, given that of its output."""
        if act_nI is None:
            with torch.enable_grad():
                leaf = gate_up_nG.detach().requires_grad_()
                out_nG.copy_(torch.autograd.grad(self.apply_gate(leaf), leaf, grad_nI)[0])
            return
        gate_nI, up_nI = gate_up_nG.chunk(2, dim=-1)
        grad_gate_nI, grad_up_nI = out_nG.chunk(2, dim=-1)
        torch.mul(grad_nI, act_nI, out=grad_up_nI)
        torch.mul(grad_nI, up_nI, out=scratch_nI)
        torch.ops.aten.silu_backward.grad_input(scratch_nI, gate_nI, grad_input=grad_gate_nI)


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

    def counts(self) -> list[int]:
        """Rows of each expert, on the host (a synchronisation on an accelerator)."""
        return self.counts_E.tolist()


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
