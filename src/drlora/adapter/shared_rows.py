"""Rows that all experts of a block have in common (the option `shared_outer`).

A of what reads the block's input (gate and up) and B of what writes its output (down) are one
matrix for all experts; the other factor is each expert's own. Megatron-Bridge, SGLang and Tinker
lay LoRA on experts out so. Equal numbers buy a larger rank.

Each expert keeps a copy. Copies begin equal and get the same gradient, so that they stay equal
under any optimizer that works element by element. Their gradient is the one matrix's over sqrt(E),
so that clipping sees its norm. What they learn is what one matrix would under Adam, whose steps do
not depend on the size of gradients; steps of SGD are shorter by that factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from drlora.config.adapter import DrLoraConfig
from drlora.errors import ConfigError
from drlora.moe.blocks import MoEBlock


def shared_factor(projection: str) -> str:
    """`lora_A` or `lora_B`: which factor of a projection's pool is common."""
    return "lora_B" if projection == "down" else "lora_A"


class _InCommon(torch.autograd.Function):
    """Copies (R, N) of E experts as they are; each gets the sum of their gradients over sqrt(E).

    So the norm of all copies' gradients is that of the one matrix's, which clipping goes by.
    """

    @staticmethod
    def forward(ctx: Any, rows_RN: Tensor, experts: int) -> Tensor:
        ctx.experts = experts
        return rows_RN.view_as(rows_RN)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, None]:
        grad_ErN = grad_RN.unflatten(0, (ctx.experts, -1))
        common_rN = grad_ErN.sum(dim=0) / math.sqrt(ctx.experts)
        return common_rN.expand(grad_ErN.shape).flatten(0, 1), None


def in_common(rows_RN: Tensor, experts: int) -> Tensor:
    """The copies of all experts, in their order, tied to each other."""
    tied: Tensor = _InCommon.apply(rows_RN, experts)
    return tied


def raise_ranks(config: DrLoraConfig, blocks: Iterable[MoEBlock]) -> None:
    """Do what `shared_outer` asks for, once: the saved configuration has the final ranks.

    The rank becomes what gives as many trained numbers as LoRA of `r_target` has, rounded.

    Raises:
        ConfigError: if ranks are to differ between experts, or blocks of different shapes would
            need different ranks.
    """
    if not config.option("shared_outer") or config.recorded("shared_outer"):
        return
    if not config.r_init == config.r_target == config.r_max or config.starts_from_data:
        raise ConfigError(
            f"shared_outer cannot work with r_init={config.r_init}, r_target={config.r_target}, "
            f"r_max={config.r_max}, start={config.start!r}: rows in common need one rank for all "
            f"experts; use method='lora-shared-outer'."
        )
    ranks = {round(config.r_target * _gain(config, block)) for block in blocks}
    if len(ranks) > 1:
        raise ConfigError(
            f"shared_outer cannot work: blocks of different shapes would get the ranks "
            f"{sorted(ranks)}; name experts of one shape in `experts`, or leave it out."
        )
    (rank,) = ranks
    assert config.lora_alpha is not None
    gain = rank / config.r_target
    config.lora_alpha *= math.sqrt(gain) if config.use_rslora else gain  # the scaling stays
    config.note(shared_outer=config.r_target)
    config.r_init = config.r_target = config.r_max = rank


def _gain(config: DrLoraConfig, block: MoEBlock) -> float:
    own = common = 0
    for projection in config.projections:
        inputs, outputs = block.shape_of(projection)
        own += block.num_experts * (inputs + outputs)
        once, each = (outputs, inputs) if projection == "down" else (inputs, outputs)
        common += once + block.num_experts * each
    return own / common
