"""Low-rank updates added into the frozen weights themselves."""

from __future__ import annotations

import torch

from drlora.ops.parts import ExpertWeights, LoraPiece


def is_finite(piece: LoraPiece) -> bool:
    """Whether both factors are free of NaN and infinities."""
    return bool(torch.isfinite(piece.a_RI).all() and torch.isfinite(piece.b_RO).all())


def add_update(base: ExpertWeights, piece: LoraPiece) -> None:
    """weight[e] += scaling * B_e A_e, in float32, one expert at a time."""
    stacks = base.stacks(piece.matrix)
    for expert, (start, end) in enumerate(zip(piece.offsets, piece.offsets[1:], strict=False)):
        if start < end:
            targets = [stack[expert].data for stack in stacks]  # gate and up may lie apart
            merged_OI = torch.cat([target.float() for target in targets])
            update_OI = piece.b_RO[start:end].T @ piece.a_RI[start:end] * piece.scaling
            merged_OI[piece.columns] += update_OI
            for target, part_OI in zip(
                targets, merged_OI.split([len(t) for t in targets]), strict=True
            ):
                target.copy_(part_OI)
