"""Rows and ranks filled up to a few sizes, so that the code of 16-bit products is used again.

oneDNN writes code for each shape of a product in 16 bits, and each expert has another rank, and
another number of rows in each step. So both are filled up to a few sizes, with what counts nothing:

- a row that fills repeats one of its expert's, with a routing weight of zero, and with it every
  gradient that it has is zero; its place in the routing is one past the end, which nobody reads;
- a rank that fills is a zero row of both factors; its gradient is left out.

Two sizes for each doubling of a number leave a sixth to fill, four a twelfth, eight half of that:
more sizes where products are large, and rows that fill cost more than code (`row_sizes`).

Letters as in `parts`, N segments, F rows and P ranks when they are filled up.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from drlora.ops.loop.plan import Plan
from drlora.ops.loop.tasks import Task
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing

LEAST_ROWS = 4  # with fewer it is the reading of the weights that takes the time
LEAST_RANK, RANK_SIZES = 16, 2  # a product's own tiles are as large
# Sizes of rows for each doubling, by the multiply-adds of an expert's product: below the first two.
ROW_SIZES_FROM = (64_000_000, 400_000_000)


def row_sizes(work: float) -> int:
    """Sizes of rows for each doubling, for products of so many multiply-adds in the mean.

    Measured by benchmarks/sixteen_bits.py and, with a skewed load, benchmarks/experts_layer.py.

    >>> [row_sizes(rows * 1024 * 1024) for rows in (32, 256, 2048)]
    [2, 4, 8]
    """
    return 2 << sum(work >= least for least in ROW_SIZES_FROM)


def fill(plan: Plan, masks: DropoutMasks, work: float) -> tuple[Plan, DropoutMasks]:
    """The plan with rows and ranks filled up, and the masks of these rows.

    Args:
        plan: of rows and ranks as they are.
        masks: for its rows.
        work: multiply-adds of an expert's product, in the mean.
    """
    tasks = fill_tasks(plan.tasks, row_sizes(work))
    routing, masks = fill_rows(plan.routing, masks, plan.tasks, tasks)
    filled = [fill_ranks(piece) for piece in plan.pieces]
    pieces, places = [piece for piece, _ in filled], [place_R for _, place_R in filled]
    return plan._replace(pieces=pieces, places=places, routing=routing, tasks=tasks), masks


@cache
def size_of(number: int, least: int, sizes: int) -> int:
    """The smallest size that holds a number: multiples of `least`, `sizes` for each doubling.

    >>> sorted({size_of(n, least=4, sizes=4) for n in range(65)})
    [0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    """
    half = 1 << max(0, (number - 1).bit_length() - 1)  # half < number <= 2 * half
    step = max(least, half // sizes)
    return -(-number // step) * step


def fill_tasks(tasks: list[Task], row_sizes: int) -> list[Task]:
    """The same tasks with the rows of each segment filled up."""
    filled = []
    for task in tasks:
        sizes = [size_of(size, LEAST_ROWS, row_sizes) for size in task.sizes]
        segments = [s._replace(rows=n) for s, n in zip(task.segments, sizes, strict=True)]
        filled.append(Task(task.number, segments, sizes, sum(sizes)))
    return filled


def fill_rows(
    routing: Routing, masks: DropoutMasks, before: list[Task], after: list[Task]
) -> tuple[Routing, DropoutMasks]:
    """The routing of filled tasks.

    A row that fills is the first of its segment once more, but that its `order_S` is T * K, one
    past the end. So what is not finite in a row stays with the experts that the row is routed to.

    Args:
        routing: as it is.
        masks: for its rows.
        before: the tasks of the routing.
        after: the same, filled up.
    """
    device = routing.order_S.device
    rows_N, filled_N = (_rows_of(tasks, device) for tasks in (before, after))
    segment_F = torch.arange(len(rows_N), device=device).repeat_interleave(filled_N)
    inside_F = torch.arange(len(segment_F), device=device)
    inside_F -= (filled_N.cumsum(0) - filled_N)[segment_F]
    fills_F = inside_F >= rows_N[segment_F]
    first_F = (rows_N.cumsum(0) - rows_N)[segment_F]
    source_F = first_F + inside_F.masked_fill(fills_F, 0)
    order_F = routing.order_S[source_F].masked_fill_(fills_F, len(routing.order_S))
    expert_N = torch.tensor([s.expert for task in after for s in task.segments], device=device)
    counts_E = torch.zeros_like(routing.counts_E).index_add_(0, expert_N.long(), filled_N)
    drawn = [None if mask is None else mask[source_F] for mask in masks]
    return Routing(order_F, routing.token_S[source_F], counts_E), DropoutMasks(*drawn)


def _rows_of(tasks: list[Task], device: torch.device) -> Tensor:
    sizes = [size for task in tasks for size in task.sizes]
    return torch.tensor(sizes, dtype=torch.long, device=device)


def fill_ranks(piece: LoraPiece) -> tuple[LoraPiece, Tensor]:
    """The piece with its experts' ranks filled up, in its `offsets` alone; where its rows go."""
    filled = [size_of(rank, LEAST_RANK, RANK_SIZES) for rank in piece.ranks]
    ranks_E, filled_E = torch.tensor(piece.ranks), torch.tensor(filled)
    more_E = filled_E - ranks_E
    moved_E = more_E.cumsum(0) - more_E  # how far each expert's rows move down
    place_R = torch.arange(piece.offsets[-1]) + moved_E.repeat_interleave(ranks_E)
    offsets = (0, *filled_E.cumsum(0).tolist())
    return piece._replace(offsets=offsets), place_R.to(piece.a_RI.device)
