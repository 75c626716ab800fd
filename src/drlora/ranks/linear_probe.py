"""Rows of A along the gradient for ordinary LoRA too (start_a=gradient-all).

What `probe` does beside experts is done here beside the linear layers of `target_modules`: P rows
with A = 0 and B random, added to a layer's output, whose gradient is a random sketch of that of the
layer's own weight. A pass of its own over the batches, so that the probes of experts are gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from drlora.distributed.held import row_width, write_rows
from drlora.distributed.zero import shape_of
from drlora.ranks.directions import num_found
from drlora.ranks.probe import OVERSAMPLING, Loss, own_loss, sketch_gradients
from drlora.ranks.rank_map import adapters_of

# Length of a row of A that PEFT draws: U(-b, b) with b = 1 / sqrt(in), so of mean square b^2 / 3.
_ROW_NORM = math.sqrt(1 / 3)


@torch.no_grad()
def point_linears(
    model: PeftModel,
    batches: Sequence[Mapping[str, Tensor]],
    adapter: str,
    loss: Loss = own_loss,
) -> None:
    """Lay A of the adapter's ordinary LoRA along the gradient of the layers' weights.

    Strongest directions first, each as long as a row that PEFT draws: three times as long, as rows
    of experts are, was worse than random rows (docs/evidence.md, the rivals of 2026). A layer that
    no gradient reaches in these batches keeps its random rows, as do rows that find no direction in
    it. B stays 0, so the model computes what it did. All processes write the same.

    Args:
        model: carries the adapter, not trained yet.
        batches: what the loss is computed of.
        adapter: its name.
        loss: by default the model's own, for which batches have labels.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    blocks = list(adapters_of(model, adapter).values())
    seed = int(next(iter(blocks[0].rank_pools.values())).seed)  # the same in all processes
    with torch.enable_grad(), _probes(layers, adapter, seed) as leaves:
        sketches = sketch_gradients(model, list(leaves.values()), batches, loss, may_miss=True)
    for block in blocks:
        block.meter.reset()  # which counted what the probes saw
    for (name, leaf), sketch_PI in zip(leaves.items(), sketches, strict=True):
        lora_A: Any = layers[name].lora_A[adapter]
        rank = min(layers[name].r[adapter], len(leaf))
        _, strength_P, rows_PI = torch.linalg.svd(sketch_PI, full_matrices=False)
        rows = torch.arange(min(rank, int(num_found(strength_P))), device=rows_PI.device)
        write_rows(lora_A.weight, rows, rows_PI[: len(rows)] * _ROW_NORM)


@contextmanager
def _probes(
    layers: Mapping[str, LoraLayer], adapter: str, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Name of layer -> A (P, I) of the probe beside it, zeros that ask for a gradient."""
    leaves, hooks = {}, []
    generator = torch.Generator().manual_seed(seed)
    try:
        for name, layer in layers.items():
            weight: Tensor = layer.lora_A[adapter].get_parameter("weight")
            width = row_width(weight)
            out = shape_of(layer.lora_B[adapter].get_parameter("weight"))[0]
            rows = min(layer.r[adapter] + OVERSAMPLING, width, out)
            b_PO = torch.randn(rows, out, generator=generator) / math.sqrt(rows)
            leaf = torch.zeros(rows, width, device=weight.device, requires_grad=True)
            module: Any = layer
            assert isinstance(module, nn.Module)
            hook = partial(_add_probe, leaf, b_PO.to(weight.device))
            hooks.append(module.register_forward_hook(hook))
            leaves[name] = leaf
        # A graph compiled now would keep the hooks.
        with torch.compiler.set_stance("force_eager"):
            yield leaves
    finally:
        for handle in hooks:
            handle.remove()


def _add_probe(
    a_PI: Tensor, b_PO: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    added = (args[0].to(a_PI.dtype) @ a_PI.T) @ b_PO
    return output + added.to(output.dtype)
