"""A merge that never has the whole model in memory: weights are read, merged and written in turn.

    for each parameter of the model, in its order:
        read it as the model keeps it        one matrix of a block's experts at a time
        add what the adapter adds, round     expert by expert, as `merging` does, to the bit
        write it as the checkpoint has it    see `shards`

`FromFiles` reads the checkpoint of a base in 16 or 32 bits, and packs and unpacks experts where the
adapter was trained on packed ones. `FromPacked` reads a base whose experts are packed in memory.
Logits cannot be compared without the model; that each tensor goes back into the checkpoint as it
came out is checked for every one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from drlora.adapter.embeddings import rows_before
from drlora.adapter.inject import adapted_layers
from drlora.errors import ConfigError
from drlora.export.base_weights import EXPERT_KEY, LEAVES, Base, Weights
from drlora.export.factors import Factors
from drlora.export.merging import Kept
from drlora.export.reference import BlockReference, block_reference
from drlora.export.shards import ShardWriter
from drlora.export.updates import PARAMETERS, linear_updates, refuse_tokens, trained_modules
from drlora.moe.packing import is_packed, parameter_at, places_of
from drlora.ops.merge import Rounding
from drlora.ops.storage.arranged import as_parameter, is_in_place
from drlora.ops.storage.packed import Packed, PackedFormat
from drlora.ops.weights import Matrix

_WHOLE = "leave --by-shard out, which needs memory for the whole model."


class Source(Protocol):
    """Where the base's weights come from.

    Attributes:
        model: of transformers, by which checkpoints are read and written; its weights may be on the
            meta device.
    """

    model: Any

    def names(self) -> Iterator[str]:
        """Full names of what is saved of the model, in its order."""

    def read(self, name: str) -> Tensor:
        """A parameter or buffer as the model keeps it, new."""


class FromFiles:
    """The checkpoint of a base that is not quantised.

    Args:
        base: with the weights of its folder.
        dtype: of the model in training; None: what its configuration says. Parameters that
            transformers keeps in float32 beside it are in float32.
        kind: what its experts were packed as in training; None: they were not.
    """

    def __init__(self, base: Base, dtype: torch.dtype | None, kind: PackedFormat | None) -> None:
        self.model, self.files = base.model, base.weights
        self.kind = kind
        self._dtypes = _loaded_dtypes(self.model, dtype)
        self._experts = {block.experts_name for block in base.blocks}

    def names(self) -> Iterator[str]:
        """All but those that are tied to another and so not in the files."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        for name, tensor in self.model.state_dict().items():
            keys = list(_as_stored(self.model, name, tensor))
            if all(key in self.files.files for key in keys):
                yield name
            elif name not in tied:
                raise ConfigError(
                    f"the base's files have no {keys[0]} for {name}; the checkpoint is incomplete "
                    f"or of another form: {_WHOLE}"
                )

    def read(self, name: str) -> Tensor:
        """Put together from what the checkpoint has of it.

        Raises:
            ConfigError: if that is another form than is understood.
        """
        wanted = self.model.state_dict()[name]
        keys = list(_as_stored(self.model, name, wanted))
        found = _put_together(self.files, keys)
        if found is None or found.shape != wanted.shape or not self._goes_back(name, found):
            raise ConfigError(f"the checkpoint keeps {name} in a form of its own; {_WHOLE}")
        if found.is_floating_point():
            found = found.to(self._dtypes.get(name, found.dtype))
        if self.kind is not None and name.rpartition(".")[0] in self._experts and found.dim() == 3:
            for w_OI in found:
                w_OI.copy_(as_parameter(Packed.of(w_OI[None], self.kind))[0])
        return found

    def _goes_back(self, name: str, tensor: Tensor) -> bool:
        stored = _as_stored(self.model, name, tensor)
        return all(torch.equal(part, self.files.read(key)) for key, part in stored.items())


class FromPacked:
    """A model in memory whose experts are packed; other weights are in 16 or 32 bits.

    Args:
        model: with its weights.
        skeleton: of the same architecture, as one that was never quantised.

    Raises:
        ConfigError: if other weights are quantised too.
    """

    def __init__(self, model: Any, skeleton: Any) -> None:
        self.model = skeleton
        self._packed = {
            f"{name}.{place.path}": parameter_at(module, place.path)
            for name, module in model.named_modules()
            if is_packed(module)
            for place in places_of(module)
        }
        inside = tuple(f"{name}." for name in self._packed)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        self._plain = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(inside) and name not in tied
        }
        for name, tensor in self._plain.items():
            if not tensor.is_floating_point() or type(tensor) is not Tensor:
                raise ConfigError(f"{name} is quantised too ({tensor.dtype}); {_WHOLE}")

    def names(self) -> Iterator[str]:
        """Packed ones last."""
        yield from self._plain
        yield from self._packed

    def read(self, name: str) -> Tensor:
        """A copy of it, of ordinary numbers."""
        packed = self._packed.get(name)
        if packed is None:
            return self._plain[name].detach().cpu().clone()
        return (as_parameter(packed) if is_in_place(packed) else packed.detach().clone()).cpu()


@torch.no_grad()
def merge_by_shard(
    model: PeftModel, source: Source, rounding: Rounding, writer: ShardWriter
) -> Kept:
    """Write the base with the active adapter of `model` in its weights.

    Args:
        model: carries the adapter; its base's weights are not read.
        source: of the base's weights.
        rounding: to what they are stored in.
        writer: takes them; it is closed.

    Returns:
        What of the update is left.

    Raises:
        ConfigError: if the adapter is on something that is not one parameter of the checkpoint.
    """
    updates = _updates(model, source.model, source.names(), rounding)
    for name in source.names():
        weight = updates.added_to(source.read(name), name)
        for key, part in _as_stored(source.model, name, weight).items():
            writer.add(key, part)
    writer.close()
    return updates.kept


