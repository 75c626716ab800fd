"""What one call of the `loop` engine is about: experts, adapters, rows, and how these are cut.

Letters as in `drlora.ops.parts`, P for the ranks of a pool once they are filled up (`filling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drlora.ops.loop.tasks import Segment, Task
from drlora.ops.parts import LoraPiece
from drlora.ops.routing import Routing
from drlora.ops.weights import ExpertWeights


class Plan(NamedTuple):
    """What is not a tensor, or needs no gradient.

    Attributes:
        base: the frozen experts.
        pieces: with the ranks that the products have.
        places: for each piece where its rows go among these ranks; None where they stay.
        routing: of all rows that the products have; `order_S` of one that only fills is T * K.
        tasks: how the rows are cut.
        dtype: of the products.
    """

    base: ExpertWeights
    pieces: list[LoraPiece]
    places: Sequence[Tensor | None]
    routing: Routing
    tasks: list[Task]
    dtype: torch.dtype

    def take_in(self, number: int, factor_RI: Tensor) -> Tensor:
        """A factor of a piece in the working type, zero rows where its ranks are filled up."""
        place_R = self.places[number]
        if place_R is None:
            return factor_RI.to(self.dtype)
        filled_PI = self.room_for(number, factor_RI).zero_()
        return filled_PI.index_copy_(0, place_R, factor_RI.to(self.dtype))

    def give_back(self, number: int, grad_PI: Tensor, factor_RI: Tensor) -> Tensor:
        """The gradient of a factor as its owner has it."""
        place_R = self.places[number]
        return (grad_PI if place_R is None else grad_PI[place_R]).to(factor_RI.dtype)

    def room_for(self, number: int, factor_RI: Tensor) -> Tensor:
        """(P, I) of the working type, P the ranks that the products have; not initialised."""
        ranks = self.pieces[number].offsets[-1]
        return factor_RI.new_empty(ranks, factor_RI.shape[1], dtype=self.dtype)

    @property
    def segments(self) -> list[Segment]:
        """Of all tasks, in the order of the sorted rows."""
        return [segment for task in self.tasks for segment in task.segments]

    def by_task(self, rows_S: Tensor) -> Sequence[Tensor]:
        """Views of each task's rows."""
        return rows_S.split_with_sizes([task.rows for task in self.tasks])

    def by_segment(self, rows_S: Tensor) -> Sequence[Tensor]:
        """Views of each segment's rows."""
        return rows_S.split_with_sizes([segment.rows for segment in self.segments])
