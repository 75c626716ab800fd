"""compressed-tensors: int8 by row is kept; of the rest transformers makes 16 bits, packed again.

The other formats (int4 by group, FP8 by channel, four int8 in one int32) have no storage of the
same bytes. One matrix of all experts of a block is in 16 bits at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from drlora.errors import ConfigError
from drlora.moe.stored.base import Kept, StoredForm, register_form

# In which each number is a byte of its own, in a tensor called `weight`.
_A_BYTE_EACH = (None, "int-quantized", "naive-quantized")


class CompressedTensors(StoredForm):
    """`...experts.7.gate_proj.weight` and `.weight_scale`, or what transformers decodes."""

    method = "compressed-tensors"
    names = ("weight", "weight_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        groups = dict(settings.get("config_groups") or {}).values()
        weights = [group.get("weights") or {} for group in groups]
        formats = [group.get("format") or settings.get("format") for group in groups]
        is_int8 = [
            (w.get("type"), w.get("num_bits")) == ("int", 8) and form in _A_BYTE_EACH
            for w, form in zip(weights, formats, strict=True)
        ]
        self.is_decoded = not any(is_int8)
        by_row = [w.get("symmetric") and w.get("strategy") == "channel" for w in weights]
        if not self.is_decoded and not all(a and b for a, b in zip(is_int8, by_row, strict=True)):
            raise ConfigError(
                f"the checkpoint is quantised with compressed-tensors to {weights}; of 8-bit whole "
                f"numbers, only those with one scale a row and no zero point are read. Load the "
                f"model's 16-bit checkpoint with drlora.QuantisedExperts('int8')."
            )

    @property
    def storage(self) -> str:
        return "" if self.is_decoded else "int8"

    def is_packed(self, tensors: Mapping[str, Any]) -> bool:
        return "weight_scale" in tensors

    def matrix(self, tensors: Mapping[str, Tensor]) -> Kept:
        scale_O = tensors["weight_scale"].flatten().float()
        return Kept(self.kind, {"codes": tensors["weight"], "scale": scale_O})


register_form(CompressedTensors)
