"""A fingerprint of the packed experts of a model: which base an adapter was trained on.

Packing is the same every time, so an adapter finds the numbers again that it was trained on, unless
the base is another one, or was packed by other code. A fingerprint tells: the SHA-256 of the stored
bytes of one expert of each block, as they lie in memory, whatever device they are on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from drlora.moe.blocks import MoEBlock
from drlora.moe.families import family_of
from drlora.ops.weights import MATRICES


def fingerprint(model: nn.Module, blocks: Sequence[MoEBlock]) -> str | None:
    """64 hexadecimal digits; None where experts are not packed, or have no bytes yet."""
    found = hashlib.sha256()
    num_parts = 0
    for number, block in enumerate(blocks):
        experts = model.get_submodule(block.experts_name)
        base = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
        family = family_of(base)
        assert family is not None, "find_blocks names recognised modules only"
        weights = family.weights(base)
        if weights.device.type == "meta":
            return None
        for matrix in (part for name in MATRICES for part in weights.matrix(name).parts):
            for name, part in sorted(matrix.bits_of(number % block.num_experts).items()):
                data = part.detach().contiguous().view(-1).view(torch.uint8).cpu()
                found.update(name.encode())
                found.update(data.numpy().tobytes())
                num_parts += 1
    return found.hexdigest() if num_parts else None
