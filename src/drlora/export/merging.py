"""The adapter merged into its base, with each weight compared with what it must become.

    W' = round(W + B A)

What rounding to the stored dtype must do is known to the bit, so it is told from an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from drlora.adapter.layer import DrLoraExperts
from drlora.adapter.linear import ExactLinear
from drlora.export.reference import BlockReference, Deviation, Reference
from drlora.ops.merge import Rounding, exact_device
from drlora.ops.weights import MATRICES, Matrix


@dataclass
class Kept:
    """What of the update is left in the stored weights; sums over all updated entries.

    Attributes:
        entries: number of entries that the adapter changes.
        unmoved: of these, how many rounded back to what they were.
        swallowed: how many rounding to the nearest would have rounded back.
    """

    entries: int = 0
    unmoved: int = 0
    swallowed: int = 0
    _along: float = 0.0
    _nearest_along: float = 0.0
    _effect: float = 0.0

    @torch.no_grad()
    def add(self, before: Tensor, after: Tensor, update: Tensor) -> None:
        """Note one weight; any shape, `before` and `after` in the stored dtype."""
        is_updated = update != 0
        self.entries += int(is_updated.sum())
        self.unmoved += int((is_updated & (before == after)).sum())
        self._effect += float(update.square().sum())
        self._along += float(((after.double() - before.double()) * update).sum())
        nearest = (before.double() + update).to(before.dtype)
        self.swallowed += int((is_updated & (before == nearest)).sum())
        self._nearest_along += float(((nearest.double() - before.double()) * update).sum())

    @property
    def unmoved_share(self) -> float:
        """0 to 1."""
        return self.unmoved / max(self.entries, 1)

    @property
    def swallowed_share(self) -> float:
        """0 to 1: of rounding to the nearest."""
        return self.swallowed / max(self.entries, 1)

    @property
    def share(self) -> float:
        """The part of the update that is in the weights, along itself; 1 if nothing is lost."""
        return self._along / self._effect if self._effect else 1.0

    @property
    def nearest_share(self) -> float:
        """The part of the update that rounding to the nearest would have left."""
        return self._nearest_along / self._effect if self._effect else 1.0


def round_trained(
    model: PeftModel, adapter: str, rounding: Rounding, besides: Collection[str] = ()
) -> bool:
    """Bring modules trained in full to the dtype that the base keeps them in, still in float32.

    `besides`: names of those that are left as they are.

    Returns:
        Whether that changed anything. Only trained routers are kept wider than the base.
    """
    changed = False
    for name, module in model.get_base_model().named_modules():
        is_trained = isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        if is_trained and name not in besides:
            dtypes = {k: p.dtype for k, p in module.original_module.named_parameters()}
            for key, parameter in module.modules_to_save[adapter].named_parameters():
                dtype = dtypes[key]
                if dtype != parameter.dtype and dtype.is_floating_point:
                    exact = parameter.data.to(exact_device(parameter), torch.float64)
                    parameter.data.copy_(rounding(exact, dtype, f"{name}.{key}"))
                    changed = True
    return changed


def untie(model: PeftModel, reference: Reference) -> None:
    """Give a head with LoRA a weight of its own, where it is the input embedding's too.

    Otherwise the update would be added to both. PEFT then says in the config that they differ.
    """
    inner: Any = model.get_base_model()
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    names = {id(module): name for name, module in inner.named_modules()}
    if head is not None and names[id(head)] in reference.linears and _is_plain(head):
        layer = head.get_base_layer()
        if layer.weight is embedding.weight:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


@contextmanager
def as_if_merged(model: PeftModel, reference: Reference, rounding: Rounding) -> Iterator[Callable]:
    """A `prepare` for `in_float32` that makes the wide weights what merging must make of them.

    Adapters are off meanwhile, modules that were trained in full are not.
    """
    inner = model.get_base_model()
    layers: dict[str, Any] = {
        n: m for n, m in inner.named_modules() if isinstance(m, BaseTunerLayer)
    }
    names = {id(module): name for name, module in layers.items()}
    dtypes = {id(m): _plain_weight(m).dtype for m in layers.values() if _is_plain(m)}

    def prepare(module: nn.Module) -> None:
        if isinstance(module, DrLoraExperts) and names[id(module)] in reference.blocks:
            _write_block(module, reference.blocks[names[id(module)]], rounding)
        elif id(module) in dtypes and names[id(module)] in reference.linears:
            name, weight = names[id(module)], _plain_weight(module)
            weight.data.copy_(_merged(reference, name, weight, dtypes[id(module)], rounding))

    merged_ones = [m for m in layers.values() if isinstance(m, DrLoraExperts) or _is_plain(m)]
    for layer in merged_ones:
        layer._disable_adapters = True
    try:
        yield prepare
    finally:
        for layer in merged_ones:
            layer._disable_adapters = False


@torch.no_grad()
def merge(
    model: PeftModel, adapter: str, reference: Reference, rounding: Rounding
) -> tuple[Any, Deviation, Kept]:
    """The base with the adapter in its weights, how far they are from what they must be, and what
    of the update is left; `model` is used up.

    Besides the weights there is never more than a copy of one block's experts.
    """
    found, kept = Deviation(), Kept()
    for name, module in list(model.get_base_model().named_modules()):
        if isinstance(module, DrLoraExperts) and name in reference.blocks:
            module.rounding = rounding
            _watch(module, reference.blocks[name], found, kept)
        elif name in reference.linears and _is_plain(module):
            before = _plain_weight(module).detach().clone()
            _merge_linear(module, adapter, name, rounding)
            wanted = _merged(reference, name, before, before.dtype, rounding)
            device = exact_device(before)
            after, update = _plain_weight(module).to(device), reference.linear_update(name)
            found.add(name, after.double() - wanted.to(device).double(), update.to(device))
            kept.add(before.to(device), after, update.to(device))
    base = model.merge_and_unload(adapter_names=[adapter])
    return base, found, kept


def _watch(layer: DrLoraExperts, block: BlockReference, found: Deviation, kept: Kept) -> None:
    """Have the weights compared when PEFT merges this layer."""
    unload, rounding = layer.unload_and_optionally_merge_module, layer.rounding

    def unload_and_compare(*args: Any, **kwargs: Any) -> nn.Module:
        experts = range(block.num_experts)
        before = {m: [_weight(layer, m, e).clone() for e in experts] for m in MATRICES}
        base = unload(*args, **kwargs)
        for matrix, weights in before.items():
            for expert in experts:
                after = _weight(layer, matrix, expert)
                device = exact_device(after)
                before_OI, after_OI = weights[expert].to(device), after.to(device)
                update_OI = block.update(matrix, expert).to(device)
                wanted_OI = block.merged(matrix, expert, before_OI, rounding)
                error_OI = after_OI.double() - wanted_OI.double()
                found.add(f"expert {expert} of {block.name}.{matrix}", error_OI, update_OI)
                kept.add(before_OI, after_OI, update_OI)
        return base

    layer.unload_and_optionally_merge_module = unload_and_compare  # type: ignore[method-assign]


def _weight(layer: DrLoraExperts, matrix: Matrix, expert: int) -> Tensor:
    """(O, I) of one expert, as it is now."""
    return layer.base_weights.matrix(matrix).read(expert).detach()


def _write_block(layer: DrLoraExperts, block: BlockReference, rounding: Rounding) -> None:
    for matrix in MATRICES:
        for expert in range(block.num_experts):
            merged_OI = block.merged(matrix, expert, _weight(layer, matrix, expert), rounding)
            layer.base_weights.matrix(matrix).write(expert, merged_OI)


def _merge_linear(module: Any, adapter: str, name: str, rounding: Rounding) -> None:
    """PEFT would round the update before it adds it. What is left for PEFT to add is zero."""
    weight = _plain_weight(module)
    device = exact_device(weight)
    a_rI = module.lora_A[adapter].weight.to(device, torch.float64)
    b_Or = module.lora_B[adapter].weight.to(device, torch.float64)
    exact = weight.to(device, torch.float64) + b_Or @ a_rI * module.scaling[adapter]
    weight.data.copy_(rounding(exact, weight.dtype, name))
    module.lora_B[adapter].weight.data.zero_()


def _merged(
    reference: Reference, name: str, weight: Tensor, dtype: torch.dtype, rounding: Rounding
) -> Tensor:
    device = exact_device(weight)
    exact = weight.detach().to(device, torch.float64) + reference.linear_update(name).to(device)
    return rounding(exact, dtype, name).to(weight.device)


def _is_plain(module: nn.Module) -> bool:
    """An ordinary linear layer with LoRA; of quantised ones PEFT knows how to merge them."""
    return isinstance(module, ExactLinear)


def _plain_weight(module: Any) -> Tensor:
    return module.get_base_layer().weight
