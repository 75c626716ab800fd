"""The memory that a thread of the `loop` engine works in: rows of a task, and one wide expert.

Letters as in `drlora.ops.parts`, n for the rows of a task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.loop.plan import Plan
from drlora.ops.loop.tasks import Task
from drlora.ops.scratch import scratch
from drlora.ops.weights import ExpertMatrix


class Widen:
    """An expert's matrix in the working type, in a buffer that is used again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.buffer: Tensor | None = None
        self.read_OI: Tensor | None = None

    def __call__(self, weight_IO: Tensor) -> Tensor:
        if weight_IO.dtype == self.dtype:
            return weight_IO
        if self.buffer is None:
            self.buffer = torch.empty_like(weight_IO, dtype=self.dtype)
        return self.buffer.copy_(weight_IO)

    def read(self, matrix: ExpertMatrix, expert: int, unscaled: bool = False) -> Tensor:
        """(O, I) of an expert that is stored in another form, maybe without its late scales."""
        shape = matrix.shape[1:]
        if self.read_OI is None or self.read_OI.shape != shape:
            self.read_OI = scratch("wide expert", *shape, self.dtype, matrix.device)
        if unscaled:
            return matrix.read_unscaled(expert, self.read_OI)
        return matrix.read(expert, self.read_OI)


class Buffers:
    """A thread's buffers, as large as the largest task needs."""

    def __init__(self, plan: Plan) -> None:
        self.rows = max((task.rows for task in plan.tasks), default=0)
        self.dtype, self.device = plan.dtype, plan.routing.order_S.device
        self.kept: dict[str, Tensor] = {}

    def get(self, name: str, task: Task, width: int) -> Tensor:
        """(rows of the task, width); its content is whatever was there."""
        if name not in self.kept:
            self.kept[name] = scratch(name, self.rows, width, self.dtype, self.device)
        return self.kept[name][: task.rows]

    def instead(self, name: str, task: Task, stored_nO: Tensor) -> Tensor:
        """The stored rows themselves if they are of the working type, else a buffer for them."""
        if stored_nO.dtype == self.dtype:
            return stored_nO
        return self.get(name, task, stored_nO.shape[1])

    def filled(self, name: str, task: Task, stored_nO: Tensor) -> Tensor:
        """The stored rows in the working type."""
        if stored_nO.dtype == self.dtype:
            return stored_nO
        return self.get(name, task, stored_nO.shape[1]).copy_(stored_nO)


def write_back(stored_nO: Tensor, computed_nO: Tensor) -> None:
    if stored_nO is not computed_nO:
        stored_nO.copy_(computed_nO)
