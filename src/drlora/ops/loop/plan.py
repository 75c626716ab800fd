"""What one call of the `loop` engine is about: experts, adapters, rows, and how these are cut.

Letters as in `drlora.ops.parts`.
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
    """What is not a tensor, or needs no gradient."""

    base: ExpertWeights
    pieces: list[LoraPiece]
    routing: Routing
    tasks: list[Task]
    dtype: torch.dtype

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
