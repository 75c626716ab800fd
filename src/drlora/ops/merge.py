"""Low-rank updates added into the frozen weights themselves, and what rounding makes of them.

A weight in 16 bits has a last bit that an update may be smaller than. The nearest number is then
the old weight, and the update is gone; over all entries that is a bias towards no update at all.
Stochastic rounding takes the one neighbour or the other with the probability at which the mean is
exact, so what the entries of an update do together is kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drlora.ops.parts import LoraPiece
from drlora.ops.weights import ExpertWeights

RoundingMode = Literal["nearest", "stochastic"]
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rounding:
    """How a sum is brought to the dtype that weights are stored in.

    Attributes:
        mode: `nearest`, or `stochastic` for 16-bit weights; wider ones are always rounded to the
            nearest.
        seed: of the draws. They depend on it and on the weight's place alone, so the same export
            made twice, or on another device, is the same.
    """

    mode: RoundingMode = "nearest"
    seed: int = 0

    def __call__(self, exact: Tensor, dtype: torch.dtype, place: str) -> Tensor:
        """`exact` (float64 or float32, any shape) in `dtype`; `place` names the weight."""
        nearest = exact.to(dtype)
        if self.mode == "nearest" or dtype not in _SIXTEEN_BIT:
            return nearest
        generator = torch.Generator().manual_seed(self._seed_of(place))
        if dtype == torch.bfloat16:
            rounded = _stochastic_bfloat16(exact, generator)
        else:
            rounded = _stochastic(exact, nearest, generator)
        return torch.where(rounded.isfinite(), rounded, nearest)

    def _seed_of(self, place: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{place}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


def _stochastic_bfloat16(exact: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 is the upper half of float32: a random lower half is added, and what is left cut.

    Drawn on the CPU, as everything here, to be the same on any device.
    """
    draws = torch.empty(exact.shape, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    bits = exact.float().view(torch.int32) + draws.to(exact.device)
    return bits.bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)


def _stochastic(exact: Tensor, nearest: Tensor, generator: torch.Generator) -> Tensor:
    """Of any 16-bit dtype: the other neighbour with the probability that is the error's share."""
    draws = torch.rand(exact.shape, generator=generator).to(exact.device)
    error = exact - nearest.to(exact.dtype)
    other = _neighbour(nearest, error)
    gap = (other.to(exact.dtype) - nearest.to(exact.dtype)).abs()
    return torch.where(draws * gap < error.abs(), other, nearest)


NEAREST = Rounding()


def _neighbour(value: Tensor, direction: Tensor) -> Tensor:
    """The next 16-bit number after `value` towards the sign of `direction`; itself where that is 0.

    As whole numbers, the magnitudes of floating-point numbers are in order.
    """
    bits = value.view(torch.int16)
    outwards = (direction > 0) == (bits >= 0)
    stepped = torch.where(outwards, bits + 1, bits - 1)
    crossing = (bits & 0x7FFF == 0) & ~outwards  # from a zero to the smallest of the other sign
    smallest = torch.where(direction > 0, 1, -0x7FFF).to(torch.int16)
    stepped = torch.where(crossing, smallest, stepped)
    return torch.where(direction == 0, bits, stepped).view(value.dtype)


def exact_device(tensor: Tensor) -> torch.device:
    """Where sums of `tensor` can be had in float64: its own device, but for MPS."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def is_finite(piece: LoraPiece) -> bool:
    """Whether both factors are free of NaN and infinities."""
    return bool(torch.isfinite(piece.a_RI).all() and torch.isfinite(piece.b_RO).all())


def add_update(
    base: ExpertWeights, piece: LoraPiece, rounding: Rounding = NEAREST, name: str = ""
) -> None:
    """weight[e] += scaling * B_e A_e, in float64 and then rounded, one expert at a time.

    Args:
        base: the weights, changed in place.
        piece: the update.
        rounding: to the weights' dtype. Entries that are not updated stay, since they are numbers
            of that dtype already.
        name: of the experts module, for the draws.

    Raises:
        ConfigError: if the weights are stored in a form that cannot be changed.
    """
    matrix = base.matrix(piece.matrix)
    for expert, rank in enumerate(piece.ranks):
        if rank:
            stored_OI = matrix.read(expert)
            device = exact_device(stored_OI)
            merged_OI = stored_OI.detach().to(device, torch.float64, copy=True)
            b_Or, a_rI = piece.b_RO[piece.rows(expert)].T, piece.a_RI[piece.rows(expert)]
            update_OI = b_Or.to(device, torch.float64) @ a_rI.to(device, torch.float64)
            merged_OI[piece.columns] += update_OI * piece.scaling
            name_of_draws = place(name, piece.matrix, expert)
            matrix.write(expert, rounding(merged_OI, matrix.dtype, name_of_draws))


def place(name: str, matrix: str, expert: int) -> str:
    """What the draws of one expert's matrix depend on."""
    return f"{name}.{expert}.{matrix}"
