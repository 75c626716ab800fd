"""One adapter on one block's experts: a pool of rows for each projection, and what is counted.

ExpertsAdapter                one PEFT adapter name in one block
  pools                       one RankPool per projection: lora_A, lora_B, owners, importance
  frequency                   (E,) routing frequency f

Letters as in `drlora.ops.parts`; P probe rows of each expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from drlora.adapter.observe import RoutingMeter
from drlora.adapter.pool import RankPool, in_float32
from drlora.adapter.shared_rows import shared_factor
from drlora.config.adapter import NOTHING, DrLoraConfig
from drlora.errors import ConfigError
from drlora.moe.blocks import MoEBlock
from drlora.ops import LoraPiece, TracedPiece

# In a configuration's record: ranks were given before rows of A are laid along the gradient.
ROWS_TO_LAY = "rows_to_lay"


def refuse_unplaced(config: DrLoraConfig, owned: int) -> None:
    """Refuse an adapter whose rows are placed by data, and are not yet.

    Args:
        config: its settings.
        owned: ranks that its experts own.

    Raises:
        ConfigError: saying how rows are placed.
    """
    if config.starts_from_data and (not owned or config.recorded(ROWS_TO_LAY)):
        raise ConfigError(
            f"start={config.start!r}, start_a={config.option('start_a')!r}, but no "
            f"{'rows are laid' if owned else 'ranks are placed'} yet; call "
            f"drlora.place_ranks(model, batches) with a few batches of the training data first."
        )


class ProbeRows(NamedTuple):
    """Rows that add nothing to a projection and whose gradient is a sketch of the experts' own.

    Attributes:
        a_RI: (E * P, I) zeros, a leaf that asks for a gradient.
        b_RO: (E * P, O) random, of mean square 1 / P.
        offsets: E + 1, where each expert's P rows begin.
    """

    a_RI: Tensor
    b_RO: Tensor
    offsets: tuple[int, ...]

    @classmethod
    def beside(cls, pool: RankPool, rows: int) -> ProbeRows:
        """`rows` rows for each expert of `pool`, drawn from its seed alone."""
        count = pool.book.num_experts * rows
        generator = torch.Generator().manual_seed(int(pool.seed))
        b_RO = torch.randn(count, pool.out_features, generator=generator) / math.sqrt(rows)
        device, dtype = pool.owner.device, pool.lora_A.dtype
        a_RI = torch.zeros(count, pool.in_features, device=device, dtype=dtype, requires_grad=True)
        return cls(a_RI, b_RO.to(device, dtype), tuple(range(0, count + 1, rows)))


class ExpertsAdapter(nn.Module):
    """One adapter on one block's experts.

    Attributes:
        pools: projection -> RankPool.
        of_all_blocks: the adapters of the same name, one a block.
        frequency: (E,) float32 buffer, the routing frequency f.
        meter: routing sums of the optimizer step under way.
        probes: projection -> ProbeRows, only while `drlora.ranks.probe` is at work.
    """

    frequency: Tensor

    def __init__(self, block: MoEBlock, config: DrLoraConfig) -> None:
        super().__init__()
        self.config = config
        self.block = block
        # Any other start needs data, and then an expert owns nothing until ranks are placed.
        rank = 0 if config.starts_from_data or config.start == NOTHING else config.r_init
        self.pools = nn.ModuleDict(
            {
                projection: RankPool(
                    block.num_experts,
                    *block.shape_of(projection),
                    rank,
                    config.pool_rows(block.num_experts),
                    tracks_uncertainty=config.option("rank_importance") == "sensitivity",
                    shared=shared_factor(projection) if config.option("shared_outer") else "",
                )
                for projection in config.projections
            }
        )
        self.routing_signal = config.option("routing_signal")
        self.register_buffer("frequency", torch.zeros(block.num_experts))
        self.meter = RoutingMeter(block.num_experts)
        self.probes: dict[str, ProbeRows] = {}
        self.of_all_blocks: Sequence[ExpertsAdapter] = (self,)

    def refuse_unplaced(self) -> None:
        """Refuse to be trained where rows of no block are placed, and some should be.

        Raises:
            ConfigError: saying how rows are placed.
        """
        if not self.config.starts_from_data:
            return
        is_owned = any(pool.offsets[-1] for pool in self.rank_pools.values())
        if is_owned and not self.config.recorded(ROWS_TO_LAY):
            return
        pools = [pool for found in self.of_all_blocks for pool in found.rank_pools.values()]
        if any(pool.lora_B.requires_grad for pool in pools):
            refuse_unplaced(self.config, sum(pool.offsets[-1] for pool in pools))

    @property
    def rank_pools(self) -> dict[str, RankPool]:
        """Projection -> pool."""
        return cast("dict[str, RankPool]", dict(self.pools.items()))

    def pieces(self, dtype: torch.dtype, experts: range | None = None) -> list[LoraPiece]:
        """What the engines need of each pool.

        Args:
            dtype: of the rows.
            experts: those that are computed here, numbered from 0 in the result; by default all.
        """
        result = []
        for projection, pool in self.rank_pools.items():
            matrix, start, step = self.block.place_of(projection)
            a_RI, b_RO = pool(dtype, experts)
            offsets, scaling = _of_experts(pool.offsets, experts), self.config.scaling
            result.append(LoraPiece(matrix, start, a_RI, b_RO, offsets, scaling, step))
        for projection, probe in self.probes.items():
            matrix, start, step = self.block.place_of(projection)
            offsets = _of_experts(probe.offsets, experts)
            first = probe.offsets[experts.start] if experts is not None else 0
            a_RI, b_RO = (
                rows[first : first + offsets[-1]].to(dtype) for rows in (probe.a_RI, probe.b_RO)
            )
            result.append(LoraPiece(matrix, start, a_RI, b_RO, offsets, 1.0, step))
        return result

    def traced_pieces(self, dtype: torch.dtype) -> list[TracedPiece]:
        """The same under torch.compile."""
        result = []
        for projection, pool in self.rank_pools.items():
            matrix, start, step = self.block.place_of(projection)
            a_RI, b_RO = pool.all_rows(dtype)
            bounds, scaling = pool.offset_E1, self.config.scaling
            result.append(TracedPiece(matrix, start, a_RI, b_RO, bounds, scaling, step))
        for projection, probe in self.probes.items():
            matrix, start, step = self.block.place_of(projection)
            a_RI, b_RO = probe.a_RI.to(dtype), probe.b_RO.to(dtype)
            bounds = torch.tensor(probe.offsets, device="cpu")
            result.append(TracedPiece(matrix, start, a_RI, b_RO, bounds, 1.0, step))
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertsAdapter:
        before = self.frequency
        super()._apply(fn, recurse)
        self.frequency = in_float32(self.frequency, before)
        self.meter.to(self.frequency.device)
        return self

    def ranks(self) -> dict[str, list[int]]:
        """Projection -> rank of each expert."""
        return {name: pool.book.ranks().tolist() for name, pool in self.rank_pools.items()}


def _of_experts(offsets: tuple[int, ...], experts: range | None) -> tuple[int, ...]:
    """Where the rows of some experts begin, counted from the first of these rows."""
    if experts is None:
        return offsets
    first = offsets[experts.start]
    return tuple(offset - first for offset in offsets[experts.start : experts.stop + 1])
