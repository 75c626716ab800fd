"""What an adapter adds to each weight, as low-rank factors, expert by expert.

    W_e <- W_e + B_e A_e        A_e (r_e, in-features), B_e (out-features, r_e), scaling inside B_e

The factors know nothing of rank pools, and every format is made from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.ops import LoraPiece
from drlora.ops.weights import Matrix

# Singular values below the largest one times this are lost in float32's own rounding.
_NEGLIGIBLE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Factors:
    """The update of one weight of E experts (or of one linear layer, E = 1).

    Attributes:
        a: for each expert (r_e, in-features), float32.
        b: for each expert (out-features, r_e), float32.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]

    @property
    def ranks(self) -> list[int]:
        """r_e of each expert."""
        return [len(a_rI) for a_rI in self.a]

    @property
    def in_features(self) -> int:
        """Columns of A."""
        return self.a[0].shape[1]

    @property
    def out_features(self) -> int:
        """Rows of B."""
        return self.b[0].shape[0]

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """A as (E, rank, in-features) and B as (E, out-features, rank), filled up with zeros."""
        a_ErI = torch.zeros(len(self.a), rank, self.in_features)
        b_EOr = torch.zeros(len(self.b), self.out_features, rank)
        for expert, (a_rI, b_Or) in enumerate(zip(self.a, self.b, strict=True)):
            a_ErI[expert, : len(a_rI)] = a_rI
            b_EOr[expert, :, : len(a_rI)] = b_Or
        return a_ErI, b_EOr

    def shrunk(self) -> Factors:
        """The same products, each at its numerical rank."""
        pairs = [refactor(a_rI, b_Or) for a_rI, b_Or in zip(self.a, self.b, strict=True)]
        return Factors(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))

    def transposed(self) -> Factors:
        """The update of the transposed weight: W^T <- W^T + A^T B^T."""
        return Factors(tuple(b_Or.T for b_Or in self.b), tuple(a_rI.T for a_rI in self.a))


def expert_factors(adapter: ExpertsAdapter, matrix: Matrix) -> Factors | None:
    """The update of `gate_up` or `down` of one block, or None if no projection is part of it.

    Pools of their own for gate and up become one update of both: their ranks add up, and B is zero
    where a pool has no output.
    """
    width = adapter.block.shape_of(matrix)[1]
    pieces = [piece for piece in adapter.pieces(torch.float32) if piece.matrix == matrix]
    if not pieces:
        return None
    a: list[Tensor] = []
    b: list[Tensor] = []
    wide = [_widened(piece, width) for piece in pieces]
    for expert in range(adapter.block.num_experts):
        spans = [slice(*piece.offsets[expert : expert + 2]) for piece in pieces]
        parts = list(zip(spans, pieces, wide, strict=True))
        a.append(torch.cat([piece.a_RI.detach()[span] for span, piece, _ in parts]).cpu())
        b.append(torch.cat([b_RO[span] for span, _, b_RO in parts]).T.cpu())
    return Factors(tuple(a), tuple(b))


def _widened(piece: LoraPiece, width: int) -> Tensor:
    """(R, width): scaling * B in the piece's output features, zero in the others."""
    wide_RW = torch.zeros(len(piece.b_RO), width, device=piece.b_RO.device)
    wide_RW[:, piece.columns] = piece.b_RO.detach() * piece.scaling
    return wide_RW


def refactor(a_rI: Tensor, b_Or: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product B A with as few rows as it has rank in float32.

    The product itself is never formed: B = Q_B R_B and A^T = Q_A R_A leave an r x r core, whose
    singular values are those of B A. Computed in float64.
    """
    q_b, r_b = torch.linalg.qr(b_Or.double())
    q_a, r_a = torch.linalg.qr(a_rI.double().T)
    u, sigma, v_t = torch.linalg.svd(r_b @ r_a.T)
    largest = sigma[0] if len(sigma) else torch.tensor(0.0)
    rank = int((sigma > largest * _NEGLIGIBLE).sum())
    if rank >= len(a_rI):
        return a_rI, b_Or
    root = sigma[:rank].sqrt()
    smaller_b = q_b @ u[:, :rank] * root
    smaller_a = root[:, None] * v_t[:rank] @ q_a.T
    return smaller_a.float(), smaller_b.float()
