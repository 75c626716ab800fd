"""Who owns which row of a rank pool: whole numbers only, no model and no tensor.

A pool has R = E * r_target rows, exactly the budget. A row belongs to one expert or to nobody.
Growing an expert is claiming free rows for it; nothing is ever moved, so a row's weights and
optimizer moments stay where they are, whatever the optimizer keeps beside them.

    >>> book = RankBook.uniform(num_experts=2, num_rows=6, rank=1)
    >>> book.ranks().tolist()
    [1, 1]
    >>> book.grant([0, 2]).tolist()      # the rows that were claimed
    [2, 3]
    >>> book.packed().tolist()           # the owned rows, expert by expert
    [0, 1, 2, 3]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FREE = -1
IntArray = NDArray[np.int64]


@dataclass
class RankBook:
    """Owners of the rows of one pool.

    Attributes:
        owner_R: (R,) int64, the expert that owns each row, or `FREE`.
        num_experts: E.
    """

    owner_R: IntArray
    num_experts: int

    def __post_init__(self) -> None:
        self.owner_R = np.asarray(self.owner_R, dtype=np.int64)
        if self.owner_R.ndim != 1:
            raise ValueError(f"owners must be a vector, got shape {self.owner_R.shape}.")
        if self.owner_R.size and not FREE <= self.owner_R.min() <= self.owner_R.max() < (
            self.num_experts
        ):
            raise ValueError(
                f"owners must lie between {FREE} (free) and {self.num_experts - 1}, got "
                f"{self.owner_R.min()} to {self.owner_R.max()}."
            )

    @classmethod
    def uniform(cls, num_experts: int, num_rows: int, rank: int) -> RankBook:
        """Every expert owns `rank` rows, in order; the rest is free."""
        assert num_experts * rank <= num_rows
        owner_R = np.full(num_rows, FREE, dtype=np.int64)
        owner_R[: num_experts * rank] = np.repeat(np.arange(num_experts), rank)
        return cls(owner_R, num_experts)

    @property
    def free(self) -> int:
        """How many rows nobody owns."""
        return int((self.owner_R == FREE).sum())

    def ranks(self) -> IntArray:
        """(E,) int64, the rank of each expert."""
        return np.bincount(self.owner_R[self.owner_R != FREE], minlength=self.num_experts)

    def packed(self) -> IntArray:
        """(sum of ranks,) int64, the owned rows ordered by expert, then by row."""
        owned = np.flatnonzero(self.owner_R != FREE)
        return owned[np.argsort(self.owner_R[owned], kind="stable")]

    def offsets(self) -> IntArray:
        """(E + 1,) int64: expert e's rows are `packed()[offsets[e] : offsets[e + 1]]`."""
        return np.concatenate([[0], np.cumsum(self.ranks())])

    def grant(self, grants_E: Sequence[int] | IntArray) -> IntArray:
        """Claim `grants_E[e]` free rows for each expert e, lowest rows first.

        Returns:
            The claimed rows, ordered by expert.

        Raises:
            ValueError: if a grant is negative or more rows are asked for than are free; the book
                is unchanged then.
        """
        grants = np.asarray(grants_E, dtype=np.int64)
        if grants.shape != (self.num_experts,):
            raise ValueError(f"need one grant per expert ({self.num_experts}), got {grants.shape}.")
        if (grants < 0).any():
            raise ValueError(f"expert {int(grants.argmin())} is granted {grants.min()} ranks.")
        if grants.sum() > self.free:
            raise ValueError(f"{grants.sum()} rows are asked for but only {self.free} are free.")
        claimed = np.flatnonzero(self.owner_R == FREE)[: grants.sum()]
        self.owner_R[claimed] = np.repeat(np.arange(self.num_experts), grants)
        return claimed

    def release(self, rows: Sequence[int] | IntArray) -> None:
        """Free owned rows: the inverse of `grant`.

        Raises:
            ValueError: if one of them is free already; the book is unchanged then.
        """
        released = np.asarray(rows, dtype=np.int64)
        free = released[self.owner_R[released] == FREE]
        if free.size:
            raise ValueError(f"row {int(free[0])} is to be released but nobody owns it.")
        self.owner_R[released] = FREE


def in_turns(owner_R: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """(experts, rows): the lowest row of each expert, then the second of each that has one, ...

    Sums over the rows of each expert that are added up turn by turn have the same order, and so
    the same value, on every device; no expert comes twice in one turn.

        >>> [(e.tolist(), r.tolist()) for e, r in in_turns(np.array([1, -1, 0, 1]))]
        [([0, 1], [2, 0]), ([1], [3])]
    """
    owned = np.flatnonzero(owner_R != FREE)
    rows_S = owned[np.argsort(owner_R[owned], kind="stable")]
    experts_S = owner_R[rows_S].astype(np.int64)
    first_S = np.searchsorted(experts_S, experts_S, side="left")
    turn_S = np.arange(len(rows_S)) - first_S
    for turn in range(int(turn_S.max(initial=-1)) + 1):
        now = turn_S == turn
        yield experts_S[now], rows_S[now]
