"""Moments that bitsandbytes keeps in 8 bits: read as numbers, changed, and written back.

Its optimizers call a parameter's moments `state1` and `state2`. In 8 bits each is codes of the
parameter's shape, a table and a largest number for each 256 of them in the order of memory. What is
written back is rounded to the same codes, so numbers that were not changed stay as they are as long
as the largest of their 256 does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
FIRST, SECOND = "state1", "state2"


@contextmanager
def numbers_of(state: dict[str, Any], name: str) -> Iterator[Tensor | None]:
    """A moment as float32 numbers of the parameter's shape, to be changed in place.

    Args:
        state: the optimizer's state of one parameter.
        name: `state1` or `state2`.

    Yields:
        The numbers; None where the optimizer keeps no such moment, or no 8 bits of it.
    """
    codes, number = state.get(name), name[-1]
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or f"qmap{number}" not in state:
        yield codes if isinstance(codes, Tensor) and codes.is_floating_point() else None
        return
    functional: Any = import_module("bitsandbytes.functional")
    table, largest = state[f"qmap{number}"], state[f"absmax{number}"]
    numbers = functional.dequantize_blockwise(
        codes, absmax=largest, code=table, blocksize=BLOCK
    ).float()
    yield numbers
    found, made = functional.quantize_blockwise(numbers, code=table, blocksize=BLOCK)
    codes.copy_(found.view_as(codes))
    largest.copy_(made.absmax.view_as(largest))
