"""The adapter on a block's experts: rank pools, and the module that takes the experts' place.

    DrLoraExperts                 wraps transformers' experts module, same call
      base_layer                  the frozen experts
      drlora_adapters             one ExpertsAdapter per PEFT adapter name
        pools                     one RankPool per projection: lora_A, lora_B, owners, importance
        frequency                 (E,) routing frequency f

A pool's rows are found through an index: growing changes owners, never weights, so parameters,
their optimizer state and their sharding are left alone (docs/rank-pool.md says why).
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from drlora.blocks import MoEBlock, expert_weights
from drlora.config import DrLoraConfig
from drlora.errors import CheckpointError, ConfigError
from drlora.observe import RoutingMeter, TokenMask, count_in_backward, routing_sums
from drlora.ops import LoraPiece, Matrix, TracedPiece, adapted_experts, traced_experts
from drlora.ranks import FREE, RankBook
from drlora.young_rows import held_rows, local_part


class RankPool(nn.Module):
    """The LoRA rows of one block and projection: R = E * r_target of them, whoever owns them.

    Attributes:
        lora_A: (R, in-features) parameter. Random in every row, owned or free.
        lora_B: (R, out-features) parameter; row j is column j of LoRA's B. Zero at the start.
        owner: (R,) int32 buffer, the expert that owns the row, -1 if nobody does.
        importance: (R,) float32 buffer, g of each row; 0 for free rows.
        birth: (R,) int32 buffer, the optimizer step after which the row was claimed.
        seed: int64 buffer, from which rows of lora_A are drawn anew (see `redraw`).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    owner: Tensor
    importance: Tensor
    birth: Tensor
    seed: Tensor
    row_order: Tensor

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, r_init: int, r_target: int
    ) -> None:
        super().__init__()
        rows = num_experts * r_target
        self.book = RankBook.uniform(num_experts, rows, r_init)
        self.lora_A = nn.Parameter(torch.empty(rows, in_features))
        self.lora_B = nn.Parameter(torch.zeros(rows, out_features))
        self._init_bound = 1 / math.sqrt(in_features)  # LoRA's kaiming_uniform with a = sqrt(5)
        nn.init.uniform_(self.lora_A, -self._init_bound, self._init_bound)
        self.register_buffer("owner", torch.from_numpy(self.book.owner_R).to(torch.int32))
        self.register_buffer("importance", torch.zeros(rows))
        self.register_buffer("birth", torch.zeros(rows, dtype=torch.int32))
        self.register_buffer("seed", torch.randint(2**62, ()))
        # All rows, the free ones last, and where each expert's begin. Of fixed size and written in
        # place when ranks grow, so that what torch.compile made of them stays valid.
        self.register_buffer("row_order", torch.arange(rows), persistent=False)
        self.offset_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device="cpu")
        self._index_rows()

    @property
    def packed_index(self) -> Tensor:
        """(sum of ranks,) int64, the owned rows ordered by expert."""
        return self.row_order[: self.offsets[-1]]

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The owned rows of (lora_A, lora_B) in `dtype`, ordered by expert.

        Free rows are not read, so their gradient is exactly zero.
        """
        if self._all_in_order:
            return self.lora_A.to(dtype), self.lora_B.to(dtype)
        rows = self.packed_index
        return self.lora_A.index_select(0, rows).to(dtype), self.lora_B.index_select(0, rows).to(
            dtype
        )

    def all_rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `forward`, but the free rows follow: no shape and no Python value depends on ranks."""
        rows = self.row_order
        return self.lora_A.index_select(0, rows).to(dtype), self.lora_B.index_select(0, rows).to(
            dtype
        )

    def grant(self, grants_E: list[int], step: int) -> Tensor:
        """Claim free rows for each expert; returns the claimed rows.

        Nothing but owners changes: B is zero in a free row, so the model's function is the same.
        """
        rows = torch.from_numpy(self.book.grant(grants_E)).to(self.owner.device)
        self.owner.copy_(torch.from_numpy(self.book.owner_R))
        self.birth[rows] = step
        self.importance[rows] = 0.0
        self._index_rows()
        return rows

    @torch.no_grad()
    def redraw(self, rows: Tensor, step: int) -> None:
        """Give just claimed rows of lora_A fresh initial values; lora_B is zero there.

        Needed where weight decay has shrunk them while nobody read them. The values depend on the
        pool's seed and the step alone, so every process draws the same.
        """
        generator = torch.Generator().manual_seed(int(self.seed) + step)
        fresh = torch.empty(len(rows), self.lora_A.shape[1])
        fresh.uniform_(-self._init_bound, self._init_bound, generator=generator)
        held, target = held_rows(self.lora_A, rows), local_part(self.lora_A)
        target[held.local] = fresh.to(target)[held.chosen]

    def _index_rows(self) -> None:
        order_R = np.concatenate([self.book.packed(), np.flatnonzero(self.book.owner_R == FREE)])
        self.offsets = tuple(self.book.offsets().tolist())
        self.offset_E1.copy_(torch.tensor(self.offsets))
        self._all_in_order = not self.book.free and bool((np.diff(order_R) == 1).all())
        if self.row_order.device != self.owner.device:  # just loaded, after a start on meta
            self.row_order = torch.empty_like(self.row_order, device=self.owner.device)
        self.row_order.copy_(torch.from_numpy(order_R))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "owner" in state_dict:
            self.read_owners()

    def read_owners(self) -> None:
        """Take the owners over from the buffer, after it was loaded."""
        try:
            self.book = RankBook(self.owner.cpu().numpy(), self.book.num_experts)
        except ValueError as error:
            raise CheckpointError(f"the adapter's rank map is damaged: {error}") from error
        self._index_rows()


