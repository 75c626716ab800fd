"""The moving averages that growth goes by, brought up to date once a step.

f, the routing frequency of each expert, comes from the blocks' meters (adapter.observe); g, the
importance of each row, from the gradients at hand, or from their sums where ZeRO keeps them to
itself (zero). The equations are those of saliency.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import ALLOCATIONS
from drlora.distributed import add_up
from drlora.distributed.held import add_up_rows, blocks_of
from drlora.distributed.zero import is_partitioned
from drlora.errors import ConfigError
from drlora.ranks.saliency import RANK_IMPORTANCES, RowSums, ema, routed_share, row_sums


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


def update_importances(
    pools: Sequence[RankPool], config: DrLoraConfig, watched: Sequence[RowSums] | None = None
) -> Tensor | bool:
    """g of every row, unless the step is poisoned: then of none.

    Args:
        watched: sums of each pool, where gradients are not at hand; none if the step was skipped.

    Returns:
        Whether it is: a gradient of some row is not finite. A tensor on the device, so that the
        host need not wait.

    Raises:
        ConfigError: if gradients are needed and DeepSpeed keeps them to itself.
    """
    measure, is_signed = RANK_IMPORTANCES[config.option("rank_importance")]
    if watched is None:
        sums_of = [(pool, _sums_of(pool, is_signed)) for pool in pools]
        found = [(pool, sums) for pool, sums in sums_of if sums is not None]
    else:
        found = list(zip(pools, watched, strict=True)) if watched else []
    importances = _in_full([measure(sums) for _, sums in found])
    measured = [(pool, s_R) for (pool, _), s_R in zip(found, importances, strict=True)]
    if not measured and watched is None:
        _refuse_hidden_gradients(pools, config)
    if not measured:
        return False
    device = measured[0][1].device
    largest_P = torch.stack([s_R.amax().to(device) for _, s_R in measured])
    poisoned = ~largest_P.isfinite().all()
    for pool, s_R in measured:
        s_R.masked_fill_(poisoned.to(s_R.device), float("nan"))
        _update_importance(pool, s_R, config.beta)
    return poisoned


def _sums_of(pool: RankPool, is_signed: bool) -> RowSums | None:
    """Of this step's gradients; None without any."""
    if pool.lora_A.grad is None or pool.lora_B.grad is None:
        return None
    a_R, b_R = (
        row_sums(p, p.grad, is_signed) for p in (pool.lora_A, pool.lora_B) if p.grad is not None
    )
    return RowSums(a_R, b_R, pool.in_features, pool.out_features)


def _in_full(importances: Sequence[Tensor]) -> list[Tensor]:
    """Those of all rows where parameters are sharded (FSDP2): one collective for all pools."""
    sharded = [s_R for s_R in importances if isinstance(s_R, DTensor)]
    together: dict[DeviceMesh, list[DTensor]] = {}
    for s_R in sharded:
        together.setdefault(s_R.device_mesh, []).append(s_R)
    whole: dict[int, Tensor] = {}
    for parts in together.values():
        # Zeros for the rows of other processes: their sum is each row's number, to the bit.
        sums = parts[0].to_local().new_zeros(sum(len(s_R) for s_R in parts))
        for mine, s_R in zip(sums.split([len(s_R) for s_R in parts]), parts, strict=True):
            (block,) = blocks_of(s_R)
            mine[block.first : block.end] = s_R.to_local()
            whole[id(s_R)] = mine
        add_up_rows(parts[0], sums)
    return [whole.get(id(s_R), s_R) for s_R in importances]


def _update_importance(pool: RankPool, importance_R: Tensor, beta: float) -> None:
    pool.importance.copy_(ema(pool.importance, importance_R, beta))
    if pool.uncertainty is not None:
        deviation_R = (importance_R - pool.importance).abs_()
        pool.uncertainty.copy_(ema(pool.uncertainty, deviation_R, beta))


def _refuse_hidden_gradients(pools: Iterable[RankPool], config: DrLoraConfig) -> None:
    """DeepSpeed's ZeRO leaves `.grad` empty; it marks the parameters it took over."""
    hidden = any(is_partitioned(pool.lora_A) for pool in pools)
    changes = ALLOCATIONS[config.allocation].changes_ranks(config)
    if hidden and changes and config.saliency in ("product", "importance"):
        raise ConfigError(
            f"DeepSpeed ZeRO keeps the gradients to itself, and ranks are to grow by "
            f"saliency={config.saliency!r}: call dynamics.watch(engine.optimizer) before the first "
            f"step, and before_optimizer_step and after_optimizer_step after engine.step()."
        )
