"""INT8: eight bits a number and one scale a row. Exact in bfloat16, since |code| <= 127."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from drlora.ops.storage.matrix import Coded
from drlora.ops.storage.packed import PackedFormat, Parts, register_format, row_tiles

LARGEST = 127


class Int8(PackedFormat):
    """Rows of any width."""

    name = "int8"
    bits = 8.0
    row_scale = "scale"
    says = "they are stored in 8 bits (INT8), in which an update would be rounded away"

    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        wide_OI = w_OI.float()
        scale_O = wide_OI.abs().amax(dim=1) / LARGEST
        codes_OI = wide_OI / scale_O.clamp(min=1e-38)[:, None]
        codes_OI = codes_OI.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return {"codes": codes_OI, "scale": scale_O}

    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        codes_OI, scale_O1 = parts["codes"], parts["scale"][:, None]
        if out_OI.dtype == torch.float32:
            return out_OI.copy_(codes_OI).mul_(scale_O1)
        for rows, wide_nI in row_tiles(out_OI):
            out_OI[rows].copy_(wide_nI.copy_(codes_OI[rows]).mul_(scale_O1[rows]))
        return out_OI

    def decode_unscaled(self, parts: Parts, out_OI: Tensor) -> Tensor:
        return out_OI.copy_(parts["codes"])

    def coded(self, parts: Parts) -> Coded:
        codes_EOI = parts["codes"]
        table = _numbers(codes_EOI.device)
        scale_EO1 = parts["scale"][:, :, None]
        shape = (codes_EOI.shape[1], codes_EOI.shape[2])
        return Coded(codes_EOI.view(torch.uint8), 8, True, table, scale_EO1, 1, shape[1], shape)

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, inputs = parts["codes"].shape
        return outputs, inputs


@cache
def _numbers(device: torch.device) -> Tensor:
    """(256,) what each byte stands for; made once, as a copy from the host waits for the device."""
    return torch.arange(256, dtype=torch.uint8).view(torch.int8).float().to(device)


register_format(Int8())
