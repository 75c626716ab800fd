"""The steps between a file's tensors and packed matrices, as transformers' loader takes them.

The loader copies a step for every tensor that it meets, and swallows what a step raises: so these
are never copied, and what they refuse is kept for when all is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist
from transformers.quantizers.quantizers_utils import get_module_from_name

from drlora.errors import ConfigError
from drlora.moe.stored.base import Kept
from drlora.ops.storage.arranged import InPlace, PackedPair, Upright
from drlora.ops.storage.fp8 import TILE
from drlora.ops.storage.packed import Packed, PackedFormat, refuse_infinite

if TYPE_CHECKING:
    from drlora.moe.stored.quantizer import StoredQuantizer

_Tensors = dict[str, Any]


class _Step(ConversionOps):
    """One for all tensors of its kind; `hf_quantizer` tells the loader to change no dtype."""

    def __init__(self, quantizer: StoredQuantizer) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _Step:
        return self

    @torch.no_grad()
    def convert(self, input_dict: _Tensors, *args: Any, **kwargs: Any) -> _Tensors:
        """Parameters of `input_dict`, which has lists of tensors by the patterns of their names."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        quantizer = self.hf_quantizer
        if quantizer.refusal is None:
            try:
                return self.run(input_dict, name, model, kwargs)
            except ConfigError as error:
                quantizer.refusal = ConfigError(f"{name}: {error}")
        if quantizer.is_of_experts(model, name):
            return quantizer.nothing(name)
        target = _parameter(model, name)
        return {name: torch.empty((), dtype=target.dtype).expand(target.shape)}

    def run(self, tensors: _Tensors, name: str, model: Any, said: _Tensors) -> _Tensors:
        """What `convert` gives; `said` is what the loader says beside it."""
        raise NotImplementedError

    def packed(self, kept: Kept, name: str, model: Any, kind: type[Packed] = Packed) -> Packed:
        """`kept` of all experts, as the storage that is asked for."""
        matrix = kind(kept.kind, kept.parts, _parameter(model, name).dtype)
        wanted = self.hf_quantizer.kind
        is_own = wanted.name == self.hf_quantizer.form.storage
        return matrix if is_own else _again(matrix, wanted)

    def fitting(self, matrix: InPlace, name: str, model: Any) -> _Tensors:
        """The matrix kept, if it has the shape of the model's own parameter."""
        wanted = tuple(_parameter(model, name).shape)
        if isinstance(matrix, Upright):
            wanted = (wanted[0], wanted[2], wanted[1])
        if tuple(matrix.shape) != wanted:
            raise ConfigError(
                f"the checkpoint's experts are {tuple(matrix.shape)}, the model's {wanted}."
            )
        return self.hf_quantizer.keep(name, matrix)


class KeepList(_Step):
    """A tensor, or several, for each expert: stacked, gate over up."""

    def __init__(
        self, quantizer: StoredQuantizer, patterns: Mapping[str, tuple[str, str]], whole: Any
    ) -> None:
        super().__init__(quantizer)
        self.patterns = patterns  # -> (pattern of the matrix's name, name of the form)
        self.whole = whole  # transformers' converter of plain weights

    def run(self, tensors: _Tensors, name: str, model: Any, said: _Tensors) -> _Tensors:
        by_source: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, (source, part) in self.patterns.items():
            if pattern in tensors:
                by_source.setdefault(source, {})[part] = tensors.pop(pattern)
        form = self.hf_quantizer.form
        packed = [form.is_packed(found) for found in by_source.values()]
        if not any(packed):
            return self._plain(by_source, name, model, said)
        known = [type(step) for step in self.whole.operations]
        if known not in ([MergeModulelist], [MergeModulelist, Concatenate]) or not all(packed):
            raise ConfigError(
                f"its experts are put together in a way that is not known for packed ones "
                f"({[step.__name__ for step in known]}), or some are packed and others not."
            )
        halves = [self.packed(_stacked(form.matrix, found), name, model)
                  for found in by_source.values()]  # fmt: skip
        return self.fitting(_joined(halves), name, model)

    def _plain(self, by_source: Any, name: str, model: Any, said: _Tensors) -> _Tensors:
        """Experts that a quantised checkpoint has in 16 bits, put together as ever."""
        tensors = {source: found["weight"] for source, found in by_source.items()}
        for step in self.whole.operations:
            tensors = step.convert(
                tensors,
                **{
                    **said,
                    "source_patterns": self.whole.source_patterns,
                    "target_patterns": self.whole.target_patterns,
                },
            )
        (value,) = tensors.values()
        self.hf_quantizer.plain.add(name)
        return {name: value.to(_parameter(model, name).dtype)}


