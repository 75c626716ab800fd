"""Numbers of four bits, two in a byte: four of them at each look into a table of all two bytes.

A look costs as much whether it finds one number or four. On a CPU numbers are read in tiles that
its cache holds until they are multiplied by their scales and rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from drlora.ops.scratch import scratch
from drlora.ops.storage.packed import TILE  # a multiple of every block

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
