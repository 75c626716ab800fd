"""FP8: e4m3 numbers with a scale for each tile of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 have it.

The checkpoints call the scale `weight_scale_inv`; it multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.storage.packed import PackedFormat, Parts, register_format

TILE = 128
LARGEST = 448.0  # of e4m3


class Fp8(PackedFormat):
    """Matrices of any shape; the last tiles of a row or column may be cut off."""

    name = "fp8"
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
        scale_OI = _spread(parts["scale"].float(), *out_OI.shape)
        return out_OI.copy_(parts["codes"].float().mul_(scale_OI))

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, inputs = parts["codes"].shape
        return outputs, inputs


def _spread(scale_PQ: Tensor, outputs: int, inputs: int) -> Tensor:
    wide = scale_PQ.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return wide[:outputs, :inputs]


register_format(Fp8())
