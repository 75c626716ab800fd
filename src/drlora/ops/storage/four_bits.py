"""Numbers of four bits, two in a byte: four of them at each look into a table of all two bytes.

A look costs as much whether it finds one number or four. On a CPU numbers are read in tiles that
its cache holds until they are multiplied by their scales and rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from drlora.ops.scratch import scratch
from drlora.ops.storage.packed import TILE  # a multiple of every block

UNDECIDED = 255
# A type as large as four numbers, to move them at once.
_FOUR = {torch.float32: torch.complex128, torch.bfloat16: torch.int64}


class FourBits:
    """What 16 codes stand for.

    Args:
        codes: 16 numbers.
        is_high_first: whether the high half of a byte is the first of its two.
        in_bfloat16: whether the codes and all scales are bfloat16 numbers too, so that their
            products may be computed there.
    """

    def __init__(
        self, codes: Sequence[float], is_high_first: bool, in_bfloat16: bool = False
    ) -> None:
        self.codes, self.is_high_first = tuple(codes), is_high_first
        self.dtypes = [torch.float32, *[torch.bfloat16] * in_bfloat16]
        self._moved: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def read(self, bytes_N: Tensor, scale_B1: Tensor, out_OI: Tensor) -> Tensor:
        """Fill `out_OI` with the numbers, times the scale of their block; each is rounded once.

        Args:
            bytes_N: uint8, in the order of rows, an even number of them; of any shape.
            scale_B1: (blocks, 1) float32.
            out_OI: contiguous, of any float dtype.
        """
        numbers, device = out_OI.numel(), out_OI.device
        block = numbers // len(scale_B1)
        dtype = out_OI.dtype if out_OI.dtype in self.dtypes else torch.float32
        table, scale_B1 = self._table(dtype, device), scale_B1.to(dtype)
        tile = min(TILE, numbers) if device.type == "cpu" else numbers
        index_N = scratch("index", 1, tile // 4, torch.int32, device)[0]
        is_direct = dtype == out_OI.dtype
        wide_N = None if is_direct else scratch("four bits", 1, tile, dtype, device)[0]
        for two_N, scale_b1, out_N in zip(
            bytes_N.view(-1).view(torch.uint16).split(tile // 4),
            scale_B1.split(tile // block),
            out_OI.view(-1).split(tile),
            strict=True,
        ):
            read_N = out_N if wide_N is None else wide_N[: len(out_N)]
            where = index_N[: len(two_N)].copy_(two_N)
            torch.index_select(table, 0, where, out=read_N.view(_FOUR[dtype]))
            read_N.view(-1, block).mul_(scale_b1)
            if wide_N is not None:
                out_N.copy_(read_N)
        return out_OI

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (dtype, device) not in self._moved:
            four = self._numbers.to(dtype).contiguous().view(_FOUR[dtype])[:, 0]
            self._moved[dtype, device] = four.to(device)
        return self._moved[dtype, device]

    @cached_property
    def _numbers(self) -> Tensor:
        """(65536, 4) float32: the first byte is the low one of two."""
        code, both = torch.tensor(self.codes), torch.arange(2**16)
        halves = []
        for byte in (both & 255, both >> 8):
            pair = [code[byte >> 4], code[byte & 15]]
            halves += pair if self.is_high_first else pair[::-1]
        return torch.stack(halves, dim=1)


def codes_between(numbers_BN: Tensor, bounds: tuple[float, ...]) -> Tensor:
    """uint8: how many of the bounds lie below each number.

    The high 16 bits of a number tell, but for the few that share them with a bound: those are
    compared with all bounds. A look into a table costs less than 15 comparisons.

    Args:
        numbers_BN: float32, contiguous.
        bounds: ascending, at most 254.
    """
    numbers_N = numbers_BN.view(-1)
    codes_N = torch.empty(len(numbers_N), dtype=torch.uint8, device=numbers_N.device)
    table, all_bounds = _by_high_bits(bounds, numbers_N.device)
    tile = min(TILE, len(numbers_N)) if numbers_N.device.type == "cpu" else len(numbers_N)
    index_N = scratch("index", 1, tile, torch.int32, numbers_N.device)[0]
    for numbers_n, codes_n in zip(numbers_N.split(tile), codes_N.split(tile), strict=True):
        index_n = index_N[: len(numbers_n)].copy_(numbers_n.view(torch.uint16)[1::2])
        torch.index_select(table, 0, index_n, out=codes_n)
        near = torch.nonzero(codes_n == UNDECIDED)[:, 0]
        codes_n[near] = (numbers_n[near, None] > all_bounds).sum(dim=1).to(torch.uint8)
    return codes_N.view(numbers_BN.shape)


@cache
def _by_high_bits(bounds: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(65536,) uint8 code of all numbers with such high bits, or UNDECIDED; and the bounds."""
    high, all_bounds = torch.arange(2**16, dtype=torch.int32) << 16, torch.tensor(bounds)
    least, most = (
        (bits.view(torch.float32)[:, None] > all_bounds).sum(dim=1)
        for bits in (high, high | 0xFFFF)
    )
    table = torch.where(least == most, least, UNDECIDED).to(torch.uint8)
    return table.to(device), all_bounds.to(device)