class ExpertsAdapter(nn.Module):
    """One adapter on one block's experts.

    Attributes:
        pools: projection -> RankPool.
        frequency: (E,) float32 buffer, the routing frequency f.
        meter: routing sums of the optimizer step under way.
    """

    frequency: Tensor

    def __init__(self, block: MoEBlock, config: DrLoraConfig) -> None:
        super().__init__()
        self.config = config
        self.block = block
        self.pools = nn.ModuleDict(
            {
                projection: RankPool(
                    block.num_experts, *block.shape_of(projection), config.r_init, config.r_target
                )
                for projection in config.projections
            }
        )
        self.register_buffer("frequency", torch.zeros(block.num_experts))
        self.meter = RoutingMeter(block.num_experts)

    @property
    def rank_pools(self) -> dict[str, RankPool]:
        """Projection -> pool."""
        return cast("dict[str, RankPool]", dict(self.pools.items()))

    def pieces(self, dtype: torch.dtype) -> list[LoraPiece]:
        """What the engines need of each pool."""
        result = []
        for projection, pool in self.rank_pools.items():
            matrix, start = self._place(projection)
            a_RI, b_RO = pool(dtype)
            offsets, scaling = pool.offsets, self.config.scaling
            result.append(LoraPiece(matrix, start, a_RI, b_RO, offsets, scaling))
        return result

    def traced_pieces(self, dtype: torch.dtype) -> list[TracedPiece]:
        """The same under torch.compile."""
        result = []
        for projection, pool in self.rank_pools.items():
            matrix, start = self._place(projection)
            a_RI, b_RO = pool.all_rows(dtype)
            result.append(
                TracedPiece(matrix, start, a_RI, b_RO, pool.offset_E1, self.config.scaling)
            )
        return result

    def _place(self, projection: str) -> tuple[Matrix, int]:
        """Which matrix a projection is part of, and its first output feature there."""
        start = self.block.expert_width if projection == "up" else 0
        return ("down" if projection == "down" else "gate_up"), start

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertsAdapter:
        super()._apply(fn, recurse)
        self.meter.to(self.frequency.device)
        return self

    def ranks(self) -> dict[str, list[int]]:
        """Projection -> rank of each expert."""
        return {name: pool.book.ranks().tolist() for name, pool in self.rank_pools.items()}


