"""INT8: eight bits a number and one scale a row. Exact in bfloat16, since |code| <= 127."""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.storage.packed import PackedFormat, Parts, register_format

LARGEST = 127


class Int8(PackedFormat):
    """Rows of any width."""

    name = "int8"
    bits = 8.0
    says = "they are stored in 8 bits (INT8), in which an update would be rounded away"

    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        wide_OI = w_OI.float()
        scale_O = wide_OI.abs().amax(dim=1) / LARGEST
        codes_OI = wide_OI / scale_O.clamp(min=1e-38)[:, None]
        codes_OI = codes_OI.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return {"codes": codes_OI, "scale": scale_O}

    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        if out_OI.dtype == torch.float32:
            return out_OI.copy_(parts["codes"]).mul_(parts["scale"][:, None])
        return out_OI.copy_(parts["codes"] * parts["scale"][:, None])

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, inputs = parts["codes"].shape
        return outputs, inputs


register_format(Int8())
