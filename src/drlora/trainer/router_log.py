"""How routers share out the tokens that are learned from, in a few numbers for the Trainer's log.

router_entropy   entropy of the load over a block's experts, over that of even load: 1 is even; the
                 mean over blocks
router_load_max  load of the busiest expert over that of even load, mean over blocks
router_dead      share of all experts that had no load since the last entry
router_drift     how far trained routers have moved, over the size that they had: norm of the
                 difference, mean over blocks; only where they are trained, and not under ZeRO-3,
                 which splits what they were

Load is what routing frequencies are made of (by default the sum of routing weights over real
tokens), of this process.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from drlora.distributed.held import whole_weights
from drlora.distributed.zero import is_partitioned
from drlora.ranks.dynamics import RankDynamics


class RouterLog:
    """The entries of one run."""

    def __init__(self, dynamics: RankDynamics, model: nn.Module) -> None:
        self._adapters = list(dynamics.adapters.values())
        self._trained = _trained_routers(model, dynamics)
        self._load: list[Tensor] = []

    def count(self) -> None:
        """Add the load of a step; call it before the dynamics take their signals."""
        sums = [adapter.meter.sum_E.detach() for adapter in self._adapters]
        pairs = zip(self._load, sums, strict=True) if self._load else ()
        # On the device, so that an ordinary step does not make the host wait.
        self._load = [load + more for load, more in pairs] or [one.clone() for one in sums]

    def entries(self) -> dict[str, float]:
        """What is to be logged now; counting begins anew."""
        blocks = [load_E.double().cpu() for load_E in self._load]
        self._load = []
        known = [load_E for load_E in blocks if float(load_E.sum()) > 0]
        found = {}
        if known:
            shares = [load_E / load_E.sum() for load_E in known]
            dead = sum(int((load_E == 0).sum()) for load_E in known)
            found = {
                "router_entropy": _mean([evenness(share_E) for share_E in shares]),
                "router_load_max": _mean([float(len(s) * s.max()) for s in shares]),
                "router_dead": dead / sum(len(load_E) for load_E in known),
            }
        if self._trained:
            found["router_drift"] = _mean([_moved(*pair) for pair in self._trained])
        return found


def evenness(share_E: Tensor) -> float:
    """Entropy of shares that sum to 1, over that of equal ones.

    >>> evenness(torch.tensor([0.25, 0.25, 0.25, 0.25])), evenness(torch.tensor([1.0, 0.0]))
    (1.0, 0.0)
    """
    if len(share_E) < 2:
        return 1.0
    entropy = -torch.xlogy(share_E, share_E).sum()
    return abs(float(entropy / math.log(len(share_E))))


def _trained_routers(model: nn.Module, dynamics: RankDynamics) -> list[tuple[nn.Module, nn.Module]]:
    """(as it is trained, as it was) of each router that the adapter trains."""
    names = {adapter.block.router_name for adapter in dynamics.adapters.values()}
    found = []
    for name, module in model.named_modules():
        is_router = any(router and name.endswith(router) for router in names)
        if is_router and isinstance(module, ModulesToSaveWrapper):
            copies: Any = module.modules_to_save
            is_split = any(map(is_partitioned, module.original_module.parameters()))
            if dynamics.adapter_name in copies and not is_split:
                found.append((copies[dynamics.adapter_name], module.original_module))
    return found


@torch.no_grad()
def _moved(now: nn.Module, before: nn.Module) -> float:
    moved = size = 0.0
    for one, other in zip(now.parameters(), before.parameters(), strict=True):
        # In full where FSDP2 shares them out: a collective, and every process logs.
        whole, was = whole_weights(one).float(), whole_weights(other).float()
        moved += float((whole - was).square().sum())
        size += float(was.square().sum())
    return math.sqrt(moved / size) if size else 0.0


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
