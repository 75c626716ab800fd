"""MXFP4: four bits a number (e2m1) and a power of two for each 32, as GPT-OSS checkpoints have it.

Source: OCP Microscaling Formats (MX) specification 1.0. The even column of two lies in the LOW half
of a byte; the scale s stands for 2 ** (s - 127).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from drlora.ops.storage.packed import PackedFormat, Parts, register_format

BLOCK = 32
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, LARGEST_EXPONENT = 127, 2  # of the scale; of the largest number, 6 = 1.5 * 2 ** 2


class Mxfp4(PackedFormat):
    """Rows of I numbers, I a multiple of 32: blocks (O, I / 32, 16) and scales (O, I / 32)."""

    name = "mxfp4"
    bits = 4 + 8 / BLOCK
    says = "they are stored in 4 bits (MXFP4), in which an update would be rounded away"

    def refuses(self, outputs: int, inputs: int) -> str | None:
        if inputs % BLOCK:
            return f"{inputs} numbers a row are no multiple of {BLOCK}, which share a scale"
        return None

    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        blocks_BN = w_OI.contiguous().view(-1, BLOCK).float()
        absmax_B = blocks_BN.abs().amax(dim=1).clamp(min=2.0**-120)
        exponent_B = absmax_B.log2().floor() - LARGEST_EXPONENT
        scaled_BN = blocks_BN / torch.exp2(exponent_B)[:, None]
        table = torch.tensor(CODES, device=w_OI.device)
        codes_BN = torch.bucketize(scaled_BN.abs(), (table[1:] + table[:-1]) / 2)
        codes_BN = (codes_BN + 8 * (scaled_BN < 0)).to(torch.uint8)
        outputs, inputs = w_OI.shape
        pairs = codes_BN.view(-1, 2)
        packed = (pairs[:, 1] << 4) | pairs[:, 0]
        scales = (exponent_B + BIAS).to(torch.uint8)
        return {
            "blocks": packed.view(outputs, inputs // BLOCK, BLOCK // 2),
            "scales": scales.view(outputs, inputs // BLOCK),
        }

    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        index = parts["blocks"].flatten().int()
        wide = torch.empty(out_OI.numel(), device=out_OI.device)
        torch.index_select(_pairs(out_OI.device), 0, index, out=wide.view(torch.int64))
        scale_B1 = torch.exp2(parts["scales"].view(-1, 1).float() - BIAS)
        return out_OI.copy_(wide.view(-1, BLOCK).mul_(scale_B1).view(out_OI.shape))

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, blocks = parts["scales"].shape
        return outputs, blocks * BLOCK


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,) int64: the two float32 numbers of each byte, the low half first."""
    code = torch.tensor([*CODES, *(-c for c in CODES)])
    byte = torch.arange(256)
    return torch.stack([code[byte & 15], code[byte >> 4]], dim=1).view(torch.int64)[:, 0].to(device)


register_format(Mxfp4())
