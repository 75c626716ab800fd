"""FP8: e4m3 numbers with a scale for each tile of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 have it.

The checkpoints call the scale `weight_scale_inv`; it multiplies.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from drlora.ops.scratch import scratch
from drlora.ops.storage.matrix import Coded
from drlora.ops.storage.packed import PackedFormat, Parts, register_format, row_tiles

TILE = 128
LARGEST = 448.0  # of e4m3


class Fp8(PackedFormat):
    """Matrices of any shape; the last tiles of a row or column may be cut off."""

    name = "fp8"
    bits = 8.0
    says = "they are stored in 8 bits (FP8), in which an update would be rounded away"

    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        outputs, inputs = w_OI.shape
        wide_OI = w_OI.float()
        padded = torch.nn.functional.pad(wide_OI, (0, -inputs % TILE, 0, -outputs % TILE))
        tiles = padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))
        scale_PQ = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-12) / LARGEST
        codes_OI = wide_OI / _spread(scale_PQ, outputs, inputs)
        return {"codes": codes_OI.to(torch.float8_e4m3fn), "scale": scale_PQ}

    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        codes_OI, inputs = parts["codes"], out_OI.shape[1]
        scale_PI = parts["scale"].float().repeat_interleave(TILE, 1)[:, :inputs]
        for rows, wide_nI in row_tiles(out_OI, TILE):
            _look_up(codes_OI[rows], wide_nI)
            for first in range(0, len(wide_nI), TILE):
                wide_nI[first : first + TILE].mul_(scale_PI[(rows.start + first) // TILE])
            out_OI[rows].copy_(wide_nI)
        return out_OI

    def coded(self, parts: Parts) -> Coded:
        codes_EOI = parts["codes"]
        shape = (codes_EOI.shape[1], codes_EOI.shape[2])
        scale_EPQ, table = parts["scale"].float(), _codes(codes_EOI.device)
        return Coded(codes_EOI.view(torch.uint8), 8, True, table, scale_EPQ, TILE, TILE, shape)

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, inputs = parts["codes"].shape
        return outputs, inputs


def _look_up(codes_nI: Tensor, wide_nI: Tensor) -> None:
    """Fill `wide_nI`, two numbers a look into a table; torch's own conversion takes longer."""
    flat = codes_nI.contiguous().view(torch.uint8).view(-1)
    if len(flat) % 2:
        wide_nI.copy_(codes_nI)
        return
    index = scratch("index", 1, len(flat) // 2, torch.int32, flat.device)[0]
    index.copy_(flat.view(torch.uint16))
    pairs = wide_nI.view(-1).view(torch.int64)
    torch.index_select(_pairs(flat.device), 0, index, out=pairs)


@cache
def _codes(device: torch.device) -> Tensor:
    """(256,) float32: the number of each byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(65536,) int64: the two float32 numbers of two bytes, the first in the low one."""
    code = _codes(torch.device("cpu"))
    both = torch.arange(65536)
    return (
        torch.stack([code[both & 255], code[both >> 8]], dim=1).view(torch.int64)[:, 0].to(device)
    )


def _spread(scale_PQ: Tensor, outputs: int, inputs: int) -> Tensor:
    wide = scale_PQ.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return wide[:outputs, :inputs]


register_format(Fp8())
