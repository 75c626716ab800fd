"""MXFP4 as GPT-OSS checkpoints have it: `gate_up_proj_blocks` and `_scales` of all experts.

The file has a row for each output feature; the model's own parameter, in 16 bits, is (E, I, O).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from drlora.moe.stored.base import Kept, StoredForm, register_form


class Mxfp4Blocks(StoredForm):
    """Blocks (E, O, I / 32, 16) and scales (E, O, I / 32): the storage's own parts."""

    method = "mxfp4"
    fused_ends = ("_blocks", "_scales")
    is_upright = True
    storage = "mxfp4"

    def is_packed(self, tensors: Mapping[str, Any]) -> bool:
        return "_blocks" in tensors

    def matrix(self, tensors: Mapping[str, Tensor]) -> Kept:
        raise AssertionError("only experts are in MXFP4")

    def stack(self, tensors: Mapping[str, Tensor]) -> Kept:
        return Kept(self.kind, {"blocks": tensors["_blocks"], "scales": tensors["_scales"]})


register_form(Mxfp4Blocks)
