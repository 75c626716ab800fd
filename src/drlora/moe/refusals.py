"""Base models that would be adapted and then fail in the first forward pass.

What an adapter reads of a model are ordinary tensors, whole or sharded by experts, where the model
computes, or what a storage is registered for (`drlora.ops.storage`). Whatever else there is between
a weight and its numbers (a quantiser's class of tensors, tensor parallelism, offloading) is
refused before anything is changed.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from drlora.errors import ConfigError
from drlora.ops.storage import has_own_storage

_OFFLOADED = ("cpu", "disk")
_ADAPTERS = (".drlora_adapters.", ".lora_", ".modules_to_save.", ".token_adapter.")


def refuse_unfit_model(model: nn.Module) -> None:
    """Refuse a model that is spread out in a way that adapters cannot follow.

    Raises:
        ConfigError: naming the way out.
    """
    tp_size = getattr(model, "_tp_size", None) or 1
    if tp_size > 1:
        raise ConfigError(
            f"{type(model).__name__} is tensor-parallel (tp_size={tp_size}): each process holds a "
            f"part of every expert, and an adapter would be put on a part. Load it without "
            f"tp_size and tp_plan (data parallelism and FSDP2 work)."
        )
    spread = getattr(getattr(model, "config", None), "distributed_config", None)
    stages = getattr(spread, "pp_size", None) or 1
    if stages > 1:
        raise ConfigError(
            f"{type(model).__name__} is pipeline-parallel (pp_size={stages}): each process has "
            f"some of the layers, and ranks are decided over all of them. Load the model without "
            f"pp_size (data parallelism and FSDP2 work)."
        )
    # accelerate's launcher says so by these; transformers reads the same.
    if _is_on("ACCELERATE_USE_FSDP") and _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading=true cannot work with an adapter: accelerate does not "
            "send buffers, where ranks are kept, to the other processes. Set it to false."
        )


def is_skeleton(model: nn.Module) -> bool:
    """Whether no weight is in memory, but for those of adapters, which may be there already."""
    return all(
        weight.device.type == "meta"
        for name, weight in model.named_parameters()
        if not any(part in name for part in _ADAPTERS)
    )


def refuse_unfit_weights(model: nn.Module, name: str, module: nn.Module, of_skeleton: bool) -> None:
    """Refuse experts, or a router to be trained, whose weights cannot be read as they are.

    Args:
        model: the whole model.
        name: full name of the module in it.
        of_skeleton: what `is_skeleton` says, which looks at all of a skeleton's weights.

    Raises:
        ConfigError: naming the module, the weight and the way out.
    """
    of = f"the weights of {name} ({type(module).__name__})"
    for key, weight in module.named_parameters():
        if not is_plain(weight) and not has_own_storage(weight):
            raise ConfigError(
                f"{of} are no plain tensors: {key} is a {_class_of(weight)}, which says "
                f"{weight.dtype} but keeps other numbers (quantised, for example). Load the model "
                f"without its quantiser for the experts, in bfloat16, float16 or float32."
            )
        if _is_split_inside(weight):
            raise ConfigError(
                f"{of} are sharded inside of each expert: {key} is placed as "
                f"{_placed(weight)}, which is tensor parallelism. Load the "
                f"model without it (data parallelism and FSDP2, by experts, work)."
            )
    if _is_offloaded(model, module, of_skeleton):
        places = sorted({str(place) for place in _device_map(model).values()})
        raise ConfigError(
            f"{of} are not in memory (device meta"
            f"{f', device_map with {places}' if places else ''}): accelerate brings offloaded "
            f"weights in only while the module itself is called, which its adapter does not do. "
            f"Load the model without offloading to cpu or disk, or with a device_map that keeps "
            f"the experts on a device."
        )


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether transformers gave this process a part of the module's experts."""
    return bool(getattr(module, "_is_expert_parallel", False))


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor, or shards of one; a subclass may lie of its dtype."""
    if isinstance(weight, DTensor):
        return type(weight.to_local()) in (Tensor, nn.Parameter)
    return type(weight) in (Tensor, nn.Parameter)


def _class_of(weight: Tensor) -> str:
    inner = weight.to_local() if isinstance(weight, DTensor) else weight
    return f"{type(inner).__module__}.{type(inner).__name__}"


def _is_split_inside(weight: Tensor) -> bool:
    if not isinstance(weight, DTensor):
        return False
    # A dimension that is sharded twice has a class of its own there, which is no Shard.
    by_experts = (getattr(p, "dim", None) == 0 for p in weight.placements)
    replicated = (isinstance(p, Replicate) for p in weight.placements)
    return not all(a or b for a, b in zip(by_experts, replicated, strict=True))


def _placed(weight: Any) -> list[str]:
    return [repr(placement) for placement in weight.placements]


def _is_offloaded(model: nn.Module, module: nn.Module, of_skeleton: bool) -> bool:
    """Whether weights are on meta, and will not be filled as those of a skeleton are."""
    missing = [weight for weight in module.parameters() if weight.device.type == "meta"]
    if all(hasattr(weight, "ds_shape") for weight in missing):  # none, or those of zero.Init
        return False
    if any(place in _OFFLOADED for place in _device_map(model).values()):
        return True
    hooked = any(_hook_offloads(getattr(m, "_hf_hook", None)) for m in module.modules())
    return hooked or not of_skeleton


def _hook_offloads(hook: Any) -> bool:
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


def _device_map(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "hf_device_map", None) or {}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
