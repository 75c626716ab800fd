"""What DeepSpeed's ZeRO makes of a parameter, read from the marks that it leaves there.

    ZeRO-1, ZeRO-2   each process has the whole parameter in its own dtype, and trains a float32
                     copy of a part of it
    ZeRO-3           it has a part of the parameter too; `parameter.data` is empty except while a
                     module computes, or always whole if the parameter is small (persistent)
    zero.Init        ZeRO-3 from the moment that the model is loaded
    leaf modules     under ZeRO-3, blocks that are brought together whole (of Mixtral, Qwen2-MoE and
                     Qwen3-MoE without being asked); a backward hook on the module takes the
                     gradients of its parameters

A part is a run of elements that may begin and end inside of a row. Parts of several parameters lie
behind each other in one flat float32 tensor, which is what the inner, ordinary optimizer is given:
it steps on them with gradients that are reduced, unscaled and clipped by then, and only afterwards
does ZeRO copy the result to where it is computed with. DeepSpeed is not imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drlora.errors import ConfigError

# Where `adopt` notes which optimizer trains a parameter; ZeRO-1 and ZeRO-2 leave no way to it.
_OPTIMIZER = "_drlora_zero"

_KNOWN = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
_INSTEAD = "Train with plain ZeRO-1, 2 or 3, with DDP, or with FSDP2"


class Part(NamedTuple):
    """A run of a parameter's elements, and where it lies.

    Attributes:
        flat: one dimension; `flat[offset : offset + size]` are elements `start` to
            `start + size - 1` of the parameter.
    """

    flat: Tensor
    offset: int
    size: int
    start: int


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO trains the parameter, or has split it (zero.Init)."""
    return is_split(parameter) or hasattr(parameter, "_hp_mapping")


def is_split(parameter: Tensor) -> bool:
    """Whether ZeRO-3 or zero.Init keeps it in parts, brought together or not."""
    return hasattr(parameter, "ds_id")


def is_empty(parameter: Tensor) -> bool:
    """Whether its elements are elsewhere now, as ZeRO-3 and zero.Init leave it."""
    return hasattr(parameter, "ds_shape") and parameter.shape != parameter.ds_shape


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def part_of(parameter: Any) -> Part | None:
    """What this process trains of a parameter; None, if nothing.

    Raises:
        ConfigError: if the optimizer was never shown to `RankDynamics.watch`.
    """
    if is_split(parameter):
        return _part_of_stage_3(parameter)
    found = parameter._hp_mapping
    if found is None:
        return None
    zero = getattr(parameter, _OPTIMIZER, None)
    if zero is None:
        raise ConfigError(
            "DeepSpeed ZeRO trains the adapter, and nothing says with which optimizer: call "
            "dynamics.watch(engine.optimizer) before the first step."
        )
    flat = zero.single_partition_of_fp32_groups[found.param_group_index]
    at = found.hp_fragment_address
    return Part(flat, at.start, at.numel, found.lp_fragment_address.start)


def weights_of(parameter: Any) -> Part | None:
    """The best that there is of its weights in this process: as trained, or the split copy."""
    zero = getattr(parameter, "_z3_optimizer", None)
    is_frozen = zero is None or zero.get_param_id(parameter) not in zero.grad_position
    return _split_part(parameter) if is_split(parameter) and is_frozen else part_of(parameter)


def stored_parts(parameter: Any) -> Iterator[Part]:
    """Every run of elements that this process has: as trained, and as it computes with them."""
    if (part := part_of(parameter)) is not None:
        yield part
    if is_split(parameter):
        yield _split_part(parameter)
    if not is_empty(parameter):
        yield Part(parameter.data.view(-1), 0, parameter.numel(), 0)


