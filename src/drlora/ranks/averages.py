"""The moving averages that growth goes by, brought up to date once a step.

f, the routing frequency of each expert, comes from the blocks' meters (adapter.observe); g, the
importance of each row, from the gradients at hand. The equations are those of saliency.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import ALLOCATIONS
from drlora.distributed import add_up
from drlora.errors import ConfigError
from drlora.ranks.saliency import RANK_IMPORTANCES, ema, routed_share


def update_frequencies(adapters: Sequence[ExpertsAdapter], config: DrLoraConfig) -> None:
    """f of every block, from sums over the tokens of all micro-batches and processes."""
    device = adapters[0].meter.sum_E.device
    sums = torch.cat(
        [torch.cat([a.meter.sum_E, a.meter.num_tokens[None]]).to(device) for a in adapters]
    )
    add_up(sums)
    for adapter, sums_E1 in zip(
        adapters, sums.split([a.block.num_experts + 1 for a in adapters]), strict=True
    ):
        share_E = routed_share(sums_E1[:-1], sums_E1[-1]).to(adapter.frequency.device)
        adapter.frequency.copy_(ema(adapter.frequency, share_E, config.beta))
        adapter.meter.reset()


def update_importances(pools: Sequence[RankPool], config: DrLoraConfig) -> Tensor | bool:
    """g of every row, unless the step is poisoned: then of none.

    Returns:
        Whether it is: a gradient of some row is not finite. A tensor on the device, so that the
        host need not wait.

    Raises:
        ConfigError: if gradients are needed and DeepSpeed keeps them to itself.
    """
    measured = [(pool, s_R) for pool in pools if (s_R := _measure(pool, config)) is not None]
    if not measured:
        _refuse_hidden_gradients(pools, config)
        return False
    device = measured[0][1].device
    largest_P = torch.stack([s_R.amax().to(device) for _, s_R in measured])
    poisoned = ~largest_P.isfinite().all()
    for pool, s_R in measured:
        s_R.masked_fill_(poisoned.to(s_R.device), float("nan"))
        _update_importance(pool, s_R, config.beta)
    return poisoned


def _measure(pool: RankPool, config: DrLoraConfig) -> Tensor | None:
    """(R,) s of this step; None without gradients."""
    if pool.lora_A.grad is None or pool.lora_B.grad is None:
        return None
    measure = RANK_IMPORTANCES[config.option("rank_importance")]
    importance_R = measure(pool.lora_A, pool.lora_A.grad, pool.lora_B, pool.lora_B.grad)
    if hasattr(importance_R, "full_tensor"):  # sharded parameters (FSDP2)
        importance_R = importance_R.full_tensor()
    return importance_R


def _update_importance(pool: RankPool, importance_R: Tensor, beta: float) -> None:
    pool.importance.copy_(ema(pool.importance, importance_R, beta))
    if pool.uncertainty is not None:
        deviation_R = (importance_R - pool.importance).abs_()
        pool.uncertainty.copy_(ema(pool.uncertainty, deviation_R, beta))


def _refuse_hidden_gradients(pools: Iterable[RankPool], config: DrLoraConfig) -> None:
    """DeepSpeed's ZeRO leaves `.grad` empty; it marks the parameters it took over."""
    hidden = any(hasattr(pool.lora_A, mark) for pool in pools for mark in ("ds_id", "_hp_mapping"))
    changes = ALLOCATIONS[config.allocation].changes_ranks(config)
    if hidden and changes and config.saliency in ("product", "importance"):
        raise ConfigError(
            f"DeepSpeed ZeRO keeps the gradients to itself, so ranks cannot grow by "
            f"saliency={config.saliency!r}. Train with DDP or FSDP2, grow by saliency='routing', "
            f"or give every expert its rank at the start (r_init = r_target)."
        )
