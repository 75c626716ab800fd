"""What the first step of a run shows to be set up wrongly, said before time is lost."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.distributed.held import trained_tensor
from drlora.ranks.optimizer_rows import parameter_groups, unwrap_optimizer


def trained_beside(
    model: nn.Module, adapter: str, routers: Collection[nn.Module]
) -> dict[str, dict[str, list[Tensor]]]:
    """What is trained beside experts and routers: setting -> name of the module -> parameters.

    Of `target_modules` they are B (out, rank) alone, of `modules_to_save` all of the copy.

    Args:
        model: with the adapter in it.
        adapter: its name.
        routers: PEFT's wrappers of those that are trained.
    """
    found: dict[str, dict[str, list[Tensor]]] = {"target_modules": {}, "modules_to_save": {}}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(module, LoraLayer) and adapter in module.lora_B:
            b_OR = module.lora_B[adapter].get_parameter("weight")
            found["target_modules"][name] = [b_OR]
        if isinstance(module, ModulesToSaveWrapper) and module not in routers:
            copies = module.modules_to_save
            if adapter in copies:
                found["modules_to_save"][name] = list(copies[adapter].parameters())
    return found


def warn_of_unreached(trained: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> None:
    """Say which modules have no gradient: they learn nothing and cost memory.

    So it is with a tower for images in a run on text, and where a model reads a layer's weight
    without calling the layer. B has a gradient at the start wherever its layer was called.

    Args:
        trained: as `trained_beside` gives it, with the gradients of a whole step.
    """
    for setting, modules in trained.items():
        idle = [name for name, own in modules.items() if not any(map(_has_gradient, own))]
        if idle:
            warnings.warn(
                f"{len(idle)} of the {len(modules)} modules of {setting} had no gradient in the "
                f"first step, such as {idle[0]}: what is not called learns nothing. If that is no "
                f"matter of this one batch, name the others"
                f"{', or use all-stack' if setting == 'target_modules' else ''}.",
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
