"""What the first step of a run shows to be set up wrongly, said before time is lost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.distributed.held import trained_tensor
from drlora.ranks.optimizer_rows import parameter_groups, unwrap_optimizer


def ordinary_lora(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Name of each layer of `target_modules` -> its B (out, rank)."""
    return {
        name.removeprefix("base_model.model."): module.lora_B[adapter].get_parameter("weight")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_B
    }


def warn_of_unreached(layers: Mapping[str, Tensor]) -> None:
    """Say which layers of `target_modules` have no gradient: they learn nothing and cost memory.

    So it is with a tower for images in a run on text, and where a model reads a layer's weight
    without calling the layer. B has a gradient at the start wherever its layer was called.

    Args:
        layers: name -> B, whose gradients are those of a whole step.
    """
    idle = [name for name, b_OR in layers.items() if not _has_gradient(b_OR)]
    if idle:
        warnings.warn(
            f"{len(idle)} of the {len(layers)} layers of target_modules had no gradient in the "
            f"first step, such as {idle[0]}: what is not called learns nothing. If that is no "
            f"matter of this one batch, name the others, or use target_modules='all-stack'.",
            stacklevel=3,
        )


def _has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return not parameter.requires_grad
    # Of split tensors a process sees a part, which may be zeros.
    return type(gradient) is not Tensor or bool(gradient.any())


def warn_of_equal_rates(optimizer: object, pool: RankPool, config: DrLoraConfig) -> None:
    """Say that A and B learn at one rate where LoRA+ was asked for."""
    inner = unwrap_optimizer(optimizer)
    ratio = config.option("b_lr_ratio")
    if ratio == 1 or not isinstance(inner, torch.optim.Optimizer):
        return
    groups = parameter_groups(inner)
    trained = [trained_tensor(p) for p in (pool.lora_A, pool.lora_B)]
    rates = [groups[p]["lr"] for p in trained if p is not None and p in groups]
    if len(rates) == 2 and rates[0] == rates[1]:
        warnings.warn(
            f"b_lr_ratio={ratio}, but A and B have the same learning rate; make the "
            f"optimizer with peft.optimizers.create_loraplus_optimizer.",
            stacklevel=4,
        )
