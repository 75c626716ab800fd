"""Find the Mixture-of-Experts blocks of a model by their structure, never by a list of names.

Nearly all models of transformers 5 keep the experts of a block in one module with two 3-D
parameters, `gate_up_proj (E, 2I, H)` and `down_proj (E, H, I)`; flags on the module say how they
are laid out. A module that looks like experts but is laid out otherwise is refused by name, so
that no model is adapted by half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe as hf_moe

from drlora.errors import ConfigError
from drlora.ops import ExpertWeights

# Flags that transformers puts on an experts module, with the values of the standard layout.
_STANDARD_FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}


@dataclass(frozen=True)
class MoEBlock:
    """One MoE layer.

    Attributes:
        name: full name of the block, e.g. `model.layers.0.mlp`.
        experts_name: full name of its experts module.
        router_name: full name of its router module, or None if none was recognised.
        num_experts: E.
        hidden_size: H, in-features of gate_up and out-features of down.
        expert_width: I, in-features of down.
    """

    name: str
    experts_name: str
    router_name: str | None
    num_experts: int
    hidden_size: int
    expert_width: int

    def shape_of(self, projection: str) -> tuple[int, int]:
        """(in-features, out-features) of one expert's `gate_up`, `gate`, `up` or `down`."""
        return {
            "gate_up": (self.hidden_size, 2 * self.expert_width),
            "gate": (self.hidden_size, self.expert_width),
            "up": (self.hidden_size, self.expert_width),
            "down": (self.expert_width, self.hidden_size),
        }[projection]


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """All MoE blocks of `model`, in the order of its modules.

    Raises:
        ConfigError: if there is none, or if one is laid out in a way that is not understood; the
            message names the module and what was different.
    """
    modules = dict(model.named_modules())
    blocks = [
        _describe(name, module, modules)
        for name, module in modules.items()
        if _looks_like_experts(module)
    ]
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no Mixture-of-Experts block: no module with the 3-D "
            f"parameters gate_up_proj and down_proj was found. Use PEFT's LoraConfig for a dense "
            f"model; an MoE model whose experts are separate Linear modules is not supported."
        )
    return blocks


def expert_weights(experts: Any) -> ExpertWeights:
    """The frozen weights of a standard experts module, as the engines read them."""
    act = getattr(experts, "act_fn", None)
    default_gate = type(experts)._apply_gate is hf_moe._default_apply_gate
    return ExpertWeights(
        experts.gate_up_proj,
        experts.down_proj,
        experts._apply_gate,
        is_silu=default_gate and is_silu(act),
    )


def is_silu(act: object) -> bool:
    """Whether an activation module is x * sigmoid(x)."""
    name = type(act).__name__
    return isinstance(act, nn.SiLU) or name in ("SiLUActivation", "SiLU")


def _looks_like_experts(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    expert_parts = [own[key] for key in ("gate_up_proj", "up_proj") if key in own]
    return "down_proj" in own and any(part.dim() >= 3 for part in expert_parts)


def _describe(name: str, experts: Any, modules: dict[str, nn.Module]) -> MoEBlock:
    _refuse_other_layouts(name, experts)
    # Already adapted experts sit one level deeper; their block is described as before.
    experts_name = name.removesuffix(".base_layer")
    parent_name = experts_name.rpartition(".")[0]
    num_experts, _, hidden_size = experts.gate_up_proj.shape
    return MoEBlock(
        name=parent_name,
        experts_name=experts_name,
        router_name=_find_router(parent_name, experts_name, modules, num_experts),
        num_experts=num_experts,
        hidden_size=hidden_size,
        expert_width=experts.down_proj.shape[2],
    )


def _refuse_other_layouts(name: str, experts: nn.Module) -> None:
    kind = f"the experts module {name} ({type(experts).__name__})"
    for flag, wanted in _STANDARD_FLAGS.items():
        found = getattr(experts, flag, None)
        if found is None:
            raise ConfigError(
                f"{kind} is not understood: it has no {flag}, so it does not follow transformers' "
                f"experts interface. Supported is the standard layout with {_STANDARD_FLAGS}."
            )
        if found != wanted:
            raise ConfigError(
                f"{kind} is not understood: {flag}={found}, supported is {flag}={wanted}."
            )
    gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    num_experts, double_width, hidden_size = gate_up.shape
    if down.shape != (num_experts, hidden_size, double_width // 2):
        raise ConfigError(
            f"{kind} is not understood: gate_up_proj {tuple(gate_up.shape)} and down_proj "
            f"{tuple(down.shape)} are not (E, 2I, H) and (E, H, I)."
        )
    for key, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"{kind} keeps {key} in {weight.dtype}: quantised experts are not supported; load "
                f"the model in bfloat16, float16 or float32."
            )


def _find_router(
    parent_name: str, experts_name: str, modules: dict[str, nn.Module], num_experts: int
) -> str | None:
    """The block's other child with a weight of one row per expert."""
    for child_name, child in modules[parent_name].named_children():
        full_name = f"{parent_name}.{child_name}" if parent_name else child_name
        if full_name != experts_name and _scores_experts(child, num_experts):
            return full_name
    return None


def _scores_experts(module: nn.Module, num_experts: int) -> bool:
    def has_rows(weight: Tensor) -> bool:
        return weight.dim() == 2 and weight.shape[0] == num_experts

    return any(has_rows(weight) for weight in module.parameters())