def refuse_unfit(model: PeftModel, source: Source | None, base: Any) -> None:
    """What `merge_by_shard` refuses before it reads a weight.

    Args:
        model: carries the adapter.
        source: of the base's weights; None: there are none here.
        base: the base without memory for its weights.

    Raises:
        ConfigError: if the adapter is on something that is not one parameter of the checkpoint.
    """
    names = base.state_dict() if source is None else source.names()
    _updates(model, base, names, Rounding())


def _updates(model: PeftModel, base: Any, names: Iterable[str], rounding: Rounding) -> _Updates:
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    updates = _Updates(model, rounding)
    updates.refuse_missing(set(names))
    updates.refuse_tied(tied)
    return updates


class _Updates:
    """What an adapter adds to each parameter, by the parameter's name."""

    def __init__(self, model: PeftModel, rounding: Rounding) -> None:
        inner, adapter = model.get_base_model(), model.active_adapter
        if rows_before(inner) is not None:
            raise ConfigError(f"the embeddings were resized; {_WHOLE}")
        refuse_tokens(inner, adapter, f"which are not merged file by file; {_WHOLE}")
        self.rounding, self.kept = rounding, Kept()
        self.experts: dict[str, tuple[BlockReference, Matrix]] = {}
        for layer in adapted_layers(inner, adapter).values():
            block = block_reference(layer, adapter)
            own = dict(layer.get_base_layer().named_parameters(recurse=False))
            for matrix in dict.fromkeys(piece.matrix for piece in block.pieces):
                leaf = next((key for key in PARAMETERS[matrix] if key in own), "")
                self.experts[f"{block.name}.{leaf}"] = block, matrix
        self.linears: dict[str, Factors] = {
            f"{name}.weight": factors for name, factors in linear_updates(inner, adapter).items()
        }
        self.trained = {
            f"{name}.{key}": value
            for name, state in trained_modules(inner, adapter).items()
            for key, value in state.items()
        }

    def refuse_missing(self, names: set[str]) -> None:
        """Raises:
        ConfigError: if something that the adapter changes is none of these.
        """
        lost = [n for n in (*self.experts, *self.linears, *self.trained) if n not in names]
        if lost:
            raise ConfigError(
                f"{lost[0]} is no parameter of the checkpoint by itself, such as a head that is "
                f"tied to the embeddings, or experts in lists; {_WHOLE}"
            )

    def refuse_tied(self, tied: Mapping[str, str]) -> None:
        """`tied`: name of a parameter -> the one that it is tied to, which alone is in the files.

        Raises:
            ConfigError: if one of a pair is changed: the other would change with it.
        """
        changed = {*self.experts, *self.linears, *self.trained}
        for name, other in tied.items():
            if changed & {name, other}:
                raise ConfigError(
                    f"{name} is tied to {other}, and the adapter changes one of them; {_WHOLE}"
                )

    def added_to(self, weight: Tensor, name: str) -> Tensor:
        """The weight that the merged model has there; may be `weight` itself, changed."""
        if name in self.experts:
            return self._experts(weight, *self.experts[name])
        if name in self.linears:
            factors, place = self.linears[name], name.removesuffix(".weight")
            update_OI = factors.b[0].double() @ factors.a[0].double()
            after_OI = self.rounding(weight.double() + update_OI, weight.dtype, place)
            self.kept.add(weight, after_OI, update_OI)
            return after_OI
        if name in self.trained:
            own = self.trained[name]
            if own.dtype == weight.dtype or not own.is_floating_point():
                return own
            return self.rounding(own.double(), weight.dtype, name)
        return weight

    def _experts(self, weight: Tensor, block: BlockReference, matrix: Matrix) -> Tensor:
        block = replace(block, dtype=weight.dtype)
        for expert in range(block.num_experts):
            stored = weight[expert]
            place_OI = stored.T if matrix in block.transposed else stored
            before_OI = place_OI.clone()
            after_OI = block.merged(matrix, expert, before_OI, self.rounding)
            self.kept.add(before_OI, after_OI, block.update(matrix, expert))
            place_OI.copy_(after_OI)
        return weight


def _loaded_dtypes(model: Any, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """What transformers makes of each weight: the model's dtype, float32 where it insists."""
    said, own = model.config.dtype, torch.get_default_dtype()
    if isinstance(said, torch.dtype):
        dtype, own = dtype or said, said
    if dtype is None:
        return {}
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    found = {}
    for name, tensor in model.state_dict().items():
        is_kept = kept is not None and kept.search(name)
        is_own = tensor.dtype != own  # made so by the model itself
        found[name] = torch.float32 if is_kept else tensor.dtype if is_own else dtype
    return found


def _as_stored(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a checkpoint of the model has for one of its parameters: key -> tensor."""
    found: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return found


def _put_together(files: Weights, keys: list[str]) -> Tensor | None:
    """One tensor of what lies in the files; None if it is not known how."""
    if len(keys) == 1:
        return files.read(keys[0]).clone()
    matches = [EXPERT_KEY.search(key) for key in keys]
    parts: dict[str, dict[int, Tensor]] = {}
    for key, match in zip(keys, matches, strict=True):
        if match is None or match[2] not in LEAVES:
            return None
        parts.setdefault(LEAVES[match[2]], {})[int(match[1])] = files.read(key)
    whole = [parts[leaf] for leaf in ("gate", "up", "gate_up", "down") if leaf in parts]
    if len({len(part) for part in whole}) != 1:
        return None
    return torch.stack([torch.cat([part[e] for part in whole]) for e in sorted(whole[0])])
