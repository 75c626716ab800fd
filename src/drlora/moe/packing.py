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
from drlora.moe.families import family_of
from drlora.moe.families.interface import InterfaceExperts
from drlora.ops import adapted_experts
from drlora.ops.storage.packed import Packed, PackedFormat


def put_in(experts: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Have packed matrices take the places of parameters of an experts module."""
    for key, matrix in packed.items():
        delattr(experts, key)
        setattr(experts, key, matrix)
    own_class: Any = type(experts)
    experts.__class__ = _packed_class(own_class)


def is_packed(module: nn.Module) -> bool:
    """Whether it is an experts module whose matrices are packed."""
    return getattr(type(module), "drlora_packed", False)


def take_out(experts: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Have the numbers that are packed be parameters again, of their own dtype or another.

    One matrix of the block is packed and wide at the same time.
    """
    for key in matrices_of(experts):
        packed: Packed = getattr(experts, key)
        delattr(experts, key)
        setattr(experts, key, nn.Parameter(packed.wide().to(dtype or packed.dtype), False))
    experts.__class__ = type(experts).__mro__[1]


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
