"""The LoRA rows of one block and projection, shared out to its experts.

A pool's rows are found through an index: growing changes owners, never weights, so parameters,
their optimizer state and their sharding are left alone (docs/rank-pool.md says why).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from drlora.adapter.row_book import FREE, IntArray, RankBook
from drlora.adapter.shared_rows import in_common
from drlora.distributed.held import write_rows
from drlora.errors import CheckpointError


class RankPool(nn.Module):
    """The LoRA rows of one block and projection, whoever owns them.

    Args:
        num_experts: E.
        in_features, out_features: of the adapted matrix.
        rank: rows that each expert owns at the start.
        num_rows: R; E * r_target, the budget, unless the settings need more.
        tracks_uncertainty: whether `uncertainty` is kept, as AdaLoRA's importance needs it.
        shared: `lora_A` or `lora_B` where all experts have that factor in common, else empty.

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
        shared: str = "",
    ) -> None:
        super().__init__()
        rows = num_rows
        self._book = RankBook.uniform(num_experts, rows, rank)
        self.in_features, self.out_features = in_features, out_features
        self.lora_A = nn.Parameter(torch.empty(rows, in_features))
        self.lora_B = nn.Parameter(torch.zeros(rows, out_features))
        self._init_bound = 1 / math.sqrt(in_features)  # LoRA's kaiming_uniform with a = sqrt(5)
        nn.init.uniform_(self.lora_A, -self._init_bound, self._init_bound)
        self.shared = shared
        if shared == "lora_A":  # copies that begin equal
            self.lora_A.data.copy_(self.lora_A.data[:rank].repeat(num_experts, 1))
        self.register_buffer("owner", torch.from_numpy(self._book.owner_R).to(torch.int32))
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
    def book(self) -> RankBook:
        """Who owns which row, on the host."""
        self._follow_owners()
        return self._book

    @property
    def offsets(self) -> tuple[int, ...]:
        """E + 1: where the rows of each expert begin in `packed_index`."""
        self._follow_owners()
        return self._offsets

    @property
    def row_norm(self) -> float:
        """Length of a fresh row of lora_A, as the root of its mean square."""
        return self._init_bound * math.sqrt(self.in_features / 3)

    @property
    def packed_index(self) -> Tensor:
        """(sum of ranks,) int64, the owned rows ordered by expert."""
        owned = self.offsets[-1]
        return self.row_order[:owned]

    def forward(self, dtype: torch.dtype, experts: range | None = None) -> tuple[Tensor, Tensor]:
        """The owned rows of (lora_A, lora_B) in `dtype`, ordered by expert.

        Free rows are not read, so their gradient is exactly zero.

        Args:
            dtype: of what is returned.
            experts: whose rows alone; by default those of all.
        """
        self._follow_owners()
        # As a unit of FSDP2 the parameters are gathered for this call only: rows are copied then.
        a_RI, b_RO = self._factors()
        if self._all_in_order and experts is None and not isinstance(self, FSDPModule):
            return a_RI.to(dtype), b_RO.to(dtype)
        rows = self.packed_index
        if experts is not None:
            rows = rows[self._offsets[experts.start] : self._offsets[experts.stop]]
        return a_RI.index_select(0, rows).to(dtype), b_RO.index_select(0, rows).to(dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, one of them tied where it is common to all experts."""
        a_RI, b_RO, experts = self.lora_A, self.lora_B, self._book.num_experts
        if self.shared == "lora_A":
            return in_common(a_RI, experts), b_RO
        return a_RI, in_common(b_RO, experts) if self.shared else b_RO

    @property
    def spare_numbers(self) -> int:
        """Numbers that are trained only in copies of others, or not at all: rows nobody owns."""
        widths = {"lora_A": self.in_features, "lora_B": self.out_features}
        free, copies = self.book.free, 0
        if self.shared:
            rows = len(self.owner)
            copies = (rows - rows // self._book.num_experts) * widths[self.shared]
        return free * sum(widths.values()) + copies

    def all_rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `forward`, but the free rows follow: no shape and no Python value depends on ranks."""
        self._follow_owners()
        rows = self.row_order
        a_RI, b_RO = self._factors()
        return a_RI.index_select(0, rows).to(dtype), b_RO.index_select(0, rows).to(dtype)

    def set_ranks(self, ranks_E: Sequence[int] | IntArray) -> None:
        """Give every expert its rank, whoever owned the rows: from the first row on, in order.

        What the rows hold stays. A row that changes hands has no birth and no statistics.

        Args:
            ranks_E: (E,) ranks, at most R together.

        Raises:
            ValueError: if there are more ranks than rows, or not one for each expert; the pool is
                unchanged then.
        """
        ranks = np.asarray(ranks_E, dtype=np.int64)
        book = RankBook.uniform(self._book.num_experts, len(self.owner), 0)
        book.grant(ranks)
        self.set_owners(book.owner_R)

    @torch.no_grad()
    def set_owners(self, owner_R: IntArray) -> None:
        """Give every row its owner, as `set_ranks` does where it matters which rows they are.

        Args:
            owner_R: (R,) the expert of each row, -1 for nobody.

        Raises:
            ValueError: if it has another length, or an expert that does not exist; the pool is
                unchanged then.
        """
        if np.shape(owner_R) != (len(self.owner),):
            raise ValueError(f"{np.shape(owner_R)} owners for {len(self.owner)} rows.")
        book = RankBook(np.array(owner_R), self._book.num_experts)
        changed = torch.from_numpy(self.book.owner_R != book.owner_R).to(self.owner.device)
        self._take(book)
        for statistic in (self.birth, self.importance, self.uncertainty):
            if statistic is not None:
                statistic[changed] = 0

    @torch.no_grad()
    def forget_births(self, after: int = 0) -> None:
        """Rows that were born after that step are old: births that a run finds are another's."""
        self.birth[self.birth > after] = 0

    def grant(self, grants_E: Sequence[int] | IntArray, step: int) -> Tensor:
        """Claim free rows for each expert; returns the claimed rows.

        Nothing but owners changes: B is zero in a free row, so the model's function is the same.
        """
        rows = torch.from_numpy(self.book.grant(grants_E)).to(self.owner.device)
        self._take(self._book)
        self.birth[rows] = step
        self.importance[rows] = 0.0
        return rows

    @torch.no_grad()
    def release(self, rows: Tensor, step: int) -> None:
        """Take rows away from their experts: what they added to the model is lost.

        They are free rows like any other then: B is zero, A drawn anew, no statistics.
        """
        self.book.release(rows.cpu().numpy())
        self._take(self._book)
        self.redraw(rows, step)
        for statistic in (self.birth, self.importance, self.uncertainty):
            if statistic is not None:
                statistic[rows] = 0

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
        """Give rows of lora_A fresh initial values, and zeros to those of lora_B.

        Needed where weight decay has shrunk them while nobody read them, where moments of 8 bits
        have moved them by what zero is rounded to, and where rows were released. The values depend
        on the pool's seed and the step alone, so every process draws the same.
        """
        generator = torch.Generator().manual_seed(int(self.seed) + step)
        fresh = torch.empty(len(rows), self.in_features)
        fresh.uniform_(-self._init_bound, self._init_bound, generator=generator)
        write_rows(self.lora_A, rows, fresh)
        write_rows(self.lora_B, rows, 0.0)

    def _take(self, book: RankBook) -> None:
        """Write the owners of a book into the buffer."""
        self._book = book
        self.owner.copy_(torch.from_numpy(book.owner_R))
        self._index_rows()

    def _index_rows(self) -> None:
        order_R = np.concatenate([self._book.packed(), np.flatnonzero(self._book.owner_R == FREE)])
        self._offsets = tuple(self._book.offsets().tolist())
        self.offset_E1.copy_(torch.tensor(self._offsets, device="cpu"))
        self._all_in_order = not self._book.free and bool((np.diff(order_R) == 1).all())
        if self.row_order.device != self.owner.device:  # just loaded, after a start on meta
            self.row_order = torch.empty_like(self.row_order, device=self.owner.device)
        self.row_order.copy_(torch.from_numpy(order_R))
        self._owner_read, self._version_read = self.owner, _version(self.owner)

    def _apply(self, fn: Any, recurse: bool = True) -> RankPool:
        before, uncertain_before = self.importance, self.uncertainty
        super()._apply(fn, recurse)
        self.importance = in_float32(self.importance, before)
        if self.uncertainty is not None and uncertain_before is not None:
            self.uncertainty = in_float32(self.uncertainty, uncertain_before)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in ("lora_A", "lora_B"):
            found, here = state_dict.get(prefix + key), getattr(self, key)
            if found is not None and isinstance(found, DTensor) != isinstance(here, DTensor):
                state_dict = {**state_dict, prefix + key: _placed_as(here, found)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "owner" in state_dict:
            self._read_owners()

    def _follow_owners(self) -> None:
        """Read the owners where the buffer is another one than it was, or was written into.

        transformers' load_adapter puts tensors in one by one, past `_load_from_state_dict`; an
        average of models is copied into the buffers of one. DDP writes them in every step, as they
        are, and to read them would make the host wait for the device: what it wrote is not looked
        at. A compiled graph cannot look either; the next call outside of one does.
        """
        if self.owner is not self._owner_read:
            self._read_owners()
        elif not torch.compiler.is_compiling() and _version(self.owner) != self._version_read:
            if not _in_ddp() and not self._is_as_read():
                self._read_owners()
            self._version_read = _version(self.owner)

    def _is_as_read(self) -> bool:
        """Whether the owners are those of the book; waits for the device."""
        return self.owner.is_meta or np.array_equal(self.owner.cpu().numpy(), self._book.owner_R)

    def _read_owners(self) -> None:
        if self.owner.device.type == "meta":
            return
        try:
            self._book = RankBook(self.owner.cpu().numpy(), self._book.num_experts)
        except ValueError as error:
            raise CheckpointError(f"the adapter's rank map is damaged: {error}") from error
        self._index_rows()


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; nobody counts that of one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _in_ddp() -> bool:
    """Whether this is a call by DistributedDataParallel, which has just sent the buffers out."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def _placed_as(here: Tensor, found: Tensor) -> Tensor:
    """A tensor in full where a parameter is whole, and in shards where it is sharded."""
    if isinstance(found, DTensor):
        return found.full_tensor()
    assert isinstance(here, DTensor)
    # Every process has read the whole tensor, so nothing need be sent.
    whole = found.to(here.device)
    return distribute_tensor(whole, here.device_mesh, here.placements, src_data_rank=None)


def in_float32(moved: Tensor, before: Tensor) -> Tensor:
    """Statistics change their device only: in 16 bits an average would hardly move."""
    return moved if moved.dtype == torch.float32 else before.to(moved.device)
