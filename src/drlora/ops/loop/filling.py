"""Rows and ranks filled up to a few sizes, so that the code of 16-bit products is used again.

oneDNN writes code for each shape of a product in 16 bits, and each expert has another rank, and
another number of rows in each step. So both are filled up to multiples of a unit, with what counts
nothing:

- a row that fills repeats some other row, with a routing weight of zero, and with it every gradient
  that it has is zero; its place in the routing is one past the end, which nobody reads;
- a rank that fills is a zero row of both factors; its gradient is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing

LARGEST_UNIT = 64
LEAST_UNIT = 4  # with so few rows it is the reading of the weights that takes the time
LEAST_RANK_UNIT = 16  # less saves nothing: a product's own tiles are as large


def row_unit(rows: float) -> int:
    """Rows of a unit, for experts that have so many in the mean: a power of two.

    An eighth of the rows, so that about a sixteenth of them fills.

    >>> [row_unit(rows) for rows in (0.5, 7.9, 64, 100, 256, 5000)]
    [4, 4, 8, 8, 32, 64]
    """
    return max(LEAST_UNIT, _power_of_two(rows / 8))


def rank_unit(largest: int) -> int:
    """Ranks of a unit, for experts that have so many at most: a power of two, so four sizes.

    >>> [rank_unit(largest) for largest in (4, 64, 100, 128, 512)]
    [16, 16, 16, 32, 64]
    """
    return max(LEAST_RANK_UNIT, _power_of_two(largest / 4))


def _power_of_two(most: float) -> int:
    unit = 1
    while unit < LARGEST_UNIT and 2 * unit <= most:
        unit *= 2
    return unit


def fill_rows(routing: Routing, masks: DropoutMasks, unit: int) -> tuple[Routing, DropoutMasks]:
    """The same routing with each expert's rows filled up to a multiple of a unit.

    A row that fills is the first of all rows once more, but that its `order_S` is T * K, one past
    the end.
    """
    counts_E = routing.counts_E
    filled_E = _multiples(counts_E, unit)
    expert_F = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(filled_E)
    inside_F = torch.arange(len(expert_F), device=counts_E.device)
    inside_F -= (filled_E.cumsum(0) - filled_E)[expert_F]
    fills_F = inside_F >= counts_E[expert_F]
    source_F = ((counts_E.cumsum(0) - counts_E)[expert_F] + inside_F).masked_fill_(fills_F, 0)
    order_F = routing.order_S[source_F].masked_fill_(fills_F, len(routing.order_S))
    drawn = [None if mask is None else mask[source_F] for mask in masks]
    return Routing(order_F, routing.token_S[source_F], filled_E), DropoutMasks(*drawn)


def fill_ranks(piece: LoraPiece) -> tuple[LoraPiece, Tensor]:
    """The piece with its experts' ranks filled up, in its `offsets` alone; where its rows go."""
    ranks = torch.tensor(piece.ranks)
    filled = _multiples(ranks, rank_unit(max(piece.ranks)))
    moved = (filled - ranks).cumsum(0) - (filled - ranks)  # how far each expert's rows move down
    place_R = torch.arange(piece.offsets[-1]) + moved.repeat_interleave(ranks)
    offsets = (0, *filled.cumsum(0).tolist())
    return piece._replace(offsets=offsets), place_R.to(piece.a_RI.device)


def _multiples(sizes: Tensor, unit: int) -> Tensor:
    return (sizes + unit - 1) // unit * unit
