"""Probes at events: the whole gradient of an expert's weight, where its own rows show a part of it.

The gradient of an expert's rows of A is B^T G, which lies in as few directions as it has rows. In
the one step before an event a probe stands beside each expert (A = 0 and B random, as in `probe`),
whose gradient is a random sketch of G itself. The model computes what it did. That step costs what
a larger rank does, and there is no other pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter, ProbeRows
from drlora.adapter.pool import RankPool
from drlora.distributed import add_up
from drlora.ranks.probe import OVERSAMPLING

Sketches = dict[RankPool, Tensor]


class EventProbes:
    """The probes of all blocks, while a step is under way that ends in an event.

    Args:
        adapters: block -> adapter.
        count: most directions that an expert may be asked for.
    """

    def __init__(self, adapters: Mapping[str, ExpertsAdapter], count: int) -> None:
        self._adapters = list(adapters.values())
        self._rows = count + OVERSAMPLING

    def attach(self) -> None:
        """Put probes beside all experts, new ones where some stand already."""
        for adapter in self._adapters:
            for projection, pool in adapter.rank_pools.items():
                rows = min(self._rows, pool.in_features, pool.out_features)
                adapter.probes[projection] = ProbeRows.beside(pool, rows)

    def take(self) -> Sketches:
        """Pool -> (E, P, I) float32, the same on all processes; the probes are gone then.

        A pool whose experts no token reached has zeros.
        """
        found: Sketches = {}
        for adapter in self._adapters:
            for projection, probe in adapter.probes.items():
                leaf = probe.a_RI
                sketch = leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad
                sketch = sketch.float()
                add_up(sketch)
                shape = (len(probe.offsets) - 1, -1, leaf.shape[1])
                found[adapter.rank_pools[projection]] = sketch.view(shape)
        self.detach()
        return found

    def detach(self) -> None:
        """Take the probes away, with what they saw."""
        for adapter in self._adapters:
            adapter.probes.clear()
