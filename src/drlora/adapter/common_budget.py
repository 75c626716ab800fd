"""One budget for the experts and the layers in `target_modules` (the option `common_budget`).

LoRA on attention alone, or on every linear layer at one rank, is compared with LoRA on the experts
at an equal number of trained parameters: what E * r_target rows of every block would have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from drlora.adapter.linear import ALL_LINEAR, ALL_STACK, choose_targets
from drlora.config.adapter import DrLoraConfig
from drlora.config.options import EQUAL, NOTHING
from drlora.errors import ConfigError
from drlora.moe.blocks import MoEBlock


def share_budget(
    model: nn.Module, config: DrLoraConfig, blocks: Sequence[MoEBlock], targets: list[str]
) -> list[str]:
    """Do what `common_budget` asks for, once: the saved configuration has the final ranks.

    With `start=none` the layers of `target_modules` get the whole budget, at one rank, rounded.
    Else experts and layers get the largest rank that all can have, and what is left over, as ranks
    are whole, raises that of the layers, which are the smaller part. Where ranks of experts grow,
    that is the rank they have on average in the end; r_init and r_max change in proportion, so that
    the layers have their rank from the start and the experts reach theirs.

    `all-linear` becomes `all-stack`: a tower for images or sound has no gradient in a run on text,
    so what it took from the experts would be lost. What is left out is said.

    Args:
        model: with its adapters, or without.
        config: its ranks and alphas are changed; alpha / rank stays as it is everywhere.
        blocks: those that the configuration adapts.
        targets: full names of the layers that `target_modules` stands for.

    Returns:
        The names of those that share the budget; without `common_budget` all.

    Raises:
        ConfigError: if experts start with unequal ranks or lose some, or the budget gives a layer
            no rank, or more than its width, or leaves nothing to grow.
    """
    if not config.option("common_budget"):
        return targets
    is_equal = config.r_init == config.r_target == config.r_max
    fits = config.start == EQUAL and config.r_init <= config.r_target
    fits |= config.start == NOTHING and is_equal
    if not targets or not fits:
        raise ConfigError(
            f"common_budget cannot work with target_modules={config.target_modules!r}, "
            f"r_init={config.r_init}, r_target={config.r_target}, r_max={config.r_max}, "
            f"start={config.start!r}: it wants layers beside the experts, and experts that start "
            f"with one rank and lose none; use method='lora-attention', method='lora-all-linear' "
            f"or start='uniform'."
        )
    if config.target_modules == ALL_LINEAR:
        config.target_modules = ALL_STACK  # so that the saved adapter says what it has
        wide, targets = targets, choose_targets(model, config, blocks)
        _tell_of_left_out(sorted(set(wide) - set(targets)))
    shapes = [_shape(model.get_submodule(name)) for name in targets]
    beside = sum(inputs + outputs for inputs, outputs in shapes)
    of_experts = sum(
        block.num_experts * sum(block.shape_of(projection))
        for block in blocks
        for projection in config.projections
    )
    budget = config.r_target * of_experts
    rank = 1  # of the rows that a pool stores, and nobody owns
    if config.start == NOTHING:
        left = budget
    else:
        rank = budget // (of_experts + beside)
        left = budget - rank * of_experts
    target_rank = round(left / beside)
    width = max(min(shape) for shape in shapes)
    if not 1 <= rank <= target_rank <= width:
        raise ConfigError(
            f"common_budget cannot work: r_target={config.r_target} rows an expert are {budget:,} "
            f"numbers, which gives {len(targets)} layers of target_modules rank {target_rank}; it "
            f"must be between 1 and their width, {width}. "
            f"{'Lower' if target_rank > width else 'Raise'} r_target."
        )
    first, most = (
        max(1, round(value * rank / config.r_target)) for value in (config.r_init, config.r_max)
    )
    if config.grows and first == rank:
        raise ConfigError(
            f"common_budget cannot work: r_target={config.r_target} rows an expert become {rank}, "
            f"and r_init={config.r_init} become {first}, so nothing is left to grow. "
            f"Raise r_target."
        )
    scaling = config.scaling
    config.options = {**config.options, "common_budget": False}
    config.r_init, config.r_target, config.r_max = first, rank, max(rank, most)
    config.target_rank = target_rank
    config.lora_alpha, config.target_alpha = (
        scaling * (math.sqrt(each) if config.use_rslora else each) for each in (rank, target_rank)
    )
    return targets


def _tell_of_left_out(layers: list[str]) -> None:
    if layers:
        warnings.warn(
            f"common_budget: {len(layers)} linear layers outside of the stack of layers that has "
            f"the experts get no LoRA, such as {layers[0]}; name layers in target_modules to "
            f"have others.",
            stacklevel=3,
        )


def _shape(layer: nn.Module) -> tuple[int, int]:
    """In-features and out-features of a linear layer, adapted already or not."""
    base: Any = getattr(layer, "base_layer", layer)
    if hasattr(base, "in_features"):
        return int(base.in_features), int(base.out_features)
    rows, columns = base.weight.shape
    return int(rows), int(columns)
