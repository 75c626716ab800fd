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
MATRICES: tuple[Matrix, ...] = ("gate_up", "down")


class LoraPiece(NamedTuple):
    """One low-rank update, of O output features of one matrix of every expert.

    Expert e's rank-many rows are `offsets[e] : offsets[e + 1]` of both factors; its update of the
    weight is `scaling * b[rows].T @ a[rows]`, added to output features `start`, `start + step`, ...

    Attributes:
        matrix: the base matrix that is updated.
        start: first output feature of the update.
        a_RI: (R, in-features of the matrix), rows ordered by expert.
        b_RO: (R, O), rows ordered by expert.
        offsets: E + 1 whole numbers, rising, from 0 to R.
        scaling: factor on the product.
        step: from one output feature to the next; 2 for half of an interleaved gate and up.
    """

    matrix: Matrix
    start: int
    a_RI: Tensor
    b_RO: Tensor
    offsets: tuple[int, ...]
    scaling: float
    step: int = 1

    @property
    def columns(self) -> slice:
        """Output features that the piece adds to."""
        return slice(self.start, self.start + self.step * self.b_RO.shape[1], self.step)

    def spread(self, update_SO: Tensor, width: int) -> Tensor:
        """(S, width): the update in the piece's columns, zero elsewhere."""
        if update_SO.shape[1] == width:
            return update_SO
        if self.step == 1:
            return F.pad(update_SO, (self.start, width - self.columns.stop))
        # Interleaving is padding in an axis of its own.
        return F.pad(update_SO[..., None], (self.start, self.step - 1 - self.start)).flatten(1)

    @property
    def ranks(self) -> list[int]:
        """The rank of each expert."""
        return [end - start for start, end in zip(self.offsets, self.offsets[1:], strict=False)]


# The same matrix of all experts: (E, O, I), or E matrices (O, I) that lie wherever they lie.
Stack = Tensor | Sequence[Tensor]


class Apart(NamedTuple):
    """Gate and up as matrices of their own; side by side they are what is called gate_up."""

    gate: Stack
    up: Stack


@dataclass(frozen=True)
class ExpertWeights:
    """The frozen experts of one block: views of the model's own parameters, never copies.

    A transposed view describes storage that is (E, in-features, out-features). Experts without a
    gate have their only first matrix, (E, I, H), in the place of gate_up.

    Attributes:
        gate_up: (E, G, H), G = 2 * I output features in the order that `apply_gate` expects, in
            most models gate before up.
        down: (E, H, I).
        apply_gate: maps (n, G) to (n, I); for most models `act(gate) * up`.
        is_silu: whether `apply_gate` is exactly `silu(gate) * up` of two halves, whose derivative
            is known.
        gate_up_bias_EG: added to the first matrix's output, or None.
        down_bias_EH: added to the second's, before the routing weight, or None.
        post_norm: what each expert's output goes through before the routing weight, or None.
    """

    gate_up: Stack | Apart
    down: Stack
    apply_gate: Callable[[Tensor], Tensor]
    is_silu: bool
    gate_up_bias_EG: Tensor | None = None
    down_bias_EH: Tensor | None = None
    post_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def gate_up_EGH(self) -> Tensor:  # noqa: N802
        """The first matrices in one tensor, where they are (see `is_fused`)."""
        assert isinstance(self.gate_up, Tensor)
        return self.gate_up

    @property
    def down_EHI(self) -> Tensor:  # noqa: N802
        """The second matrices in one tensor, where they are."""
        assert isinstance(self.down, Tensor)
        return self.down

    @property
    def is_fused(self) -> bool:
        """Whether each matrix of all experts is one tensor."""
        return isinstance(self.gate_up, Tensor) and isinstance(self.down, Tensor)

    @property
    def is_stacked(self) -> bool:
        """The same, but gate and up may be two tensors."""
        return all(isinstance(s, Tensor) for m in MATRICES for s in self.stacks(m))

    @property
    def sample(self) -> Tensor:
        """One expert's down matrix (H, I), for dtype and device."""
        return self.down[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.down)

    @property
    def width(self) -> int:
        """I, the in-features of down."""
        return self.sample.shape[1]

    def stacks(self, matrix: Matrix) -> tuple[Stack, ...]:
        """The tensors or lists that side by side make up a matrix: one, or gate and up."""
        if matrix == "down":
            return (self.down,)
        return tuple(self.gate_up) if isinstance(self.gate_up, Apart) else (self.gate_up,)

    def bias(self, matrix: Matrix) -> Tensor | None:
        """(E, out-features), or None."""
        return self.down_bias_EH if matrix == "down" else self.gate_up_bias_EG

    def out_features(self, matrix: Matrix) -> int:
        """Output features of one expert's matrix."""
        return sum(stack[0].shape[0] for stack in self.stacks(matrix))

    def in_features(self, matrix: Matrix) -> int:
        """Input features of one expert's matrix."""
        return self.stacks(matrix)[0][0].shape[1]

    def linear(self, matrix: Matrix, expert: int, x_nI: Tensor) -> Tensor:
        """One expert's matrix, with its bias if it has one."""
        outs = [F.linear(x_nI, stack[expert]) for stack in self.stacks(matrix)]
        out_nO = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        bias_EO = self.bias(matrix)
        return out_nO if bias_EO is None else out_nO + bias_EO[expert]

    def finish(self, y_nH: Tensor) -> Tensor:
        """What is done to an expert's output before the routing weight."""
        return y_nH if self.post_norm is None else self.post_norm(y_nH)

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

    @property
    def expert_S(self) -> Tensor:  # noqa: N802
        """The expert of each sorted row."""
        row_S = torch.arange(self.order_S.numel(), device=self.order_S.device)
        return torch.searchsorted(self.counts_E.cumsum(0), row_S, right=True)

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
    for matrix in MATRICES:
        if probability > 0 and matrix in widths:
            ones = torch.ones(num_rows, widths[matrix], dtype=like.dtype, device=like.device)
            masks.append(F.dropout(ones, probability))
        else:
            masks.append(None)
    return DropoutMasks(*masks)
