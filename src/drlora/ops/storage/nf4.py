"""NF4: four bits a number and a scale for each 64, as bitsandbytes has it (QLoRA, 2305.14314).

Bytes and scales equal those of bitsandbytes for every expert, and so do the numbers read back: the
float32 entry of the table times the float32 scale, rounded once.

Two codes lie in a byte, the first in the high half. Nested, the scales are bytes themselves, with a
scale for each 256 of them and one offset (`nf4-nested`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from drlora.ops.storage.by_bitsandbytes import filler
from drlora.ops.storage.four_bits import FourBits, codes_between
from drlora.ops.storage.matrix import Coded
from drlora.ops.storage.packed import BlockFormat, Parts, register_format

BLOCK, NESTED_BLOCK = 64, 256
# Quantiles of the normal distribution, scaled to [-1, 1]; the values of bitsandbytes in float32.
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Where one code ends and the next begins: those of bitsandbytes' comparisons.
BOUNDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772475, 0.03979014977812767,
    0.12025525420904160, 0.20352124422788620, 0.29201376438140870, 0.38931256532669067,
    0.50166341662406920, 0.64278692007064820, 0.86147838830947880,
)  # fmt: skip


class Nf4(BlockFormat):
    """Rows of I numbers, I a multiple of 64."""

    name = "nf4"
    bits = 4 + 32 / BLOCK
    block = BLOCK
    says = "they are stored in 4 bits (NF4), in which an update would be rounded away"

    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        blocks_BN = w_OI.contiguous().view(-1, BLOCK).float()
        absmax_B = blocks_BN.abs().amax(dim=1)
        scaled_BN = blocks_BN * (1.0 / absmax_B.clamp(min=1e-38))[:, None]
        codes_BN = codes_between(scaled_BN.clamp_(-1, 1), BOUNDS)
        pairs = codes_BN.view(-1, 2)
        outputs, inputs = w_OI.shape
        return {
            "codes": ((pairs[:, 0] << 4) | pairs[:, 1]).view(outputs, inputs // 2),
            "scale": absmax_B.view(outputs, inputs // BLOCK),
        }

    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        return _read(parts["codes"], parts["scale"], out_OI)

    def coded(self, parts: Parts) -> Coded:
        return _coded(parts["codes"], parts["scale"])

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, half = parts["codes"].shape
        return outputs, 2 * half


class NestedNf4(Nf4):
    """The same with scales of eight bits: 4.127 bits a number instead of 4.5."""

    name = "nf4-nested"
    bits = 4 + 8 / BLOCK + 32 / BLOCK / NESTED_BLOCK

    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        found = super().encode(w_OI)
        scale_OB = found.pop("scale")
        offset = scale_OB.mean()
        flat = (scale_OB - offset).flatten()
        short = -len(flat) % NESTED_BLOCK
        blocks_CN = torch.nn.functional.pad(flat, (0, short)).view(-1, NESTED_BLOCK)
        outer_C = blocks_CN.abs().amax(dim=1)
        scaled_CN = blocks_CN / outer_C.clamp(min=1e-38)[:, None]
        table = eight_bits(w_OI.device)
        # The nearest entry of the table, which is sorted.
        codes = torch.bucketize(scaled_CN, (table[1:] + table[:-1]) / 2)
        found["scale_codes"] = codes.to(torch.uint8).flatten()[: len(flat)].view(scale_OB.shape)
        found["scale_scale"], found["scale_offset"] = outer_C, offset[None]
        return found

    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        scale_EOB = _wide_scale({name: part[None] for name, part in parts.items()})
        return _read(parts["codes"], scale_EOB[0], out_OI)

    def coded(self, parts: Parts) -> Coded:
        return _coded(parts["codes"], _wide_scale(parts))


def _wide_scale(parts: Parts) -> Tensor:
    """(E, O, blocks) float32: nested scales as numbers."""
    codes_EOB = parts["scale_codes"]
    flat_EB = codes_EOB.flatten(1)
    inner_EB = eight_bits(codes_EOB.device)[flat_EB.int()]
    outer_EB = parts["scale_scale"].repeat_interleave(NESTED_BLOCK, 1)[:, : flat_EB.shape[1]]
    return (inner_EB * outer_EB + parts["scale_offset"]).view(codes_EOB.shape)


def _coded(codes_EOC: Tensor, scale_EOB: Tensor) -> Coded:
    _, outputs, half = codes_EOC.shape
    table = _codes(codes_EOC.device)
    return Coded(codes_EOC, 4, True, table, scale_EOB, 1, BLOCK, (outputs, 2 * half))


@cache
def _codes(device: torch.device) -> Tensor:
    return torch.tensor(CODES, device=device)


def _read(codes_OC: Tensor, scale_OB: Tensor, out_OI: Tensor) -> Tensor:
    fill = filler(out_OI.dtype, out_OI.device.type)
    if fill is None:
        return read_by_table(codes_OC, scale_OB, out_OI)
    fill(codes_OC, scale_OB, out_OI, BLOCK)
    return out_OI


def read_by_table(codes_OC: Tensor, scale_OB: Tensor, out_OI: Tensor) -> Tensor:
    """Fill `out_OI` with torch alone."""
    return _NUMBERS.read(codes_OC, scale_OB.view(-1, 1), out_OI)


_NUMBERS = FourBits(CODES, is_high_first=True)


@cache
def eight_bits(device: torch.device) -> Tensor:
    """(256,) bitsandbytes' table for numbers in eight bits (dynamic exponent, 1511.04561).

    Powers of ten from 1e-6 to 1, each with twice as many steps as the one before; both signs, 0, 1.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found)).to(device)


register_format(Nf4())
register_format(NestedNf4())
