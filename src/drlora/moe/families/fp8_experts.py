"""`FP8Experts`: what transformers puts in the place of experts whose checkpoint is in FP8, on GPUs.

Its scales are parameters beside the numbers. An adapter computes with the numbers that they stand
for; the module itself rounds activations to FP8 too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from drlora.moe.families.base import Place, register_family
from drlora.moe.families.interface import FLAGS, InterfaceExperts
from drlora.ops.storage.fp8 import TILE
from drlora.ops.storage.of_others import Held
from drlora.ops.storage.packed import packed_format
from drlora.ops.weights import ExpertMatrix, ExpertWeights, as_matrix


class Fp8Experts(InterfaceExperts):
    """`gate_up_proj (E, 2I, H)` in e4m3, `gate_up_proj_scale_inv (E, 2I / 128, H / 128)`."""

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ == "FP8Experts" and all(hasattr(module, f) for f in FLAGS)

    def missing(self, module: Any) -> str | None:
        for key in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            codes, scale = getattr(module, key), getattr(module, f"{key}_scale_inv")
            tiles = tuple(-(-size // TILE) for size in codes.shape[1:])
            if codes.dtype != torch.float8_e4m3fn or tuple(scale.shape[1:]) != tiles:
                return (
                    f"its {key} is in {codes.dtype} with scales {tuple(scale.shape[1:])}, expected "
                    f"are e4m3 and one for each tile of {TILE} x {TILE}, {tiles}; load the "
                    f"checkpoint with config=drlora.packed_config(name), or in 16 bits with "
                    f"FineGrainedFP8Config(dequantize=True)"
                )
        return super().missing(module)

    def places(self, module: Any) -> list[Place]:
        return []  # they are packed already

    def weights(self, module: Any) -> ExpertWeights:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        plain = super().weights(module)
        return replace(plain, gate_up=_held(module, first), down=_held(module, "down_proj"))


def _held(module: Any, key: str) -> ExpertMatrix:
    dtype = getattr(module.config, "dtype", None)
    parts = {"codes": getattr(module, key), "scale": getattr(module, f"{key}_scale_inv")}
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return as_matrix(Held(packed_format("fp8"), parts, dtype))


register_family(Fp8Experts())
