"""Experts of a model packed in few bits, in place: `drlora.quantise_experts(model, "nf4")`.

Experts are nearly all of an MoE's weights. Routers, shared experts, attention, embeddings and norms
stay as they are. One matrix of one block is wide and packed at the same time, and no more.

The model then counts as quantised: transformers refuses to save it as a checkpoint, which could not
be read back. What is saved is the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drlora.moe.blocks import find_blocks
from drlora.moe.loading import ExpertsQuantizer, QuantisedExperts, storage_named
from drlora.moe.packing import (
    parameter_at,
    places_of,
    prepare_around,
    put_in,
    refuse_unfit,
    stacked,
)
from drlora.ops.storage.packed import Packed, packed_format


@torch.no_grad()
def quantise_experts(model: nn.Module, storage: str = "nf4", nested: bool = False) -> nn.Module:
    """Pack the experts of every MoE block of `model`, in place.

    Args:
        model: a model of transformers without an adapter, its weights where they are to be.
        storage: `nf4` (4.5 bits a number), `nf4-nested` (4.13 bits), `int8`, `mxfp4` or `fp8`.
        nested: whether the scales of `nf4` are of eight bits themselves, which is `nf4-nested`.

    Returns:
        `model`. What its experts compute is what the packed numbers stand for, in the dtype that
        they had.

    Raises:
        ConfigError: if there is no such storage, no block, a block whose family names no places
            for packed matrices, or a matrix that the storage cannot take. Nothing is packed then.
    """
    storage = storage_named(storage, nested)
    kind = packed_format(storage)
    names = [block.experts_name for block in find_blocks(model)]  # refuses a model without any
    found = [(name, model.get_submodule(name)) for name in names]
    for name, experts in found:
        refuse_unfit(name, experts, kind)
    for name, experts in found:
        for place in places_of(experts):
            weight = parameter_at(experts, place.path).detach()
            put_in(experts, {place.path: Packed.of(stacked(weight, place), kind)})
        prepare_around(model, name)
    # What from_pretrained leaves on a model that it quantised.
    marked: Any = model
    marked.hf_quantizer = ExpertsQuantizer(QuantisedExperts(storage), pre_quantized=False)
    marked.is_quantized = True
    return model


def refuse_unpackable(model: nn.Module, storage: str) -> None:
    """Before a weight is read.

    Args:
        model: without memory for its weights.
        storage: as `quantise_experts` takes it.

    Raises:
        ConfigError: what `quantise_experts` would.
    """
    for block in find_blocks(model):
        refuse_unfit(
            block.experts_name, model.get_submodule(block.experts_name), packed_format(storage)
        )
