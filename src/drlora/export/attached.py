"""Whether a plain PEFT LoRA changes each weight as the adapter does, by PEFT's own account."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from drlora.export.float32 import widened
from drlora.export.peft_lora import target_of
from drlora.export.reference import BlockReference, Deviation, Reference
from drlora.export.updates import PARAMETERS
from drlora.ops.weights import Matrix


@torch.no_grad()
def compare_attached(result: PeftModel, reference: Reference) -> Deviation:
    """Compare what PEFT adds to each weight with what the adapter adds, one layer at a time.

    Args:
        result: carries the LoRA, under the name `default`.
        reference: the adapter.
    """
    found = Deviation()
    seen = set()
    for name, module in result.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            target = target_of(name, module)
            seen.add(target)
            _compare_layer(found, target, _added_by(module), reference)
    for name, block, matrix in _adapted(reference):
        if not seen & {f"{name}.{key}" for key in PARAMETERS[matrix]}:
            _compare_stack(found, f"{name}.{matrix}", None, block, matrix)
    for name in reference.linears:
        if name not in seen:
            found.add(name, wanted := reference.linear_update(name), wanted)
    return found


def _added_by(module: Any) -> Tensor:
    """PEFT's update of a layer; in 16 bits PEFT would round it before it adds it."""
    with widened(list(module.parameters())):
        return module.get_delta_weight("default").detach()


def _compare_layer(found: Deviation, target: str, delta: Tensor, reference: Reference) -> None:
    if target in reference.linears:
        wanted = reference.linear_update(target)
        found.add(target, delta.double().cpu() - wanted, wanted)
        return
    experts, _, key = target.rpartition(".")
    matrix = next((m for m, keys in PARAMETERS.items() if key in keys), None)
    if matrix is None or experts not in reference.blocks:
        found.add(target, delta, torch.zeros_like(delta))  # nothing should be here
        return
    _compare_stack(found, target, delta, reference.blocks[experts], matrix)


def _compare_stack(
    found: Deviation, where: str, delta: Tensor | None, block: BlockReference, matrix: Matrix
) -> None:
    """`delta`: (E, ., .) as the model keeps the parameter, or None if nothing is added."""
    for expert in range(block.num_experts):
        wanted = block.update(matrix, expert)
        if matrix in block.transposed:
            wanted = wanted.T
        got = torch.zeros_like(wanted) if delta is None else delta[expert].double().cpu()
        found.add(f"expert {expert} of {where}", got - wanted, wanted)


def _adapted(reference: Reference) -> list[tuple[str, BlockReference, Matrix]]:
    """Block by block, the matrices that have an update."""
    return [
        (name, block, matrix)
        for name, block in reference.blocks.items()
        for matrix in dict.fromkeys(piece.matrix for piece in block.pieces)
    ]
