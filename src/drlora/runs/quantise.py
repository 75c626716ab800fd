"""The section `quantise` of a recipe: experts in few bits, and maybe the layers beside them.

quantise: {experts: nf4, nested: true, rest: nf4}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from drlora.errors import ConfigError
from drlora.moe.blocks import MoEBlock
from drlora.moe.loading import QuantisedExperts
from drlora.moe.quantise import refuse_unpackable
from drlora.moe.rest import linears_of_rest, refuse_without_bitsandbytes
from drlora.moe.stored.base import FORMS
from drlora.moe.stored.config import stored_settings
from drlora.moe.stored.refused import method_of
from drlora.ops.storage.packed import packed_format
from drlora.ops.weights import MATRICES


@dataclass(frozen=True)
class QuantiseSection:
    """How the base model is kept while it is trained; by default as it is.

    Args:
        experts: storage of the experts: `nf4`, `nf4-nested`, `int8`, `mxfp4` or `fp8`.
        nested: whether the scales of nf4 are of eight bits themselves.
        rest: storage of the linear layers outside the experts: `nf4`, which needs bitsandbytes.
        shared: whether shared experts are kept as the rest is.
    """

    experts: str | None = None
    nested: bool = False
    rest: str | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.experts is None:
            for name in ("nested", "rest", "shared"):
                if getattr(self, name):
                    raise ConfigError(
                        f"quantise.{name}={getattr(self, name)!r} has no effect without "
                        f"quantise.experts; set that too, to nf4 say."
                    )
        self.config()

    def config(self) -> QuantisedExperts | None:
        """What `from_pretrained` is given; None to load the model as it is.

        Raises:
            ConfigError: if there is no such storage.
        """
        if self.experts is None:
            return None
        return QuantisedExperts(self.experts, self.nested, self.rest, self.shared)

    def refuse_unfit(self, skeleton: nn.Module) -> None:
        """Before a weight is read.

        Args:
            skeleton: the model without memory for its weights.

        Raises:
            ConfigError: if its experts cannot be packed so.
        """
        if (config := self.config()) is not None:
            refuse_unpackable(skeleton, config.storage)

    def refuse_missing(self) -> None:
        """Raises:
        ConfigError: if what it needs is not installed.
        """
        refuse_without_bitsandbytes(self.rest)

    def weight_bytes(self, skeleton: nn.Module, dtype: torch.dtype, blocks: list[MoEBlock]) -> int:
        """Of the base model, kept so.

        Args:
            skeleton: the model without memory for its weights.
            dtype: of what is not quantised.
            blocks: all of its MoE blocks.
        """
        total = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
        if (config := self.config()) is None:
            return total
        kind = packed_format(config.storage)
        experts = 0.0
        for block in blocks:
            for matrix in MATRICES:
                inputs, outputs = block.shape_of(matrix)
                rows = block.num_experts * outputs
                saved = dtype.itemsize - kind.bits / 8
                experts += rows * inputs * saved - (4 * rows if kind.row_scale else 0)
        rest = 0.0
        if config.rest:
            nested = "-nested" if config.storage.endswith("-nested") else ""
            saved = dtype.itemsize - packed_format(f"{config.rest}{nested}").bits / 8
            for name in linears_of_rest(skeleton, config.shared):
                layer: Any = skeleton.get_submodule(name)
                rest += layer.weight.numel() * saved
        return round(total - experts - rest)

    def of_checkpoint(self, architecture: PreTrainedConfig) -> QuantiseSection:
        """How the base is kept where its checkpoint is quantised already.

        Args:
            architecture: the model's config.
        """
        settings = stored_settings(architecture)
        if self.experts is not None or settings is None or method_of(settings) not in FORMS:
            return self
        form = FORMS[method_of(settings)](settings)
        return self if form.is_decoded else QuantiseSection(experts=form.storage)

    def __str__(self) -> str:
        """`nf4-nested experts, nf4 rest`."""
        config = self.config()
        if config is None:
            return "not quantised"
        return f"{config.storage} experts" + (f", {config.rest} rest" if config.rest else "")
