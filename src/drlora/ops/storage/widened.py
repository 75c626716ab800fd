"""A matrix of all experts as if it were stored in another dtype: one expert is wide at a time.

Letters as in `matrix`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drlora.ops.storage.matrix import ExpertMatrix


class Widened(ExpertMatrix):
    """The numbers of another matrix, read in `dtype`.

    Args:
        matrix: of any storage.
        dtype: of what is read.
    """

    def __init__(self, matrix: ExpertMatrix, dtype: torch.dtype) -> None:
        self._matrix, self._dtype = matrix, dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        return self._matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """What is read."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Of the other."""
        return self._matrix.device

    @property
    def num_bytes(self) -> int:
        """Of the other."""
        return self._matrix.num_bytes

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        """(O, I) of one expert; see `ExpertMatrix.read`."""
        if out is not None:
            return self._matrix.read(expert, out)
        return self._matrix.read(expert).to(self._dtype)
