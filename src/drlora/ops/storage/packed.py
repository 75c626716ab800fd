"""Experts kept in few bits: what takes the place of a parameter, and how one expert is made wide.

    module.gate_up_proj = Packed.of(module.gate_up_proj, NF4())     # (E, O, I) in a quarter of it

A format says how ONE matrix (O, I) is packed and read. `Packed` holds the parts of all E of them as
parameters without a gradient, so that they move, save and load with the model. No numbers but
those of one expert are ever wide: engines read an expert into a buffer, in the forward and again in
the backward pass, and autograd keeps nothing of it.

Letters: E experts, O output features, I input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from drlora.errors import ConfigError
from drlora.ops.scratch import scratch
from drlora.ops.storage.matrix import Coded, ExpertMatrix, Storage, as_matrix, register_storage

Parts = Mapping[str, Tensor]
TILE = 2**19  # numbers that a CPU's cache holds while they are computed


class PackedFormat(ABC):
    """A way to pack one matrix (O, I) in few bits.

    Attributes:
        name: what users call it.
        bits: of storage a number, scales among them, without those of a row.
        says: why nothing can be merged into it, as the end of a sentence.
        row_scale: the part that has one scale for each row, and all scales there are; None where
            there is no such part.
    """

    name: ClassVar[str]
    bits: ClassVar[float]
    says: ClassVar[str]
    row_scale: ClassVar[str | None] = None

    def refuses(self, outputs: int, inputs: int) -> str | None:
        """Why a matrix of this shape cannot be packed; None if it can."""
        return None

    @abstractmethod
    def encode(self, w_OI: Tensor) -> dict[str, Tensor]:
        """The parts of one matrix, which may be of any float dtype and is read in float32."""

    @abstractmethod
    def decode(self, parts: Parts, out_OI: Tensor) -> Tensor:
        """Fill `out_OI`, contiguous and of a float dtype, with the numbers; each is rounded once.

        Args:
            parts: as `encode` gives them.
            out_OI: what is filled and returned.
        """

    def decode_unscaled(self, parts: Parts, out_OI: Tensor) -> Tensor:
        """As `decode`, without the scales of rows; only where `row_scale` names them."""
        raise NotImplementedError

    def coded(self, parts: Parts) -> Coded | None:
        """The parts of all experts as a kernel reads them; None where it cannot."""
        return None

    @abstractmethod
    def shape(self, parts: Parts) -> tuple[int, int]:
        """(O, I) of the matrix that has these parts."""


class BlockFormat(PackedFormat):
    """A format in which so many neighbours in a row share a scale.

    Attributes:
        block: how many.
    """

    block: ClassVar[int]

    def refuses(self, outputs: int, inputs: int) -> str | None:
        """Rows of another length."""
        if inputs % self.block:
            return f"{inputs} numbers a row are no multiple of {self.block}, which share a scale"
        return None


def refuse_infinite(w_OI: Tensor, name: str) -> None:
    """A scale that is not finite would take its whole block, or row, along.

    Raises:
        ConfigError: if a number of the matrix called `name` is NaN or infinite.
    """
    least, most = w_OI.aminmax()  # NaN comes through
    if not (least.isfinite() and most.isfinite()):
        raise ConfigError(
            f"{name}: a matrix has numbers that are NaN or infinite, which cannot be packed. The "
            f"checkpoint is damaged, or overflowed in float16; get it anew."
        )


def row_tiles(out_OI: Tensor, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `out_OI`, and as many of float32 to compute them in before they are rounded.

    On a CPU there are no more at a time than its cache holds; those of the next are the same.

    Args:
        out_OI: what is to be filled.
        multiple: of rows that stay together.
    """
    outputs, inputs = out_OI.shape
    at_once = outputs
    if out_OI.device.type == "cpu":
        at_once = min(outputs, max(1, TILE // (inputs * multiple)) * multiple)
    wide_nI = scratch("numbers", at_once, inputs, torch.float32, out_OI.device)
    for first in range(0, outputs, at_once):
        rows = slice(first, min(first + at_once, outputs))
        yield rows, wide_nI[: rows.stop - first]


FORMATS: dict[str, PackedFormat] = {}


def register_format(kind: PackedFormat) -> PackedFormat:
    """Make a format known by its name, to `quantise_experts` and to recipes."""
    return FORMATS.setdefault(kind.name, kind)


def packed_format(name: str) -> PackedFormat:
    """The format called `name`.

    Raises:
        ConfigError: with those that there are.
    """
    if name not in FORMATS:
        raise ConfigError(f"storage {name!r} is not known; choose one of {sorted(FORMATS)}.")
    return FORMATS[name]


class Packed(nn.Module):
    """E matrices (O, I) in the place of the parameter that held them.

    Attributes:
        kind: the format.
        dtype: what the numbers are computed in.
    """

    def __init__(self, kind: PackedFormat, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    @classmethod
    def of(cls, w_EOI: Tensor, kind: PackedFormat) -> Packed:
        """The same matrices, packed one after the other.

        Raises:
            ConfigError: if the format cannot take their shape, or a number is not finite.
        """
        reason = kind.refuses(*w_EOI.shape[1:])
        if reason:
            raise ConfigError(f"experts of shape {tuple(w_EOI.shape)} as {kind.name}: {reason}.")
        parts: dict[str, Tensor] = {}
        for expert, w_OI in enumerate(w_EOI):
            refuse_infinite(w_OI, f"expert {expert}")
            for name, part in kind.encode(w_OI).items():
                if name not in parts:
                    parts[name] = part.new_empty(len(w_EOI), *part.shape)
                parts[name][expert] = part
        return cls(kind, parts, w_EOI.dtype)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Name -> the part of all experts."""
        return dict(self.named_parameters(recurse=False))

    def parts_of(self, expert: int) -> dict[str, Tensor]:
        """Name -> the part of one expert."""
        return {name: part[expert] for name, part in self.parts.items()}

    @property
    def shape(self) -> torch.Size:
        """(E, O, I)."""
        return torch.Size(
            (len(next(iter(self.parts.values()))), *self.kind.shape(self.parts_of(0)))
        )

    def wide(self) -> Tensor:
        """(E, O, I), all of it, new: for tests and exports."""
        out_EOI = torch.empty(self.shape, dtype=self.dtype, device=next(self.parameters()).device)
        for expert, out_OI in enumerate(out_EOI):
            self.kind.decode(self.parts_of(expert), out_OI)
        return out_EOI

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Parts move, and never change their dtype: `model.half()` would round the scales.

        A change of dtype is one of what is computed in.
        """
        dtypes = {name: part.dtype for name, part in self.parts.items()}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        kept = {name: part.data for name, part in self.parts.items()}
        super()._apply(fn, recurse)
        for name, part in self.parts.items():
            if part.dtype != dtypes[name]:
                part.data = kept[name].to(part.device)
        return self

    def extra_repr(self) -> str:
        experts, outputs, inputs = self.shape
        return f"{self.kind.name}, {experts} x ({outputs}, {inputs}), computed in {self.dtype}"


class Held(NamedTuple):
    """Parts of all experts, wherever they lie; what `PackedMatrix` reads of a `Packed`."""

    kind: PackedFormat
    parts: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        of_first = {name: part[0] for name, part in self.parts.items()}
        return (len(next(iter(self.parts.values()))), *self.kind.shape(of_first))


@register_storage
class PackedMatrix(Storage):
    """Of `Packed`: one of all experts."""

    def __init__(self, stored: Packed | Held, transposed: bool = False) -> None:
        self.stored, self.is_transposed = stored, transposed
        self.fixed, self.name = stored.kind.says, stored.kind.name
        outputs, inputs = stored.shape[1:]
        self._shape = (stored.shape[0], *((inputs, outputs) if transposed else (outputs, inputs)))
        parts = stored.parts
        self._device = next(iter(parts.values())).device
        self._parts = parts

    @cached_property
    def _of_expert(self) -> list[Parts]:
        """Cut once a forward pass: engines read an expert at a time."""
        cut = [part.unbind() for part in self._parts.values()]
        return [dict(zip(self._parts, own, strict=True)) for own in zip(*cut, strict=True)]

    @classmethod
    def recognises(cls, stored: object) -> bool:
        return isinstance(stored, Packed)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def num_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.stored.parts.values())

    def traced(self) -> tuple[list[Tensor], str]:
        dtype = str(self.dtype).removeprefix("torch.")
        turned = "turned" if self.is_transposed else "upright"
        return list(self._parts.values()), " ".join([self.name, dtype, turned, *self._parts])

    def coded(self) -> Coded | None:
        found = self.stored.kind.coded(self._parts)
        return found and found._replace(is_turned=self.is_transposed)

    def late_scales(self) -> Tensor | None:
        name = self.stored.kind.row_scale
        # Of (I, O), rows are in-features.
        return None if name is None or self.is_transposed else self.stored.parts[name]

    def bits_of(self, expert: int) -> Parts:
        return self._parts_of(expert)

    def read_unscaled(self, expert: int, out: Tensor) -> Tensor:
        return self.stored.kind.decode_unscaled(self._parts_of(expert), out)

    def _parts_of(self, expert: int) -> Parts:
        return self._of_expert[expert]

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        parts = self._parts_of(expert)
        if not self.is_transposed:
            if out is None:
                out = torch.empty(self._shape[1:], dtype=self.dtype, device=self._device)
            return self.stored.kind.decode(parts, out)
        # Packed as it was stored, (I, O): made wide so, and turned.
        _, outputs, inputs = self._shape
        dtype = self.dtype if out is None else out.dtype
        wide_IO = torch.empty(inputs, outputs, dtype=dtype, device=self._device)
        self.stored.kind.decode(parts, wide_IO)
        return wide_IO.T.contiguous() if out is None else out.copy_(wide_IO.T)


@register_storage
class HeldMatrix(PackedMatrix):
    """Of `Held`."""

    def __init__(self, stored: Any, transposed: bool = False) -> None:
        super().__init__(stored, transposed)

    @classmethod
    def recognises(cls, stored: object) -> bool:
        return isinstance(stored, Held)


def from_traced(tensors: Sequence[Tensor], words: str) -> ExpertMatrix:
    """The matrix of which `ExpertMatrix.traced` gave these."""
    if not words:
        return as_matrix(tensors[0])
    name, dtype, turned, *parts = words.split()
    held = Held(packed_format(name), dict(zip(parts, tensors, strict=True)), getattr(torch, dtype))
    return HeldMatrix(held, turned == "turned")
