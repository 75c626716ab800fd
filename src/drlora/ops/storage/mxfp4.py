"""MXFP4: four bits a number (e2m1) and a power of two for each 32, as GPT-OSS checkpoints have it.

Source: OCP Microscaling Formats (MX) specification 1.0. The even column of two lies in the LOW half
of a byte; the scale s stands for 2 ** (s - 127).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from drlora.ops.storage.four_bits import FourBits, codes_between
from drlora.ops.storage.matrix import Coded
from drlora.ops.storage.packed import BlockFormat, Parts, register_format

BLOCK = 32
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, LARGEST_EXPONENT = 127, 2  # of the scale; of the largest number, 6 = 1.5 * 2 ** 2


class Mxfp4(BlockFormat):
    """Rows of I numbers, I a multiple of 32: blocks (O, I / 32, 16) and scales (O, I / 32)."""

    name = "mxfp4"
    bits = 4 + 8 / BLOCK
    block = BLOCK
    says = "they are stored in 4 bits (MXFP4), in which an update would be rounded away"

    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        blocks_BN = w_OI.contiguous().view(-1, BLOCK).float()
        absmax_B = blocks_BN.abs().amax(dim=1).clamp(min=2.0**-120)
        exponent_B = absmax_B.log2().floor() - LARGEST_EXPONENT
        scaled_BN = blocks_BN / torch.exp2(exponent_B)[:, None]
        codes_BN = codes_between(scaled_BN.abs(), _BOUNDS)
        codes_BN |= (scaled_BN < 0).view(torch.uint8) << 3
        outputs, inputs = w_OI.shape
        pairs = codes_BN.view(-1, 2)
        packed = (pairs[:, 1] << 4) | pairs[:, 0]
        scales = (exponent_B + BIAS).to(torch.uint8)
        return {
            "blocks": packed.view(outputs, inputs // BLOCK, BLOCK // 2),
            "scales": scales.view(outputs, inputs // BLOCK),
        }

    def coded(self, parts: Parts) -> Coded:
        blocks, scales = parts["blocks"], parts["scales"]
        table = _table(blocks.device)
        scale_EOB = torch.exp2(scales.float() - BIAS)
        shape = (scales.shape[1], scales.shape[2] * BLOCK)
        return Coded(blocks, 4, False, table, scale_EOB, 1, BLOCK, shape)

    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        scale_B1 = torch.exp2(parts["scales"].view(-1, 1).float() - BIAS)
        return _NUMBERS.read(parts["blocks"], scale_B1, out_OI)

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, blocks = parts["scales"].shape
        return outputs, blocks * BLOCK


# Half way between neighbours.
_BOUNDS = tuple((low + high) / 2 for low, high in pairwise(CODES))
# Powers of two times such codes are numbers of bfloat16.
_NUMBERS = FourBits([*CODES, *(-c for c in CODES)], is_high_first=False, in_bfloat16=True)


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(_NUMBERS.codes, device=device)


register_format(Mxfp4())
