"""Adapters on models that transformers sharded when it loaded them (FSDP2, expert parallelism).

What comes in after that is whole in each process, and no engine averages its gradient. So an
adapter's own tensors become units of FSDP2 too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
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


def share_out(model: nn.Module, adapter: str, pools: Iterable[nn.Module]) -> None:
    """Share out what an adapter trains on a model that transformers sharded when it was loaded.

    Each of these is a unit of FSDP2 of its own over the data-parallel processes, so its gradient is
    averaged under the Trainer and in a loop of one's own: pools, and ordinary LoRA.

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
    for unit in [*([pool] for pool in pools), *_ordinary_lora(model, adapter)]:
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


def _is_shared(parameter: Tensor) -> bool:
    return isinstance(parameter.data, DTensor)
