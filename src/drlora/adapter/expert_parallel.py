"""Adapters on experts that transformers has spread over processes (expert parallelism).

A process holds E / ep experts of a block, and transformers brings each token to the process of its
expert and back. The rows of a pool are not split by expert: any process may hold any row, and the
one that computes an expert gathers that expert's rows. So a rank that goes to an expert elsewhere
changes its owner and nothing else: budget, decisions, statistics and files are those of any run.

A pool is a unit of FSDP2 of its own over the data-parallel processes: each keeps a share of rows,
moments and gradients, and backward adds up what the experts of all processes contributed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from drlora.errors import ConfigError
from drlora.moe.families import Family
from drlora.moe.refusals import is_expert_parallel

Compute = Callable[[Tensor, Tensor, Tensor, range], Tensor]


class Exchange:
    """Takes the tokens of one block to the processes of their experts, and brings them back.

    It is transformers' own, built a second time around the adapted experts; to transformers it
    stands for the experts module (`forward`, `num_experts`, `config`).

    Args:
        base_layer: the block's experts module, spread by transformers.
        model: the whole model, which knows the processes.

    Attributes:
        num_experts: E / ep, how many experts this process holds.
        experts: which of all E these are.
    """

    def __init__(self, base_layer: nn.Module, model: nn.Module) -> None:
        from transformers.distributed.expert_parallel import EPImplementationInterface

        of_base: Any = base_layer
        meshes, settings = _meshes(model), _settings(model)
        ep_mesh: DeviceMesh = meshes.get_mesh("ep")
        self.base_layer = of_base
        self.num_experts: int = of_base.num_experts
        self.config = of_base.config
        first = ep_mesh.get_local_rank() * self.num_experts
        self.experts = range(first, first + self.num_experts)
        self._compute: Compute | None = None
        build = EPImplementationInterface()[settings.ep_implementation]
        self._exchange = build(self, ep_mesh, meshes.get_mesh("tp"))
        self._frozen = of_base.forward
        of_base.forward = self._of_module

    @torch.compiler.disable
    def __call__(
        self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, compute: Compute
    ) -> Tensor:
        """Routing-weighted sum of the experts' outputs, (T, H).

        Args:
            x_TH: inputs of this process's tokens.
            index_TK: their experts, int64 in [0, E).
            weight_TK: their routing weights.
            compute: the same of the experts here, with their numbers counted from 0, and which of
                all they are; the base layer's parameters are those of these experts meanwhile.
        """
        self._compute = compute
        # By a call of the module, whose hooks have FSDP2 gather the experts' weights.
        return self.base_layer(x_TH, index_TK, weight_TK, self)

    def forward(self, x_nH: Tensor, index_nK: Tensor, weight_nK: Tensor) -> Tensor:
        """The experts here, for the tokens that came here: called by transformers' exchange."""
        assert self._compute is not None
        return self._compute(x_nH, index_nK, weight_nK, self.experts)

    def take_off(self) -> None:
        """Leave the base layer as transformers made it."""
        self.base_layer.forward = self._frozen

    def _of_module(
        self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, exchange: Exchange | None = None
    ) -> Tensor:
        """What a call of the base layer does; without an exchange, what it did before."""
        from transformers.distributed.parallel_utils import _use_local_dtensor_params

        if exchange is None:
            return self._frozen(x_TH, index_TK, weight_TK)
        with _use_local_dtensor_params(self.base_layer):
            return self._exchange(x_TH, index_TK, weight_TK)


def exchange_for(base_layer: nn.Module, model: nn.Module) -> Exchange | None:
    """That of an experts module, if transformers has spread it."""
    return Exchange(base_layer, model) if is_expert_parallel(base_layer) else None


def refuse_unfit_experts(name: str, module: nn.Module, family: Family, model: nn.Module) -> None:
    """Refuse spread experts that could not be computed here.

    Args:
        name: full name of the experts module.
        module: without its adapters.
        family: what it is.
        model: the whole model.

    Raises:
        ConfigError: saying why, and the way out.
    """
    if not is_expert_parallel(module):
        return
    of = f"the experts of {name} ({type(module).__name__}) are expert-parallel"
    meshes, settings = _meshes(model), _settings(model)
    if meshes is None or settings is None:
        raise ConfigError(
            f"{of}, but the model does not say over which processes: load it with transformers' "
            f"distributed_config=DistributedConfig(fsdp_size=N, ep_size=M), or without expert "
            f"parallelism (data parallelism and FSDP2 work)."
        )
    if not family.can_be_spread:
        raise ConfigError(
            f"{of}, and only experts of transformers' interface can be adapted so: load the model "
            f"without ep_size (data parallelism and FSDP2 work)."
        )
    if not family.weights(module).is_plain:
        raise ConfigError(
            f"{of} and packed: load the model in bfloat16, or packed without ep_size, each process "
            f"with all experts (data parallelism)."
        )
    if "megamoe" in f"{settings.ep_implementation} {_implementation(module)}":
        raise ConfigError(
            f"{of} by a kernel that has no backward pass (megamoe): load the model with "
            f"ep_implementation='auto' and another experts_implementation."
        )


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
    meshes, settings = _meshes(model), _settings(model)
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
    settings = _settings(model)
    return _meshes(model) is not None and settings is not None and settings.dp_size > 1


def _ordinary_lora(model: nn.Module, adapter: str) -> Iterator[list[nn.Module]]:
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield [module.lora_A[adapter], module.lora_B[adapter]]


def _is_shared(parameter: Tensor) -> bool:
    return isinstance(parameter.data, DTensor)


def _meshes(model: nn.Module) -> Any:
    return getattr(model, "_mesh_manager", None)


def _settings(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "distributed_config", None)


def _implementation(module: Any) -> str:
    return str(getattr(getattr(module, "config", None), "_experts_implementation", ""))
