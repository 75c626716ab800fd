"""Moments that bitsandbytes keeps in 8 bits: read as numbers, changed, and written back.

Its optimizers call a parameter's moments `state1` and `state2`. In 8 bits each is codes of the
parameter's shape, a table and a largest number for each 256 of them in the order of memory. What is
written back is rounded to the same codes, so numbers that were not changed stay as they are as long
as the largest of their 256 does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
FIRST, SECOND = "state1", "state2"


def has_eight_bits(state: dict[str, Any]) -> bool:
    """Whether a parameter's moments are of 8 bits.

    bitsandbytes rounds a moment of zero to the table's neighbour of it now and then, where it
    shares 256 numbers with others, so rows that nobody owns move by a little.
    """
    return _is_eight_bits(state, FIRST)


def _is_eight_bits(state: dict[str, Any], name: str) -> bool:
    codes = state.get(name)
    return isinstance(codes, Tensor) and codes.dtype == torch.uint8 and f"qmap{name[-1]}" in state


@contextmanager
def numbers_of(state: dict[str, Any], name: str) -> Iterator[Tensor | None]:
    """A moment as float32 numbers of the parameter's shape, to be changed in place.

    Args:
        state: the optimizer's state of one parameter.
        name: `state1` or `state2`.

    Yields:
        The numbers; None where the optimizer keeps no such moment, or no 8 bits of it.
    """
    codes: Any = state.get(name)
    number = name[-1]
    if not _is_eight_bits(state, name):
        yield codes if isinstance(codes, Tensor) and codes.is_floating_point() else None
        return
    table, largest_C = state[f"qmap{number}"], state[f"absmax{number}"]
    scale_N = largest_C.repeat_interleave(BLOCK)[: codes.numel()]
    numbers = (table[codes.flatten().int()] * scale_N).view(codes.shape)
    yield numbers
    flat = torch.nn.functional.pad(numbers.flatten(), (0, -codes.numel() % BLOCK))
    blocks_CN = flat.view(-1, BLOCK)
    largest_C.copy_(blocks_CN.abs().amax(dim=1))
    scaled_CN = blocks_CN / largest_C.clamp(min=1e-38)[:, None]
    # The nearest entry of the table, which is sorted and has zero in it. bitsandbytes' own function
    # takes the neighbour of zero now and then on a CPU (0.50.2), and free rows would move.
    nearest = torch.bucketize(scaled_CN, (table[1:] + table[:-1]) / 2)
    codes.copy_(nearest.flatten()[: codes.numel()].view_as(codes))
