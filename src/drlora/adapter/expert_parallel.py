"""Adapters on experts that transformers has spread over processes (expert parallelism).

A process holds E / ep experts of a block, and transformers brings each token to the process of its
expert and back. The rows of a pool are not split by expert: any process may hold any row, and the
one that computes an expert gathers that expert's rows. So a rank that goes to an expert elsewhere
changes its owner and nothing else: budget, decisions, statistics and files are those of any run.

A pool is a unit of FSDP2 of its own over the data-parallel processes (sharded): each keeps a share
of rows, moments and gradients, and backward adds up what the experts of all processes contributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from drlora.adapter.sharded import meshes_of, settings_of
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
        meshes, settings = meshes_of(model), settings_of(model)
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
    meshes, settings = meshes_of(model), settings_of(model)
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


def _implementation(module: Any) -> str:
    return str(getattr(getattr(module, "config", None), "_experts_implementation", ""))