def zero_of(optimizer: object) -> Any:
    """ZeRO's optimizer under accelerate's wrapper, or the object itself; None without ZeRO."""
    while optimizer is not None:
        if any(base.__name__ == "ZeROOptimizer" for base in type(optimizer).__mro__):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def adopt(zero: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Note that an optimizer trains these parameters, unless rows cannot be followed in it.

    Args:
        zero: as `zero_of` gives it.

    Raises:
        ConfigError: naming what is not supported, and what is.
    """
    if (reason := _unfit(zero)) is not None:
        raise ConfigError(f"ranks cannot grow under DeepSpeed with {reason}. {_INSTEAD}.")
    for parameter in parameters:
        setattr(parameter, _OPTIMIZER, zero)


def refuse_without_zero(optimizer: object) -> None:
    """Refuse an optimizer of DeepSpeed's that is none of ZeRO's.

    Raises:
        ConfigError: if it is one.
    """
    of_deepspeed = type(optimizer).__module__.startswith("deepspeed.")
    if of_deepspeed or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":  # accelerate's
        raise ConfigError(
            "DeepSpeed trains without ZeRO (stage 0) and clears gradients before anybody can read "
            "them, so ranks cannot grow. Set the stage of zero_optimization to 1, 2 or 3, or train "
            "with DDP."
        )


def lacks_engine(parameters: Iterable[Tensor]) -> bool:
    """Whether ZeRO has split a model, of all these parameters, that no engine computes with yet."""
    split = [parameter for parameter in parameters if is_split(parameter)]
    return bool(split) and not any(hasattr(parameter, "_z3_optimizer") for parameter in split)


def refuse_without_engine(parameters: Iterable[Tensor]) -> None:
    """Refuse a model that ZeRO has split and that no engine brings together yet.

    Args:
        parameters: of the model, all of them.

    Raises:
        ConfigError: if it is so.
    """
    if lacks_engine(parameters):
        raise ConfigError(
            "DeepSpeed ZeRO has split the weights of this model as it was loaded, and no engine "
            "brings them together to compute with: call this after deepspeed.initialize."
        )


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """While it lasts, parameters that zero.Init has split show their whole shape, on meta."""
    kept = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_empty(parameter)
    ]
    stand_ins = {id(parameter): _stand_in(parameter) for _, _, parameter in kept}
    try:
        for module, name, parameter in kept:
            # Past ZeRO's own dictionary, which brings a parameter together when it is asked for it.
            dict.__setitem__(module._parameters, name, stand_ins[id(parameter)])
        yield
    finally:
        for module, name, parameter in kept:
            dict.__setitem__(module._parameters, name, parameter)


def leaves_of(zero: Any) -> list[nn.Module]:
    """The leaf modules in which ZeRO-3 trains anything; none under ZeRO-1 and 2."""
    return list(getattr(zero, "leaf_parameters", {}))


def ask_inputs_for_gradients(module: nn.Module) -> RemovableHandle:
    """Have a leaf module's inputs require gradients wherever a graph is made.

    torch calls the backward hook of a module whose inputs need no gradient before those of its
    parameters are there, and ZeRO-3 (DeepSpeed 0.19) fails then. So it is with the first block that
    an adapter is on, for all before it is frozen.
    """

    def ask(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        floats = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        if not torch.is_grad_enabled() or any(x.requires_grad for x in floats):
            return None
        return tuple(
            x.detach().requires_grad_() if any(x is one for one in floats) else x for x in inputs
        )

    return module.register_forward_pre_hook(ask)


@contextmanager
def leaf_hooks_off(parameters: Iterable[Any]) -> Iterator[None]:
    """While it lasts, ZeRO-3 takes no gradients from leaf modules, and leaves none in them."""
    marked = (getattr(parameter, "_z3_optimizer", None) for parameter in parameters)
    optimizers = {id(zero): zero for zero in marked if zero is not None}.values()
    handles = [handle for zero in optimizers for handle in zero._leaf_module_hooks]
    hooks_of = [(handle.id, handle.hooks_dict_ref()) for handle in handles]
    kept = [(hooks, key, hooks.pop(key)) for key, hooks in hooks_of if hooks and key in hooks]
    try:
        yield
    finally:
        for hooks, key, hook in kept:
            hooks[key] = hook


def refuse_partitioned(parameters: Iterable[Tensor], what: str) -> None:
    """Refuse what looks at parameters outside of the engine's own steps.

    Args:
        parameters: that are needed.
        what: cannot be done, and the way out.

    Raises:
        ConfigError: if any of them is ZeRO's.
    """
    if any(is_partitioned(parameter) for parameter in parameters):
        raise ConfigError(f"DeepSpeed ZeRO keeps the weights of this model, so {what}")


def _stand_in(parameter: Tensor) -> nn.Parameter:
    whole = torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta")
    stand_in = nn.Parameter(whole, requires_grad=False)
    stand_in.ds_shape = whole.shape  # type: ignore[attr-defined]
    return stand_in


def _part_of_stage_3(parameter: Any) -> Part | None:
    zero = getattr(parameter, "_z3_optimizer", None)
    number = zero.get_param_id(parameter) if zero is not None else None
    if zero is None or number not in zero.grad_position:  # frozen
        return None
    group, offset, room = zero.grad_position[number]
    start = zero._get_param_partition_rank(parameter) * room
    size = min(room, parameter.ds_numel - start)  # the last part is filled up
    flat = zero.fp32_partitioned_groups_flat[group]
    return Part(flat, offset, size, start) if size > 0 else None


def _split_part(parameter: Any) -> Part:
    """The part in the dtype of the model, which ZeRO-3 gathers from."""
    room = parameter.ds_tensor.ds_numel
    start = dist.get_rank(parameter.ds_process_group) * room
    size = max(0, min(room, parameter.ds_numel - start))
    return Part(parameter.ds_tensor.data.view(-1), 0, size, start)


def _unfit(zero: Any) -> str | None:
    """Why rows cannot be followed in ZeRO's optimizer, or None if they can."""
    kind = type(zero).__name__
    if getattr(zero, "zenflow", False) or "ZenFlow" in kind:
        return "zenflow"
    if getattr(zero, "has_moe_layers", False):
        return "expert_parallel"
    if kind not in _KNOWN:  # MiCS, BF16_Optimizer, SuperOffload
        return f"the optimizer {kind}"
    if getattr(zero, "zero_hpz_partition_size", 1) > 1:
        return f"zero_hpz_partition_size={zero.zero_hpz_partition_size}"
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        return "offloading to NVMe"
    if getattr(zero, "partial_offload", 1.0) != 1.0:
        return f"an offload_optimizer ratio of {zero.partial_offload}"
    shared_by = dist.get_world_size(zero.dp_process_group) if dist.is_initialized() else 1
    if dist.is_initialized() and shared_by != dist.get_world_size():
        return f"groups of {shared_by} of {dist.get_world_size()} processes"
    return None
