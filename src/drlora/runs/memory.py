"""How much memory a run needs: weights, adapter, gradients, optimizer, activations.

All but the activations are counted from shapes. Activations are what a step has on paper at its
peak beside the gradients (`drlora.forecast`): the logits and their gradients are among them, and
what experts work in. Where a model does not run on paper they are not known, and said to be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from peft import PeftModel

from drlora.config.adapter import DrLoraConfig
from drlora.forecast.memory import optimizer_bytes
from drlora.forecast.step import Batch, pass_on_paper
from drlora.moe.blocks import MoEBlock
from drlora.runs.inspection import Beside, Memory, MemoryAtTarget, TrainedParts

GB = 1e9
NUMBER_BYTES = 4  # adapters are trained in float32
TOKENS, LENGTH = 4096, 512
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
    config: DrLoraConfig,
    beside: Beside,
    adapted: PeftModel,
    dtype: torch.dtype,
    batch: Batch,
    quantised: str,
    optim: str,
) -> Memory:
    """What training keeps.

    Args:
        weight_bytes: of the base.
        blocks: that are adapted.
        config: of the adapter.
        beside: what is trained beside the experts.
        adapted: the model with its adapter, on paper.
        dtype: of the base's weights that are not quantised.
        batch: of one pass.
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
    kept, checkpointed = _activations(adapted, batch, dtype, gradients * GB)
    totals = [(round(config.r_target * s), trained(stored * s)) for s in SCALES]
    return Memory(
        dtype=str(dtype).removeprefix("torch."),
        quantised=quantised,
        weights=weights,
        adapter_at_budget=trained(stored),
        adapter_at_r_max_everywhere=trained(config.r_max),
        parts=TrainedParts(adapter, gradients, optimizer),
        tokens=batch.tokens,
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
    adapted: PeftModel, batch: Batch, dtype: torch.dtype, gradients: float
) -> tuple[float, float]:
    """Bytes beside the gradients at the peak, without and with gradient checkpointing."""

    def peak(checkpoints: bool) -> float:
        try:
            found = pass_on_paper(adapted, replace(batch, checkpoints=checkpoints), dtype)
        except Exception:  # whatever a model makes of tensors without numbers
            return math.nan
        return max(found.peak_bytes - gradients, 0.0)

    plain = peak(False)
    can_checkpoint = getattr(adapted.get_base_model(), "supports_gradient_checkpointing", False)
    return plain, peak(True) if can_checkpoint else plain
