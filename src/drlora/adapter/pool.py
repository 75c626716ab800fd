"""The LoRA rows of one block and projection, shared out to its experts.

A pool's rows are found through an index: growing changes owners, never weights, so parameters,
their optimizer state and their sharding are left alone (docs/rank-pool.md says why).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drlora.adapter.row_book import FREE, RankBook
from drlora.distributed import held_rows, local_part
from drlora.errors import CheckpointError


class RankPool(nn.Module):
    """The LoRA rows of one block and projection, whoever owns them.

    Args:
        num_experts: E.
        in_features, out_features: of the adapted matrix.
        rank: rows that each expert owns at the start.
        num_rows: R; E * r_target, the budget, unless the settings need more.
        tracks_uncertainty: whether `uncertainty` is kept, as AdaLoRA's importance needs it.

    Attributes:
        lora_A: (R, in-features) parameter. Random in every row, owned or free.
        lora_B: (R, out-features) parameter; row j is column j of LoRA's B. Zero at the start.
        owner: (R,) int32 buffer, the expert that owns the row, -1 if nobody does.
        importance: (R,) float32 buffer, g of each row; 0 for free rows.
        birth: (R,) int32 buffer, the optimizer step after which the row was claimed.
        uncertainty: (R,) float32 buffer, average deviation of each row's importance, or None.
        seed: int64 buffer, from which rows of lora_A are drawn anew (see `redraw`).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    owner: Tensor
    importance: Tensor
    uncertainty: Tensor | None
    birth: Tensor
    seed: Tensor
    row_order: Tensor

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        num_rows: int,
        tracks_uncertainty: bool = False,
    ) -> None:
        super().__init__()
        rows = num_rows
        self.book = RankBook.uniform(num_experts, rows, rank)
        self.lora_A = nn.Parameter(torch.empty(rows, in_features))
        self.lora_B = nn.Parameter(torch.zeros(rows, out_features))
        self._init_bound = 1 / math.sqrt(in_features)  # LoRA's kaiming_uniform with a = sqrt(5)
        nn.init.uniform_(self.lora_A, -self._init_bound, self._init_bound)
        self.register_buffer("owner", torch.from_numpy(self.book.owner_R).to(torch.int32))
        self.register_buffer("importance", torch.zeros(rows))
        self.register_buffer("uncertainty", torch.zeros(rows) if tracks_uncertainty else None)
        self.register_buffer("birth", torch.zeros(rows, dtype=torch.int32))
        self.register_buffer("seed", torch.randint(2**62, ()))
        # All rows, the free ones last, and where each expert's begin. Of fixed size and written in
        # place when ranks grow, so that what torch.compile made of them stays valid.
        self.register_buffer("row_order", torch.arange(rows), persistent=False)
        self.offset_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device="cpu")
        self._index_rows()

    @property
    def row_norm(self) -> float:
        """Length of a fresh row of lora_A, as the root of its mean square."""
        return self._init_bound * math.sqrt(self.lora_A.shape[1] / 3)

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
    def release(self, rows: Tensor, step: int) -> None:
        """Take rows away from their experts: what they added to the model is lost.

        They are free rows like any other then: B is zero, A drawn anew, no statistics.
        """
        self.book.release(rows.cpu().numpy())
        self.owner.copy_(torch.from_numpy(self.book.owner_R))
        local_part(self.lora_B)[held_rows(self.lora_B, rows).local] = 0.0
        self.redraw(rows, step)
        for statistic in (self.birth, self.importance, self.uncertainty):
            if statistic is not None:
                statistic[rows] = 0
        self._index_rows()

    def row_scores(self) -> Tensor:
        """(R,) float32, what rows are kept for: importance, times its uncertainty if tracked."""
        scores = self.importance if self.uncertainty is None else self.importance * self.uncertainty
        return scores.cpu()

    @property
    def state_keys(self) -> list[str]:
        """The buffers that growth depends on."""
        keys = ("owner", "importance", "uncertainty", "birth", "seed")
        return [key for key in keys if getattr(self, key) is not None]

    @torch.no_grad()
    def redraw(self, rows: Tensor, step: int) -> None:
        """Give rows of lora_A fresh initial values; lora_B is zero there.

        Needed where weight decay has shrunk them while nobody read them, and where rows were
        released. The values depend on the
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
        self.offset_E1.copy_(torch.tensor(self.offsets, device="cpu"))
        self._all_in_order = not self.book.free and bool((np.diff(order_R) == 1).all())
        if self.row_order.device != self.owner.device:  # just loaded, after a start on meta
            self.row_order = torch.empty_like(self.row_order, device=self.owner.device)
        self.row_order.copy_(torch.from_numpy(order_R))

    def _apply(self, fn: Any, recurse: bool = True) -> RankPool:
        before, uncertain_before = self.importance, self.uncertainty
        super()._apply(fn, recurse)
        self.importance = in_float32(self.importance, before)
        if self.uncertainty is not None and uncertain_before is not None:
            self.uncertainty = in_float32(self.uncertainty, uncertain_before)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # transformers' load_adapter puts tensors in one by one, past _load_from_state_dict.
        if name == "owner" and value.device.type != "meta":
            self.read_owners()

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


def in_float32(moved: Tensor, before: Tensor) -> Tensor:
    """Statistics change their device only: in 16 bits an average would hardly move."""
    return moved if moved.dtype == torch.float32 else before.to(moved.device)
