"""Matrices in few bits that other libraries keep in objects of their own, read without a copy.

    bitsandbytes   a list of `Params4bit`, the weights of `Linear4bit` layers: NF4
                   a parameter of all experts under `replace_parameter_4bit`: NF4 (`Held`)
    torchao        one `Int8Tensor` of all experts, with a scale for each row: INT8
    transformers   `FP8Experts`, whose scales are a parameter beside the numbers: FP8 (`Held`)

None of these libraries is imported: the objects are known by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drlora.ops.storage.matrix import Storage, register_storage
from drlora.ops.storage.nf4 import BLOCK, NESTED_BLOCK
from drlora.ops.storage.packed import Held, HeldMatrix, Parts, packed_format


@register_storage
class TorchaoInt8(HeldMatrix):
    """Of an `Int8Tensor`, which says that it is of 16 bits."""

    def __init__(self, stored: Any, transposed: bool = False) -> None:
        parts = {"codes": stored.qdata, "scale": stored.scale[..., 0].float()}
        super().__init__(Held(packed_format("int8"), parts, stored.dtype), transposed)

    @classmethod
    def recognises(cls, stored: object) -> bool:
        if not _is(stored, "torchao", "Int8Tensor"):
            return False
        weight: Any = stored
        others = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")
        zero, by_row = getattr(weight, "zero_point", None), (*weight.qdata.shape[:-1], 1)
        if weight.scale.shape != by_row or not (zero is None or not zero.any()):
            return False
        return all(getattr(weight, name, None) is None for name in others)


@register_storage
class ListedNf4(Storage):
    """Of `Params4bit`, one for each expert."""

    def __init__(self, stored: Sequence[Any], transposed: bool = False) -> None:
        assert not transposed, "a Linear layer keeps (O, I)"
        self.stored = stored
        self.kind = packed_format("nf4-nested" if stored[0].quant_state.nested else "nf4")
        self.fixed, self.name = self.kind.says, self.kind.name

    @classmethod
    def recognises(cls, stored: object) -> bool:
        if isinstance(stored, (list, tuple)):
            return bool(stored) and all(_is_nf4(weight) for weight in stored)
        return _is_nf4(stored)

    @property
    def shape(self) -> tuple[int, int, int]:
        outputs, inputs = self.stored[0].quant_state.shape
        return len(self.stored), outputs, inputs

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.stored[0].quant_state.dtype
        return found

    @property
    def device(self) -> torch.device:
        found: torch.device = self.stored[0].device
        return found

    @property
    def num_bytes(self) -> int:
        parts = [part for weight in self.stored for part in nf4_parts_of(weight).values()]
        return sum(part.numel() * part.element_size() for part in parts)

    def bits_of(self, expert: int) -> Parts:
        return nf4_parts_of(self.stored[expert])

    def read(self, expert: int, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(self.shape[1:], dtype=self.dtype, device=self.device)
        return self.kind.decode(self.bits_of(expert), out)


def held_by_parametrization(module: Any, key: str) -> Held | None:
    """A parameter that `replace_parameter_4bit` has quantised; None where it cannot be read so.

    To bitsandbytes it is one long row: nested scales may cross experts, and are not read then.
    """
    found: Any = getattr(getattr(module, "parametrizations", None), key, None)
    if found is None or not _is(found[0], "bitsandbytes", "Bnb4bitParametrization"):
        return None
    state = found[0].quant_state
    if len(state.shape) != 3 or not _has_known_blocks(state):
        return None
    experts, outputs, inputs = state.shape
    codes = found.original.view(experts, outputs, inputs // 2)
    absmax = state.absmax.view(experts, outputs, inputs // BLOCK)
    if not state.nested:
        return Held(packed_format("nf4"), {"codes": codes, "scale": absmax}, state.dtype)
    if outputs * inputs % (BLOCK * NESTED_BLOCK):
        return None
    parts = {"codes": codes, "scale_codes": absmax}
    parts["scale_scale"] = state.state2.absmax.view(experts, -1)
    parts["scale_offset"] = state.offset.repeat(experts, 1)
    return Held(packed_format("nf4-nested"), parts, state.dtype)


def nf4_parts_of(weight: Any) -> Parts:
    """The parts of one `Params4bit`: views of what it has."""
    state = weight.quant_state
    outputs, inputs = state.shape
    codes = weight.data.view(outputs, inputs // 2)
    absmax = state.absmax.view(outputs, inputs // BLOCK)
    if not state.nested:
        return {"codes": codes, "scale": absmax}
    nested = {"scale_scale": state.state2.absmax, "scale_offset": state.offset.view(1)}
    return {"codes": codes, "scale_codes": absmax, **nested}


def _is_nf4(stored: object) -> bool:
    """Whether it is a matrix of bitsandbytes whose blocks are those of the storage."""
    if not _is(stored, "bitsandbytes", "Params4bit"):
        return False
    weight: Any = stored
    state = weight.quant_state
    if state is None or weight.dtype != torch.uint8 or len(state.shape) != 2:
        return False
    return _has_known_blocks(state)


def _has_known_blocks(state: Any) -> bool:
    if (state.quant_type, state.blocksize) != ("nf4", BLOCK) or state.shape[-1] % BLOCK:
        return False
    if getattr(state, "packing_format_for_cpu", False):  # rearranged, its scales rounded
        return False
    return not state.nested or state.state2.blocksize == NESTED_BLOCK


def _is(stored: object, library: str, name: str) -> bool:
    kind = type(stored)
    return kind.__name__ == name and kind.__module__.partition(".")[0] == library
