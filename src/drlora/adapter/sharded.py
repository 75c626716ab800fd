"""Adapters on models that transformers sharded when it loaded them (FSDP2, expert parallelism).

What comes in after that is whole in each process, and no engine averages its gradient. So an
adapter's own tensors become units of FSDP2 too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from drlora.errors import ConfigError


def meshes_of(model: nn.Module) -> Any:
    """transformers' device meshes of a model that it has spread over processes, or None."""
    return getattr(model, "_mesh_manager", None)


def settings_of(model: nn.Module) -> Any:
    """The DistributedConfig that it was loaded with, or None."""
    return getattr(getattr(model, "config", None), "distributed_config", None)


def put_shards_back(model: nn.Module) -> None:
    """Before an adapter comes in: what FSDP2 left gathered after a call of the model is sharded.

    PEFT would freeze the gathered weights, and the shards would train on.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole_while_copied(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Have PEFT copy modules that are trained in full (routers) with whole weights: a collective.

    A copy of shards cannot be computed with, and no engine would bring it together.

    Args:
        model: the whole model; weights that are not sharded are left alone.
        names: of modules, or ends of them, as in `modules_to_save`.

    Raises:
        ConfigError: if one of them cannot be copied.
    """
    ends = tuple(f".{name}" for name in names)
    for name, module in model.named_modules():
        if ends and f".{name}".endswith(ends) and isinstance(module, FSDPModule):
            raise ConfigError(
                f"modules_to_save names {name}, which was sharded for itself when the model was "
                f"loaded: PEFT cannot copy it. Leave it out, or load the model whole and have "
                f"accelerate shard it with the adapter in."
            )
    sharded: list[tuple[nn.Module, str, DTensor]] = [
        (owner, key, weight)
        for name, module in model.named_modules()
        if f".{name}".endswith(ends)
        for owner in module.modules()
        for key, weight in owner._parameters.items()
        if isinstance(weight, DTensor)
    ]
    for owner, key, weight in sharded:
        owner._parameters[key] = nn.Parameter(weight.full_tensor().detach(), weight.requires_grad)
    try:
        yield
    finally:
        for owner, key, weight in sharded:
            weight.requires_grad_(False)
            owner._parameters[key] = weight  # type: ignore[assignment]  # a parameter, as it was


def share_out(model: nn.Module, adapter: str, pools: Iterable[nn.Module]) -> None:
    """Share out what an adapter trains on a model that transformers sharded when it was loaded.

    Each of these is a unit of FSDP2 of its own over the data-parallel processes, so its gradient is
    averaged under the Trainer and in a loop of one's own: pools, ordinary LoRA, trained routers.

    Args:
        model: the whole model; one that was not sharded then is left alone.
        adapter: its name.
        pools: the rank pools.

    Raises:
        ConfigError: if the adapter has no memory yet.
    """
    if not was_sharded_at_load(model):
        return
    meshes, settings = meshes_of(model), settings_of(model)
    replicas = settings.dp_replicate_size > 1
    mesh = meshes.get_mesh(("dp_replicate", "fsdp") if replicas else "fsdp")
    copies = ([copy] for copy in _trained_copies(model, adapter))
    for unit in [*([pool] for pool in pools), *_ordinary_lora(model, adapter), *copies]:
        if any(parameter.is_meta for module in unit for parameter in module.parameters()):
            raise ConfigError(
                "low_cpu_mem_usage=True cannot work on a model that was sharded when it was "
                "loaded: an adapter without memory cannot be shared out. Leave it out."
            )
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad and not _is_shared(p)]
    if names:
        warnings.warn(
            f"{names[0]} and {len(names) - 1} more are trained but not sharded: transformers' "
            f"Trainer averages their gradients over processes, a loop of your own must do so.",
            stacklevel=2,
        )


def was_sharded_at_load(model: nn.Module) -> bool:
    """Whether transformers shared out the model's weights, so that none of them is whole."""
    settings = settings_of(model)
    return meshes_of(model) is not None and settings is not None and settings.dp_size > 1


def _ordinary_lora(model: nn.Module, adapter: str) -> Iterator[list[nn.Module]]:
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield [module.lora_A[adapter], module.lora_B[adapter]]


def _trained_copies(model: nn.Module, adapter: str) -> list[nn.Module]:
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [w.modules_to_save[adapter] for w in wrappers if adapter in w.modules_to_save]


def _is_shared(parameter: Tensor) -> bool:
    return isinstance(parameter.data, DTensor)
