"""What every engine is given beside the frozen experts and the routing: LoRA pieces, dropout masks.

Shape letters: T tokens, K experts per token, S = T * K routed rows, E experts, H hidden size,
I expert width, R rows of a packed pool, n rows of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from drlora.ops.weights import MATRICES, Matrix


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

    def rows(self, expert: int) -> slice:
        """The expert's rows of both factors."""
        return slice(self.offsets[expert], self.offsets[expert + 1])

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