class DrLoraExperts(nn.Module, BaseTunerLayer):
    """Takes the place of a block's experts module and adds the active adapters' updates."""

    adapter_layer_names: tuple[str, ...] = ("drlora_adapters",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, block: MoEBlock, tokens: TokenMask) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.block = block
        self.tokens = tokens
        self.drlora_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.router_logits: Tensor | None = None
        self._disable_adapters = False
        self._unmerged: dict[str, Tensor] = {}

    def adapter(self, name: str) -> ExpertsAdapter:
        """The adapter called `name`."""
        return cast(ExpertsAdapter, self.drlora_adapters[name])

    @property
    def base_weight(self) -> Tensor:
        """One of the base weights, for its device and dtype."""
        return cast(Tensor, self.get_base_layer().gate_up_proj)

    def add_adapter(self, name: str, config: DrLoraConfig) -> None:
        """Add an adapter, on the device of the base weights and in their dtype."""
        adapter = ExpertsAdapter(self.block, config)
        if not any(p.device.type == "meta" for p in adapter.parameters()):
            adapter.to(self.base_weight.device)
            for pool in adapter.rank_pools.values():
                pool.lora_A.data = pool.lora_A.data.to(self.base_weight.dtype)
                pool.lora_B.data = pool.lora_B.data.to(self.base_weight.dtype)
            if name == "ref" and "default" in self.drlora_adapters:
                # TRL's frozen reference: it copies the parameters itself, but not who owns them.
                twin = self.adapter("default")
                if twin.config == config:
                    adapter.load_state_dict(twin.state_dict())
        self.drlora_adapters[name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output, (T, H); see `drlora.ops.adapted_experts` for the arguments."""
        logits_TE = self.router_logits
        if logits_TE is not None:
            self.router_logits = None  # if need be: a compiled, checkpointed block forbids it
        names = [name for name in self.active_adapters if name in self.drlora_adapters]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        adapters = [self.adapter(name) for name in names]
        if self.training and len({a.config.lora_dropout for a in adapters}) > 1:
            raise ConfigError(
                f"adapters {names} are active together with different lora_dropout; train one at "
                f"a time, or give them the same."
            )
        base = expert_weights(self.base_layer)
        x_TH = hidden_states.to(base.gate_up_EGH.dtype)
        dropout = adapters[0].config.lora_dropout if self.training else 0.0
        engine, routed = adapters[0].config.engine, (x_TH, top_k_index, top_k_weights, base)
        if torch.compiler.is_compiling():
            traced = [piece for adapter in adapters for piece in adapter.traced_pieces(x_TH.dtype)]
            out_TH = traced_experts(*routed, traced, dropout=dropout, engine=engine)
        else:
            pieces = [piece for adapter in adapters for piece in adapter.pieces(x_TH.dtype)]
            out_TH = adapted_experts(*routed, pieces, dropout=dropout, engine=engine)
        if self.training and torch.is_grad_enabled() and out_TH.requires_grad:
            for adapter in adapters:
                out_TH = self._observe(adapter, out_TH, top_k_index, top_k_weights, logits_TE)
        return out_TH.to(hidden_states.dtype)

    def _observe(
        self,
        adapter: ExpertsAdapter,
        out_TH: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        logits_TE: Tensor | None,
    ) -> Tensor:
        sums = routing_sums(
            adapter.config.routing_signal,
            index_TK,
            weight_TK,
            logits_TE,
            self.tokens.real_tokens(index_TK.shape[0]),
            self.block.num_experts,
        )
        return count_in_backward(out_TH, adapter.meter, *sums)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates into the base weights; `unmerge` restores them to the bit."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        for key in ("gate_up_proj", "down_proj"):
            weight = getattr(self.get_base_layer(), key)
            self._unmerged.setdefault(key, weight.detach().clone())
        self._merge_in_place(names, safe_merge)

    def unmerge(self) -> None:
        """Put the base weights back as they were before `merge`."""
        for key, weight in self._unmerged.items():
            getattr(self.get_base_layer(), key).data.copy_(weight)
        self._unmerged.clear()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base experts, with the adapters merged in if asked; keeps no copy to go back to."""
        if merge:
            self._merge_in_place(check_adapters_to_merge(self, adapter_names), safe_merge)
        return self.get_base_layer()

    @torch.no_grad()
    def _merge_in_place(self, names: list[str], safe_merge: bool) -> None:
        for name in names:
            if name not in self.drlora_adapters:
                continue
            for piece in self.adapter(name).pieces(torch.float32):
                if safe_merge and not _is_finite(piece):
                    raise ValueError(
                        f"adapter {name!r} has NaN or infinite weights in {self.block.name} "
                        f"({piece.matrix}); it was not merged."
                    )
                key = "gate_up_proj" if piece.matrix == "gate_up" else "down_proj"
                _add_update(getattr(self.get_base_layer(), key), piece)
            self.merged_adapters.append(name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if adapter_name in self.drlora_adapters:
            self.adapter(adapter_name).to(device or self.base_weight.device)

    def __repr__(self) -> str:
        return "drlora." + super().__repr__()


def _is_finite(piece: LoraPiece) -> bool:
    return bool(torch.isfinite(piece.a_RI).all() and torch.isfinite(piece.b_RO).all())


def _add_update(weight_EOI: Tensor, piece: LoraPiece) -> None:
    """weight[e] += scaling * B_e A_e, in float32, one expert at a time."""
    for expert, (start, end) in enumerate(zip(piece.offsets, piece.offsets[1:], strict=False)):
        if start < end:
            update_OI = piece.b_RO[start:end].T @ piece.a_RI[start:end] * piece.scaling
            target_OI = weight_EOI.data[expert, piece.columns]
            target_OI.copy_(target_OI.float() + update_OI)