class KeepStack(_Step):
    """One tensor, or several, of all experts."""

    def __init__(self, quantizer: StoredQuantizer, patterns: Mapping[str, str]) -> None:
        super().__init__(quantizer)
        self.patterns = patterns  # -> end of the form

    def run(self, tensors: _Tensors, name: str, model: Any, said: _Tensors) -> _Tensors:
        found = {self.patterns[pattern]: _one(value) for pattern, value in tensors.items()}
        form = self.hf_quantizer.form
        if not form.is_packed(found):
            self.hf_quantizer.plain.add(name)
            return {name: found[""].to(_parameter(model, name).dtype)}
        module, _ = get_module_from_name(model, name)
        kind = Upright if form.is_upright and module.is_transposed else Packed
        return self.fitting(self.packed(form.stack(found), name, model, kind), name, model)


class Rest(_Step):
    """Everything but experts."""

    def run(self, tensors: _Tensors, name: str, model: Any, said: _Tensors) -> _Tensors:
        quantizer, found = self.hf_quantizer, {key: _one(value) for key, value in tensors.items()}
        target = _parameter(model, name)
        if not quantizer.form.is_packed(found):
            if quantizer.stays_packed(model, name):
                raise ConfigError(
                    "it is in 16 bits in the checkpoint, whose quantization_config does not say so "
                    "(llm_int8_skip_modules, for bitsandbytes)."
                )
            return {name: found["weight"].to(target.dtype)}
        if quantizer.is_of_router(name):
            raise ConfigError(
                f"the router is in {quantizer.form.storage}, in which it sends tokens elsewhere; "
                f"load the model's 16-bit checkpoint with drlora.QuantisedExperts("
                f"{quantizer.form.storage!r}), which leaves routers as they are."
            )
        if quantizer.stays_packed(model, name):
            step = quantizer.rest.get_load_operations()["deserialize"]
            read: _Tensors = step(quantizer.rest).convert(found, **said)
            return read
        wide = torch.empty(target.shape, dtype=target.dtype, device=found["weight"].device)
        quantizer.widened_bytes += wide.numel() * wide.element_size()
        return {name: quantizer.form.fill(found, wide)}


class PackAgain(_Step):
    """A matrix of all experts that transformers has decoded."""

    def run(self, tensors: _Tensors, name: str, model: Any, said: _Tensors) -> _Tensors:
        (value,) = (_one(value) for value in tensors.values())
        return self.fitting(Packed.of(value, self.hf_quantizer.kind), name, model)


def _stacked(matrix: Callable[[dict[str, Tensor]], Kept], found: dict[str, list[Tensor]]) -> Kept:
    """The parts of all experts, of lists that have a tensor for each."""
    counts = {name: len(tensors) for name, tensors in found.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"its experts have {counts} tensors, expected are as many of each.")
    names = list(found)
    kept = [
        matrix(dict(zip(names, of_one, strict=True)))
        for of_one in zip(*found.values(), strict=True)
    ]
    found.clear()  # the stack is made without a second copy of all parts
    parts = {name: torch.stack([k.parts[name] for k in kept]) for name in kept[0].parts}
    return Kept(kept[0].kind, parts)


def _joined(halves: Sequence[Packed]) -> InPlace:
    """Gate over up: in one, where no byte changes by it."""
    if len(halves) == 1:
        return halves[0]
    gate, up = halves
    kind, outputs = gate.kind, gate.shape[1]
    if kind.name == "nf4-nested" or (kind.name == "fp8" and outputs % TILE):
        return PackedPair(gate, up)  # a scale of scales, or of a tile, would be of both
    parts = {name: torch.cat([part, up.parts[name]], dim=1) for name, part in gate.parts.items()}
    return Packed(kind, parts, gate.dtype)


def _again(matrix: Packed, kind: PackedFormat) -> Packed:
    """The same numbers in another storage, one expert wide at a time."""
    reason = kind.refuses(*matrix.shape[1:])
    if reason:
        raise ConfigError(f"experts of shape {tuple(matrix.shape)} as {kind.name}: {reason}.")
    wide_OI = torch.empty(matrix.shape[1:], device=next(matrix.parameters()).device)
    parts: dict[str, Tensor] = {}
    for expert in range(matrix.shape[0]):
        matrix.kind.decode(matrix.parts_of(expert), wide_OI)
        refuse_infinite(wide_OI, f"expert {expert}")
        for name, part in kind.encode(wide_OI).items():
            if name not in parts:
                parts[name] = part.new_empty(matrix.shape[0], *part.shape)
            parts[name][expert] = part
    return type(matrix)(kind, parts, matrix.dtype)


def _parameter(model: Any, name: str) -> Tensor:
    module, key = get_module_from_name(model, name)
    found: Tensor = getattr(module, key)
    return found


def _one(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, list) else value
    return found
