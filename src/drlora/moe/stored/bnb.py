"""Checkpoints of bitsandbytes: NF4 in blocks of 64, nested or not, and LLM.int8 by row.

A matrix of four bits is a column of bytes, beside it its scales (`absmax`), the table of its codes
and a text that says how it was made (`quant_state`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drlora.errors import ConfigError
from drlora.moe.stored.base import Kept, StoredForm, register_form
from drlora.ops.storage import nf4
from drlora.ops.storage.packed import packed_format

_ENDS = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
_AGAIN = (
    "load the model's 16-bit checkpoint with quantization_config=drlora.QuantisedExperts('nf4')"
)


class Bnb4Bit(StoredForm):
    """`...experts.7.gate_proj.weight` and its company, or the same of a matrix of all experts."""

    method = "bitsandbytes_4bit"
    names = tuple(f"weight{end}" for end in _ENDS)
    fused_ends = _ENDS

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        kind = settings.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
        storage = settings.get("bnb_4bit_quant_storage", "uint8")
        if kind != "nf4":
            raise ConfigError(
                f"the checkpoint is quantised with bnb_4bit_quant_type={kind!r}, which has no "
                f"storage here (nf4 has); {_AGAIN}."
            )
        if storage not in ("uint8", torch.uint8):
            raise ConfigError(
                f"the checkpoint keeps its bytes as bnb_4bit_quant_storage={storage!r}; only uint8 "
                f"is read. {_AGAIN.capitalize()}."
            )

    @property
    def storage(self) -> str:
        return "nf4-nested" if self.settings.get("bnb_4bit_use_double_quant") else "nf4"

    def is_packed(self, tensors: Mapping[str, Any]) -> bool:
        return any(name.endswith("absmax") for name in tensors)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Kept:
        by_end = _by_end(tensors)
        state, (outputs, inputs) = _state_of(by_end, 2)
        return nf4_parts(by_end, state, (outputs, inputs))

    def fill(self, tensors: Mapping[str, Tensor], out_OI: Tensor) -> Tensor:
        """Blocks may cross rows here: the matrix is taken for rows of one block."""
        by_end = _by_end(tensors)
        state, (outputs, inputs) = _state_of(by_end, 2)
        kept = nf4_parts(by_end, state, (outputs * inputs // nf4.BLOCK, nf4.BLOCK))
        kept.kind.decode(kept.parts, out_OI.view(-1, nf4.BLOCK))
        return out_OI

    def stack(self, tensors: Mapping[str, Tensor]) -> Kept:
        """bitsandbytes takes the parameter for one long row, so nested scales cross experts."""
        state, (experts, outputs, inputs) = _state_of(tensors, 3)
        kept = nf4_parts(tensors, state, (experts * outputs, inputs))
        parts = dict(kept.parts)
        apart, rest = divmod(outputs * inputs // nf4.BLOCK, nf4.NESTED_BLOCK)
        if "scale_codes" in parts and rest:
            table = tensors[".nested_quant_map"].to(parts["scale_codes"].device)
            inner = table[parts.pop("scale_codes").flatten().int()]
            outer = parts.pop("scale_scale").repeat_interleave(nf4.NESTED_BLOCK)[: len(inner)]
            parts["scale"] = inner * outer + parts.pop("scale_offset")
            kept = Kept(packed_format("nf4"), parts)
        elif "scale_codes" in parts:
            parts["scale_scale"] = parts["scale_scale"].view(experts, apart)
            parts["scale_offset"] = parts["scale_offset"].repeat(experts, 1)
        for name in ("codes", "scale", "scale_codes"):
            if name in parts:
                parts[name] = parts[name].view(experts, outputs, -1)
        return Kept(kept.kind, parts)


class Bnb8Bit(StoredForm):
    """LLM.int8: bytes (O, I) and the largest number of each row, `SCB`."""

    method = "bitsandbytes_8bit"
    names = ("weight", "SCB", "weight_format")
    storage = "int8"

    def is_packed(self, tensors: Mapping[str, Any]) -> bool:
        return "SCB" in tensors

    def matrix(self, tensors: Mapping[str, Tensor]) -> Kept:
        if tensors.get("weight_format", torch.zeros(())).any():
            raise ConfigError(
                f"the checkpoint keeps 8-bit weights in another order than by row; {_AGAIN}."
            )
        scale_O = tensors["SCB"].float() / 127
        return Kept(self.kind, {"codes": tensors["weight"], "scale": scale_O})


def nf4_parts(by_end: Mapping[str, Tensor], state: Any, shape: tuple[int, int]) -> Kept:
    """The parts of bytes and scales that lie in the order of rows.

    Args:
        by_end: of `_ENDS`.
        state: what `quant_state` says.
        shape: (O, I).

    Raises:
        ConfigError: if the blocks are others than those of the storage.
    """
    outputs, inputs = shape
    expected = {"quant_type": "nf4", "blocksize": nf4.BLOCK}
    if "nested_offset" in state:
        expected["nested_blocksize"] = nf4.NESTED_BLOCK
    other = {key: state.get(key) for key, value in expected.items() if state.get(key) != value}
    if other:
        raise ConfigError(
            f"a matrix of the checkpoint has {other}, expected is {expected}; {_AGAIN}."
        )
    if inputs % nf4.BLOCK:
        raise ConfigError(
            f"rows of {inputs} numbers are no multiple of {nf4.BLOCK}, so in this checkpoint "
            f"blocks cross rows; {_AGAIN.replace('nf4', 'int8')}."
        )
    _refuse_other_table(by_end[".quant_map"], torch.tensor(nf4.CODES))
    parts = {"codes": by_end[""].view(outputs, inputs // 2)}
    absmax = by_end[".absmax"].view(outputs, inputs // nf4.BLOCK)
    if "nested_offset" not in state:
        return Kept(packed_format("nf4"), {**parts, "scale": absmax.float()})
    _refuse_other_table(by_end[".nested_quant_map"], nf4.eight_bits(torch.device("cpu")))
    parts |= {"scale_codes": absmax, "scale_scale": by_end[".nested_absmax"].float()}
    parts["scale_offset"] = torch.tensor([state["nested_offset"]], device=absmax.device)
    return Kept(packed_format("nf4-nested"), parts)


def _by_end(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weight"): tensor for name, tensor in tensors.items()}


def _state_of(by_end: Mapping[str, Tensor], dims: int) -> tuple[Any, tuple[int, ...]]:
    text = next((t for end, t in by_end.items() if ".quant_state." in end), None)
    state = {} if text is None else json.loads(bytes(text.tolist()))
    shape = tuple(state.get("shape", ()))
    if len(shape) != dims:
        raise ConfigError(
            f"a matrix of the checkpoint says the shape {shape}, expected are {dims} dimensions; "
            f"{_AGAIN}."
        )
    return state, shape


def _refuse_other_table(found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found.cpu().float(), expected):
        raise ConfigError(f"the checkpoint has a table of codes of its own; {_AGAIN}.")


register_form(Bnb4Bit)
register_form(Bnb8Bit)
