"""Packed matrices that lie in another way than the parameter whose place they take.

Checkpoints that are quantised already say how: a gate and an up that cannot be joined without
changing a byte (`PackedPair`), or rows that are output features in a model whose own parameter has
them in columns (`Upright`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from drlora.ops.storage.matrix import Coded, Storage, register_storage
from drlora.ops.storage.packed import Packed, PackedFormat, PackedMatrix, Parts
from drlora.ops.storage.plain import Apart


class PackedPair(nn.Module):
    """Gate and up of E experts, packed each for itself."""

    def __init__(self, gate: Packed, up: Packed) -> None:
        super().__init__()
        self.gate, self.up = gate, up

    @property
    def kind(self) -> PackedFormat:
        """The format of both."""
        return self.gate.kind

    @property
    def dtype(self) -> torch.dtype:
        """What both are computed in."""
        return self.gate.dtype

    @property
    def shape(self) -> torch.Size:
        """(E, O, I) of gate over up."""
        experts, outputs, inputs = self.gate.shape
        return torch.Size((experts, outputs + self.up.shape[1], inputs))

    def wide(self) -> Tensor:
        """(E, O, I), all of it, new: for tests and exports."""
        return torch.cat([self.gate.wide(), self.up.wide()], dim=1)


class Upright(Packed):
    """(E, O, I) in the place of a parameter (E, I, O)."""


@register_storage
class PairMatrix(Apart, Storage):
    """Of `PackedPair`."""

    def __init__(self, stored: PackedPair, transposed: bool = False) -> None:
        assert not transposed, "gate and up are apart only where both are (O, I)"
        Apart.__init__(self, PackedMatrix(stored.gate), PackedMatrix(stored.up))

    @classmethod
    def recognises(cls, stored: object) -> bool:
        return isinstance(stored, PackedPair)


@register_storage
class UprightMatrix(Storage):
    """Of `Upright`. It is `is_transposed` as the model's own parameter is: exports go by that."""

    def __init__(self, stored: Upright, transposed: bool = False) -> None:
        self._inner = PackedMatrix(stored)
        self.is_transposed = transposed
        self.fixed, self.name = self._inner.fixed, self._inner.name

    @classmethod
    def recognises(cls, stored: object) -> bool:
        return isinstance(stored, Upright)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._inner.dtype

    @property
    def device(self) -> torch.device:
        return self._inner.device

    @property
    def num_bytes(self) -> int:
        return self._inner.num_bytes

    def traced(self) -> tuple[list[Tensor], str] | None:
        return self._inner.traced()

    def coded(self) -> Coded | None:
        return self._inner.coded()

    def bits_of(self, expert: int) -> Parts:
        return self._inner.bits_of(expert)

    def late_scales(self) -> Tensor | None:
        return self._inner.late_scales()

    def read_unscaled(self, expert: int, out: Tensor) -> Tensor:
        return self._inner.read_unscaled(expert, out)

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        return self._inner.read(expert, out)


@register_storage
class ListedPacked(Storage):
    """Of `Packed`, one for each expert."""

    def __init__(self, stored: Sequence[Packed], transposed: bool = False) -> None:
        self._inner = [PackedMatrix(one, transposed) for one in stored]
        first = self._inner[0]
        self.is_transposed, self.fixed, self.name = transposed, first.fixed, first.name

    @classmethod
    def recognises(cls, stored: object) -> bool:
        if not isinstance(stored, (list, tuple)) or not stored:
            return False
        return all(type(one) is Packed and one.shape[0] == 1 for one in stored)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self._inner), *self._inner[0].shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self._inner[0].dtype

    @property
    def device(self) -> torch.device:
        return self._inner[0].device

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self._inner)

    def bits_of(self, expert: int) -> Parts:
        return self._inner[expert].bits_of(0)

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        return self._inner[expert].read(0, out)


InPlace = Packed | PackedPair
"""What can be in the place of a parameter, and hold its matrices in few bits."""


def is_in_place(stored: object) -> TypeGuard[InPlace]:
    """Whether a module is one of these."""
    return isinstance(stored, (Packed, PackedPair))


def as_parameter(matrix: InPlace) -> Tensor:
    """The numbers as the parameter had them whose place it takes, new."""
    wide = matrix.wide()
    return wide.transpose(1, 2).contiguous() if isinstance(matrix, Upright) else wide
