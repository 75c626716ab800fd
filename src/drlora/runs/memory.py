"""How much memory a run needs: weights, adapter, gradients, optimizer, activations.

All but the activations are counted. Those are an estimate of what is kept of each token for the
backward pass, in the dtype of the weights, with fused attention and the grouped engine:

    a layer, but for experts    8 H
    its experts                 K (2 H + 4 I + rank of the adapter for each projection)
    logits                      vocabulary x (dtype + 2 x 4 bytes), as the loss is in float32

The loop engine of the CPU keeps less. With gradient checkpointing H of each layer is kept, and all
of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from drlora.config.adapter import DrLoraConfig
from drlora.moe.blocks import MoEBlock

GB = 1e9
NUMBER_BYTES = 4  # adapters are trained in float32
MOMENTS = 2  # of Adam
TOKENS = 4096
SCALES = (0.25, 0.5, 1, 2, 4)


@dataclass(frozen=True)
class Beside:
    """What is trained beside the experts, in numbers.

    Attributes:
        ordinary_lora: A and B on `target_modules`, of `layers` linear layers.
        modules_to_save: modules that are trained in full, in the dtype of the model.
        routers: trained in float32.
    """

    layers: int
    ordinary_lora: int
    modules_to_save: int
    routers: int


def adapter_parameters(blocks: Sequence[MoEBlock], config: DrLoraConfig, rank: float) -> int:
    """Numbers in A and B if every expert had `rank`."""
    return sum(
        int(block.num_experts * rank) * sum(block.shape_of(projection))
        for block in blocks
        for projection in config.projections
    )


def stored_rank(config: DrLoraConfig) -> float:
    """Rows that are stored for each expert: r_target, or more where the method needs more."""
    return config.pool_rows(1)


def memory_plan(
    num_weights: int,
    blocks: Sequence[MoEBlock],
    described: Sequence[dict[str, Any]],
    architecture: PreTrainedConfig,
    config: DrLoraConfig,
    beside: Beside,
    dtype: torch.dtype,
    tokens: int,
) -> dict[str, Any]:
    """GB (1e9 bytes) of what training keeps.

    Returns:
        `weights` of the base; `adapter_at_budget`, with gradients and Adam's moments, for the rows
        that are stored; `adapter_at_r_max_everywhere`; `parts`: adapter, gradients, optimizer and
        `activations` of `tokens` tokens, without and with gradient checkpointing; `by_rank`: all
        of it without checkpointing, for other r_target.
    """

    def trained(rank: float) -> float:
        return sum(_trained(adapter_parameters(blocks, config, rank), beside, dtype)) / GB

    stored = stored_rank(config)
    weights = num_weights * dtype.itemsize / GB
    adapter, gradients, optimizer = (
        part / GB for part in _trained(adapter_parameters(blocks, config, stored), beside, dtype)
    )
    active = sum((d["top_k"] or 1) for d in described) / len(described)
    kept, checkpointed = _activations(architecture, described, config, active, dtype, tokens)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "adapter_at_budget": trained(stored),
        "adapter_at_r_max_everywhere": trained(config.r_max),
        "parts": {"adapter": adapter, "gradients": gradients, "optimizer": optimizer},
        "tokens": tokens,
        "activations": kept / GB,
        "activations_with_checkpointing": checkpointed / GB,
        "by_rank": [
            {
                "r_target": round(config.r_target * scale),
                "trained": (found := trained(stored * scale)),
                "total": weights + found + kept / GB,
            }
            for scale in SCALES
            if config.r_target * scale >= 1
        ],
    }


def _trained(numbers: int, beside: Beside, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of trained numbers, their gradients and their moments."""
    in_float32 = (numbers + beside.ordinary_lora + beside.routers) * NUMBER_BYTES
    in_full = beside.modules_to_save * dtype.itemsize
    # Of a module that is trained in full the frozen one stays too; that is among the weights.
    return in_float32 + in_full, in_float32 + in_full, MOMENTS * (in_float32 + in_full)


def _activations(
    architecture: PreTrainedConfig,
    described: Sequence[dict[str, Any]],
    config: DrLoraConfig,
    active: float,
    dtype: torch.dtype,
    tokens: int,
) -> tuple[float, float]:
    """Bytes kept for the backward pass, without and with gradient checkpointing."""
    text = architecture.get_text_config()
    layers = getattr(text, "num_hidden_layers", len(described))
    hidden, width = described[0]["hidden_size"], described[0]["expert_width"]
    experts = active * (2 * hidden + 4 * width + len(config.projections) * config.r_target)
    a_layer = (8 * hidden + experts) * dtype.itemsize
    logits = getattr(text, "vocab_size", 0) * (dtype.itemsize + 2 * NUMBER_BYTES)
    checkpointed = layers * hidden * dtype.itemsize + a_layer
    return tokens * (layers * a_layer + logits), tokens * (checkpointed + logits)
