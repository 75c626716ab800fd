"""The rows of a parameter that this process holds, however its engine has laid them out.

    ordinary        all rows
    FSDP2           neighbouring rows: the local shard of a DTensor
    DeepSpeed ZeRO  a run of elements, cut off anywhere, also inside of a row; what is trained is a
                    float32 copy of it, in a flat tensor with parts of other parameters (zero)

All are blocks: neighbouring rows in full or in some of their columns. What an optimizer keeps of a
parameter (its moments) lies as the tensor that it trains does, so one block finds rows in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from drlora.distributed.zero import (
    Part,
    is_partitioned,
    part_of,
    shape_of,
    stored_parts,
    weights_of,
)


class HeldRows(NamedTuple):
    """The part of some rows of a parameter that a block holds.

    Attributes:
        chosen: which of the asked-for rows these are, as an index into them.
        local: their row numbers in the block.
    """

    chosen: Tensor
    local: Tensor


class Block(NamedTuple):
    """Neighbouring rows of a parameter, or some columns of them, that this process holds.

    Attributes:
        first, end: the rows `first` to `end - 1`.
        columns: which of their elements.
        place: where they lie in a flat tensor; None for those of a tensor with rows.
    """

    first: int
    end: int
    columns: slice = slice(None)
    place: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """(rows, columns) of a tensor that is laid out as the trained one is; the same memory."""
        if self.place is None:
            return local_part(tensor)
        return tensor[self.place].view(self.end - self.first, -1)

    def held(self, rows: Tensor) -> HeldRows:
        """Those of `rows` that are in it."""
        chosen = ((rows >= self.first) & (rows < self.end)).nonzero().squeeze(1)
        return HeldRows(chosen, rows[chosen] - self.first)

    def span(self, rows: range) -> tuple[slice, slice]:
        """Those of neighbouring rows that are in it: as a slice of the block, and of `rows`."""
        start = max(rows.start, self.first)
        stop = max(start, min(rows.stop, self.end))
        return slice(start - self.first, stop - self.first), slice(
            start - rows.start, stop - rows.start
        )


def blocks_of(parameter: Tensor) -> list[Block]:
    """What this process holds of the tensor that is trained for a parameter; none, if nothing."""
    if is_partitioned(parameter):
        return _cut(part_of(parameter), row_width(parameter))
    if not isinstance(parameter, DTensor):
        return [Block(0, parameter.shape[0])]
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return [Block(offset[0], offset[0] + shape[0])]


def trained_tensor(parameter: Tensor) -> Tensor | None:
    """The tensor that the optimizer has in the place of a parameter: nearly always itself.

    Under ZeRO a flat tensor; None where this process trains nothing of the parameter.
    """
    if not is_partitioned(parameter):
        return parameter
    part = part_of(parameter)
    return None if part is None else part.flat


def row_width(parameter: Tensor) -> int:
    """Elements in one row."""
    return math.prod(shape_of(parameter)[1:])


@torch.no_grad()
def write_rows(parameter: Tensor, rows: Tensor, values_NI: Tensor | float) -> None:
    """Write rows wherever they are kept: as trained, and in each copy that is computed with.

    Args:
        parameter: (R, anything), as the engine has left it.
        rows: (N,) int64, none of them twice.
        values_NI: one number, or (N, anything), the same in all processes.
    """
    for block, target in _copies(parameter):
        held, into = block.held(rows), block.of(target)
        if isinstance(values_NI, Tensor):
            new_NI = values_NI.to(into)[held.chosen.to(into.device)]
            into[held.local.to(into.device)] = new_NI[:, block.columns]
        else:
            into[held.local.to(into.device)] = values_NI


def whole(parameter: Tensor, kept: Tensor | None) -> Tensor:
    """All of what is kept of a parameter: its weights, a gradient or a moment. A collective.

    Args:
        parameter: as the engine has left it.
        kept: laid out as the trained tensor is (see `trained_tensor`), which it may be itself;
            None under ZeRO where this process has nothing of it.
    """
    if not is_partitioned(parameter):
        assert kept is not None
        return kept.full_tensor() if isinstance(kept, DTensor) else kept
    return _brought_together(parameter, kept, part_of(parameter))


@torch.no_grad()
def whole_weights(parameter: Tensor) -> Tensor:
    """All weights of a parameter; the float32 ones where ZeRO trains it. A collective if split."""
    if not is_partitioned(parameter):
        return whole(parameter, parameter)
    part = weights_of(parameter)
    return _brought_together(parameter, None if part is None else part.flat, part)


def add_up_rows(parameter: Tensor, sums: Tensor) -> None:
    """Replace sums over the rows held here by those over all rows of the parameter."""
    if is_partitioned(parameter):
        dist.all_reduce(sums)
    elif isinstance(parameter, DTensor):
        # Over the processes that share the rows out; those with the same rows (HSDP) add nothing.
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_shard():
                dist.all_reduce(sums, group=parameter.device_mesh.get_group(dimension))


def local_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or the local shard of a DTensor (same storage)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(parameter: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Every tensor that has rows of the parameter, and what of them."""
    if not is_partitioned(parameter):
        (block,) = blocks_of(parameter)
        yield block, parameter
        return
    for part in stored_parts(parameter):
        for block in _cut(part, row_width(parameter)):
            yield block, part.flat


def _brought_together(parameter: Tensor, kept: Tensor | None, part: Part | None) -> Tensor:
    shape = shape_of(parameter)
    whole_RI = torch.zeros(shape, device=parameter.device, dtype=torch.float32)
    rows_RI = whole_RI.view(shape[0], -1) if shape else whole_RI.view(1, 1)
    for block in _cut(part, row_width(parameter)):
        assert kept is not None
        rows_RI[block.first : block.end, block.columns] = block.of(kept).to(whole_RI)
    dist.all_reduce(whole_RI)
    return whole_RI


def _cut(part: Part | None, width: int) -> list[Block]:
    """A part as blocks: the end of a row, full rows, the beginning of one.

    >>> part = Part(torch.zeros(20), offset=10, size=6, start=3)
    >>> [(block.first, block.end, block.columns, block.place) for block in _cut(part, width=4)]
    [(0, 1, slice(3, 4, None), slice(10, 11, None)), (1, 2, slice(0, 4, None), \
slice(11, 15, None)), (2, 3, slice(0, 1, None), slice(15, 16, None))]
    """
    if part is None:
        return []
    blocks, at, stop = [], part.start, part.start + part.size
    while at < stop:
        row, column = divmod(at, width)
        full = 0 if column else (stop - at) // width
        end = at + full * width if full else min(stop, (row + 1) * width)
        columns = slice(0, width) if full else slice(column, column + end - at)
        place = slice(part.offset + at - part.start, part.offset + end - part.start)
        blocks.append(Block(row, row + max(full, 1), columns, place))
        at = end
    return blocks
