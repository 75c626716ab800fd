"""Experts of a model packed in few bits, in place: `drlora.quantise_experts(model, "nf4")`.

Experts are nearly all of an MoE's weights. Routers, shared experts, attention, embeddings and norms
stay as they are. One matrix of one block is wide and packed at the same time, and no more.

The experts module gets a class of its own, whose forward computes with what is packed: so the model
works as before, with an adapter on it, with the adapter switched off, and without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from drlora.errors import ConfigError
from drlora.moe.blocks import find_blocks
from drlora.moe.families import family_of
from drlora.moe.families.interface import InterfaceExperts
from drlora.ops import adapted_experts
from drlora.ops.storage.packed import Packed, PackedFormat, packed_format


@torch.no_grad()
def quantise_experts(model: nn.Module, storage: str = "nf4") -> nn.Module:
    """Pack the experts of every MoE block of `model`, in place.

    Args:
        model: a model of transformers without an adapter, its weights where they are to be.
        storage: `nf4` (4.5 bits a number), `nf4-nested` (4.13 bits), `int8`, `mxfp4` or `fp8`.

    Returns:
        `model`. What its experts compute is what the packed numbers stand for, in the dtype that
        they had.

    Raises:
        ConfigError: if there is no such storage, no block, a block that keeps its experts in
            another way than transformers' interface, or a matrix that the storage cannot take.
            Nothing is packed then.
    """
    kind = packed_format(storage)
    names = [block.experts_name for block in find_blocks(model)]  # refuses a model without any
    found = [(name, model.get_submodule(name)) for name in names]
    for name, experts in found:
        refuse_unfit(name, experts, kind)
    for _, experts in found:
        for key in matrices_of(experts):
            put_in(experts, {key: Packed.of(getattr(experts, key).detach(), kind)})
    return model


def put_in(experts: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Have packed matrices take the places of parameters of an experts module."""
    for key, matrix in packed.items():
        delattr(experts, key)
        setattr(experts, key, matrix)
    own_class: Any = type(experts)
    experts.__class__ = _packed_class(own_class)


def refuse_unfit(name: str, experts: nn.Module, kind: PackedFormat) -> None:
    """Raises:
    ConfigError: if the experts module called `name` cannot be packed so.
    """
    if not isinstance(family_of(experts), InterfaceExperts):
        raise ConfigError(
            f"{name}: experts of the class {type(experts).__name__} are not kept as transformers' "
            f"experts interface does, so they cannot be packed yet; leave them in 16 bits."
        )
    for key in matrices_of(experts):
        weight = getattr(experts, key)
        if isinstance(weight, Packed):
            raise ConfigError(f"{name}.{key} is packed already, as {weight.kind.name}.")
        reason = kind.refuses(*weight.shape[1:])
        if reason:
            raise ConfigError(f"{name}.{key} cannot be packed as {kind.name}: {reason}.")


def matrices_of(experts: Any) -> list[str]:
    """Names of the parameters that hold its matrices."""
    return ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]


@cache
def _packed_class(kind: Any) -> Any:
    """The experts' class with a forward of packed matrices; copies take a class along."""

    if getattr(kind, "drlora_packed", False):
        return kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        family = family_of(self)
        assert family is not None
        weights = family.weights(self)

        def run(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, /, **_: Any) -> Tensor:
            out_TH = adapted_experts(x_TH.to(weights.dtype), index_TK, weight_TK, weights, [])
            return out_TH.to(x_TH.dtype)

        return family.call(self, run, *args, **kwargs)

    return type(
        kind.__name__, (kind,), {"forward": forward, "drlora_packed": True, "__module__": __name__}
    )
