"""How packed matrices take the places of an experts module's parameters.

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
from drlora.moe.families import Place, family_of
from drlora.moe.refusals import is_plain
from drlora.ops import adapted_experts
from drlora.ops.storage.arranged import InPlace, as_parameter, is_in_place
from drlora.ops.storage.packed import PackedFormat, refuse_infinite


def put_in(experts: nn.Module, packed: Mapping[str, InPlace]) -> None:
    """Have packed matrices take the places of parameters of an experts module, by their paths."""
    for path, matrix in packed.items():
        owner, key = _owner(experts, path)
        delattr(owner, key)
        setattr(owner, key, matrix)
    own_class: Any = type(experts)
    experts.__class__ = _packed_class(own_class)


def is_packed(module: nn.Module) -> bool:
    """Whether it is an experts module whose matrices are packed."""
    return getattr(type(module), "drlora_packed", False)


def take_out(experts: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Have the numbers that are packed be parameters again, of their own dtype or another.

    One matrix of the block is packed and wide at the same time.
    """
    for place in places_of(experts):
        owner, key = _owner(experts, place.path)
        packed = getattr(owner, key)
        if is_in_place(packed):
            wide = as_parameter(packed).to(dtype or packed.dtype)
            delattr(owner, key)
            as_it_was = wide.flatten(0, 1) if place.flat_experts else wide
            setattr(owner, key, nn.Parameter(as_it_was, requires_grad=False))
    experts.__class__ = type(experts).__mro__[1]


def refuse_unfit(name: str, experts: nn.Module, kind: PackedFormat) -> None:
    """Raises:
    ConfigError: if the experts module called `name` cannot be packed so.
    """
    places = places_of(experts)
    if not places:
        raise ConfigError(
            f"{name}: experts of the class {type(experts).__name__} cannot be packed: their family "
            f"in drlora.moe.families names no places for it, or they are quantised already. Leave "
            f"them as they are."
        )
    for place in places:
        path = place.path
        weight = parameter_at(experts, path)
        if is_in_place(weight):
            raise ConfigError(f"{name}.{path} is packed already, as {weight.kind.name}.")
        if not is_plain(weight) or weight.dtype.itemsize < 2:
            raise ConfigError(
                f"{name}.{path} is quantised already ({type(weight).__name__} of {weight.dtype})."
            )
        reason = kind.refuses(*stacked(weight, place).shape[1:])
        if reason:
            raise ConfigError(f"{name}.{path} cannot be packed as {kind.name}: {reason}.")
        if not weight.is_meta:
            for expert, w_OI in enumerate(stacked(weight, place)):
                refuse_infinite(w_OI, f"{name}.{path}, expert {expert}")


def places_of(experts: nn.Module) -> list[Place]:
    """Where packed matrices can take the places of its parameters; none in what is no experts."""
    family = family_of(experts)
    return [] if family is None else family.places(experts)


def parameter_at(experts: nn.Module, path: str) -> Any:
    """What is in a place."""
    owner, key = _owner(experts, path)
    return getattr(owner, key)


def stacked(weight: Tensor, place: Place) -> Tensor:
    """A parameter as a tensor that has a matrix for each expert."""
    return weight.unflatten(0, (place.flat_experts, -1)) if place.flat_experts else weight


def prepare_around(model: nn.Module, name: str) -> None:
    """Have the block around experts that are packed say who goes where, where it must."""
    family = family_of(model.get_submodule(name))
    assert family is not None
    family.prepare(model.get_submodule(name.rpartition(".")[0]))


def _owner(experts: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, key = path.rpartition(".")
    return experts.get_submodule(owner), key


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

    own = {"forward": forward, "drlora_packed": True, "needs_routing": True}
    return type(kind.__name__, (kind,), {**own, "__module__": __name__})
