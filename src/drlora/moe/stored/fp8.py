"""FP8 checkpoints (DeepSeek-V3, Qwen3-FP8): e4m3 numbers and a scale for each tile of 128 x 128.

The file calls the scale `weight_scale_inv`, and it multiplies. It is float32, or a power of two in
one byte (ue8m0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drlora.errors import ConfigError
from drlora.moe.stored.base import Kept, StoredForm, register_form
from drlora.ops.storage.fp8 import TILE

_INSTEAD = "load the model's 16-bit checkpoint with drlora.QuantisedExperts('fp8')"


class Fp8Blocks(StoredForm):
    """`...experts.7.gate_proj.weight` and `.weight_scale_inv`; or of all experts."""

    method = "fp8"
    names = ("weight", "weight_scale_inv", "activation_scale")
    fused_ends = ("", "_scale_inv")
    storage = "fp8"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        tile = settings.get("weight_block_size", [TILE, TILE])
        if tile is None or list(tile) != [TILE, TILE]:
            raise ConfigError(
                f"the checkpoint is quantised with weight_block_size={tile!r}, the storage fp8 has "
                f"a scale for each tile of {TILE} x {TILE}; {_INSTEAD}."
            )
        if settings.get("expert_dtype", "fp8") != "fp8":
            raise ConfigError(
                f"the checkpoint keeps experts as expert_dtype={settings['expert_dtype']!r}, for "
                f"which there is no storage here; {_INSTEAD}."
            )

    def is_packed(self, tensors: Mapping[str, Any]) -> bool:
        return any(name.endswith("_scale_inv") for name in tensors)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Kept:
        return self._kept(tensors["weight"], tensors["weight_scale_inv"])

    def stack(self, tensors: Mapping[str, Tensor]) -> Kept:
        return self._kept(tensors[""], tensors["_scale_inv"])

    def _kept(self, codes: Tensor, scale: Tensor) -> Kept:
        if codes.dtype != torch.float8_e4m3fn:
            raise ConfigError(f"the checkpoint has weights in {codes.dtype}, no e4m3; {_INSTEAD}.")
        tiles = tuple(-(-size // TILE) for size in codes.shape[-2:])
        if tuple(scale.shape[-2:]) != tiles:
            raise ConfigError(
                f"a matrix of {tuple(codes.shape[-2:])} has scales of {tuple(scale.shape[-2:])}, "
                f"expected are {tiles}, one for each tile; {_INSTEAD}."
            )
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        return Kept(self.kind, {"codes": codes, "scale": scale})


register_form(Fp8Blocks)
