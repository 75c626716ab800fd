"""Ordinary tensors: one of all experts, one for each expert, and gate and up side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drlora.ops.storage.matrix import ExpertMatrix, Storage, register_storage


@register_storage
class Dense(Storage):
    """One tensor (E, O, I), or (E, I, O) and then seen transposed."""

    is_plain = True

    def __init__(self, stored: Tensor, transposed: bool = False) -> None:
        self.stored_EOI = stored.transpose(1, 2) if transposed else stored
        self.is_transposed = transposed

    @classmethod
    def recognises(cls, stored: object) -> bool:
        return isinstance(stored, Tensor)

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, outputs, inputs = self.stored_EOI.shape
        return experts, outputs, inputs

    @property
    def dtype(self) -> torch.dtype:
        return self.stored_EOI.dtype

    @property
    def device(self) -> torch.device:
        return self.stored_EOI.device

    @property
    def num_bytes(self) -> int:
        return self.stored_EOI.numel() * self.stored_EOI.element_size()

    def dense(self) -> Tensor:
        return self.stored_EOI

    def traced(self) -> tuple[list[Tensor], str]:
        return [self.stored_EOI], ""

    def views(self) -> Sequence[Tensor]:
        return self.stored_EOI.unbind()

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        return _given(self.stored_EOI[expert], out)

    def write(self, expert: int, w_OI: Tensor) -> None:
        self.stored_EOI[expert].data.copy_(w_OI)

    def snapshot(self) -> Tensor:
        return self.stored_EOI.detach().clone()

    def restore(self, kept: Tensor) -> None:
        self.stored_EOI.data.copy_(kept)


@register_storage
class Listed(Storage):
    """A tensor (O, I) for each expert, wherever they lie."""

    is_plain = True

    def __init__(self, stored: Sequence[Tensor], transposed: bool = False) -> None:
        self.stored_OI = tuple(w.T for w in stored) if transposed else tuple(stored)
        self.is_transposed = transposed

    @classmethod
    def recognises(cls, stored: object) -> bool:
        if not isinstance(stored, (list, tuple)) or not stored:
            return False
        return all(isinstance(w_OI, Tensor) for w_OI in stored)

    @property
    def shape(self) -> tuple[int, int, int]:
        outputs, inputs = self.stored_OI[0].shape
        return len(self.stored_OI), outputs, inputs

    @property
    def dtype(self) -> torch.dtype:
        return self.stored_OI[0].dtype

    @property
    def device(self) -> torch.device:
        return self.stored_OI[0].device

    @property
    def num_bytes(self) -> int:
        return sum(w_OI.numel() * w_OI.element_size() for w_OI in self.stored_OI)

    def views(self) -> Sequence[Tensor]:
        return self.stored_OI

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        return _given(self.stored_OI[expert], out)

    def write(self, expert: int, w_OI: Tensor) -> None:
        self.stored_OI[expert].data.copy_(w_OI)

    def snapshot(self) -> list[Tensor]:
        return [w_OI.detach().clone() for w_OI in self.stored_OI]

    def restore(self, kept: list[Tensor]) -> None:
        for expert, w_OI in enumerate(kept):
            self.write(expert, w_OI)


class Apart(ExpertMatrix):
    """Gate and up as matrices of their own; side by side they are what is called gate_up."""

    def __init__(self, gate: ExpertMatrix, up: ExpertMatrix) -> None:
        self.gate, self.up = gate, up
        self.fixed = gate.fixed or up.fixed
        self.is_plain = gate.is_plain and up.is_plain
        self.name = gate.name
        self.is_transposed = gate.is_transposed

    @property
    def parts(self) -> tuple[ExpertMatrix, ...]:
        return self.gate, self.up

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, outputs, inputs = self.gate.shape
        return experts, outputs + self.up.shape[1], inputs

    @property
    def dtype(self) -> torch.dtype:
        return self.gate.dtype

    @property
    def device(self) -> torch.device:
        return self.gate.device

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.up.num_bytes

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.cat([part.read(expert) for part in self.parts])
        for part, out_OI in zip(self.parts, self._split(out), strict=True):
            part.read(expert, out_OI)
        return out

    def write(self, expert: int, w_OI: Tensor) -> None:
        for part, part_OI in zip(self.parts, self._split(w_OI), strict=True):
            part.write(expert, part_OI)

    def snapshot(self) -> list[object]:
        return [part.snapshot() for part in self.parts]

    def restore(self, kept: list[object]) -> None:
        for part, of_part in zip(self.parts, kept, strict=True):
            part.restore(of_part)

    def _split(self, w_OI: Tensor) -> Sequence[Tensor]:
        return w_OI.split([part.shape[1] for part in self.parts])


def _given(stored_OI: Tensor, out: Tensor | None) -> Tensor:
    return stored_OI if out is None else out.copy_(stored_OI)
