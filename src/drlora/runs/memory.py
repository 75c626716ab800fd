"""How much memory a run needs: weights, adapter, gradients, optimizer, activations.

All but the activations are counted. Those are an estimate of what is kept of each token for the
backward pass, in the dtype of the weights, with fused attention and the grouped engine:

    a layer, but for experts    8 H
    its experts                 K (2 H + 4 I + rank of the adapter for each projection)
    logits                      vocabulary x (dtype + 2 x 4 bytes), as the loss is in float32

Of a large vocabulary `drlora train` holds no more than a chunk of 256 MB (`drlora.evaluation.head`;
TRL's head on a GPU); a model that scales or caps its logits holds them on a CPU all the same.

The loop engine of the CPU keeps less. With gradient checkpointing H of each layer is kept, and all
of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from drlora.config.adapter import DrLoraConfig
from drlora.evaluation.head import CHUNK_BYTES_ELSEWHERE, LEAST_VOCABULARY
from drlora.forecast.memory import optimizer_bytes
from drlora.moe.blocks import MoEBlock
from drlora.runs.inspection import Beside, BlockShape, Memory, MemoryAtTarget, TrainedParts

GB = 1e9
NUMBER_BYTES = 4  # adapters are trained in float32
TOKENS = 4096
SCALES = (0.25, 0.5, 1, 2, 4)


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
    weight_bytes: int,
    blocks: Sequence[MoEBlock],
    described: Sequence[BlockShape],
    architecture: PreTrainedConfig,
    config: DrLoraConfig,
    beside: Beside,
    dtype: torch.dtype,
    tokens: int,
    quantised: str,
    optim: str,
) -> Memory:
    """What training keeps.

    Args:
        weight_bytes: of the base.
        blocks: that are adapted.
        described: the same blocks.
        architecture: of the base.
        config: of the adapter.
        beside: what is trained beside the experts.
        dtype: of the base's weights that are not quantised.
        tokens: of a batch, padding included.
        quantised: what of the base is, in words.
        optim: the optimizer, by transformers' name.
    """
    kept_bytes = optimizer_bytes(optim)

    def trained(rank: float) -> float:
        return (
            sum(_trained(adapter_parameters(blocks, config, rank), beside, dtype, kept_bytes)) / GB
        )

    stored = stored_rank(config)
    weights = weight_bytes / GB
    adapter, gradients, optimizer = (
        part / GB
        for part in _trained(adapter_parameters(blocks, config, stored), beside, dtype, kept_bytes)
    )
    active = sum((d.top_k or 1) for d in described) / len(described)
    kept, checkpointed = _activations(architecture, described, config, active, dtype, tokens)
    totals = [(round(config.r_target * s), trained(stored * s)) for s in SCALES]
    return Memory(
        dtype=str(dtype).removeprefix("torch."),
        quantised=quantised,
        weights=weights,
        adapter_at_budget=trained(stored),
        adapter_at_r_max_everywhere=trained(config.r_max),
        parts=TrainedParts(adapter, gradients, optimizer),
        tokens=tokens,
        activations=kept / GB,
        activations_with_checkpointing=checkpointed / GB,
        by_rank=tuple(
            MemoryAtTarget(r_target, found, weights + found + kept / GB)
            for scale, (r_target, found) in zip(SCALES, totals, strict=True)
            if config.r_target * scale >= 1
        ),
    )


def _trained(
    numbers: int, beside: Beside, dtype: torch.dtype, kept_bytes: float
) -> tuple[float, float, float]:
    """Bytes of trained numbers, their gradients and what the optimizer keeps of them."""
    in_float32 = (numbers + beside.ordinary_lora + beside.routers) * NUMBER_BYTES
    in_full = beside.modules_to_save * dtype.itemsize
    # Of a module that is trained in full the frozen one stays too; that is among the weights.
    in_all = in_float32 + in_full
    return in_all, in_all, in_all * kept_bytes / NUMBER_BYTES


def _activations(
    architecture: PreTrainedConfig,
    described: Sequence[BlockShape],
    config: DrLoraConfig,
    active: float,
    dtype: torch.dtype,
    tokens: int,
) -> tuple[float, float]:
    """Bytes kept for the backward pass, without and with gradient checkpointing."""
    text = architecture.get_text_config()
    layers = getattr(text, "num_hidden_layers", len(described))
    hidden, width = described[0].hidden_size, described[0].expert_width
    experts = active * (2 * hidden + 4 * width + len(config.projections) * config.r_target)
    a_layer = (8 * hidden + experts) * dtype.itemsize
    vocabulary, each = getattr(text, "vocab_size", 0), dtype.itemsize + 2 * NUMBER_BYTES
    logits = tokens * vocabulary * each
    if vocabulary >= LEAST_VOCABULARY:
        logits = min(logits, CHUNK_BYTES_ELSEWHERE)
    checkpointed = layers * hidden * dtype.itemsize + a_layer
    return tokens * layers * a_layer + logits, tokens * checkpointed + logits
