"""All experts that follow transformers' experts interface: nearly every MoE model, none by name.

The interface (`transformers.integrations.moe`) fixes the call, `(hidden, index, weights)`, and
says by flags on the module how its parameters lie: `gate_up_proj (E, 2I, H)` and `down_proj
(E, H, I)`, transposed or not, gate and up one after the other or interleaved, with biases or not;
`up_proj (E, I, H)` in the place of gate_up where there is no gate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.integrations import moe as hf_moe

from drlora.moe.families.base import Family, Place, is_silu, register_family
from drlora.ops.storage import storage_of
from drlora.ops.storage.of_others import held_by_parametrization
from drlora.ops.weights import ExpertWeights, as_matrix

# `has_post_expert_norm` came after transformers 5.17.
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class InterfaceExperts(Family):
    """Described by the module's own flags."""

    can_be_spread = True

    def recognises(self, module: nn.Module) -> bool:
        # Those in FP8 have the flags too, and scales beside their parameters.
        return type(module).__name__ != "FP8Experts" and all(hasattr(module, f) for f in FLAGS)

    def missing(self, module: Any) -> str | None:
        names = _parameter_names(module)
        absent = [name for name in names if storage_of(getattr(module, name, None)) is None]
        return f"its flags promise {' and '.join(absent)}, which it has not" if absent else None

    def is_interleaved(self, module: Any) -> bool:
        return module.has_gate and not module.is_concatenated

    def places(self, module: Any) -> list[Place]:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        # What bitsandbytes has quantised in place is packed already.
        is_open = not is_parametrized(module)
        return [Place(first), Place("down_proj")] if is_open else []

    def weights(self, module: Any) -> ExpertWeights:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        own_gate = type(module)._apply_gate is not hf_moe._default_apply_gate
        first_bias = down_bias = None
        if module.has_bias:
            first_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
            down_bias = module.down_proj_bias
        return ExpertWeights(
            as_matrix(_stored(module, first), module.is_transposed),
            as_matrix(_stored(module, "down_proj"), module.is_transposed),
            module._apply_gate if module.has_gate else module.act_fn,
            is_silu=module.has_gate and not own_gate and is_silu(module.act_fn),
            gate_up_bias_EG=first_bias,
            down_bias_EH=down_bias,
            post_norm=module.post_expert_norm if _has_post_norm(module) else None,
        )

    def call(self, module: Any, run: Any, *args: Any, **kwargs: Any) -> Tensor:
        # GPT-OSS names the arguments in another way, in the same order.
        return run(*args, *kwargs.values())


def _stored(module: Any, key: str) -> Any:
    """The parameter; or what it is made of, where reading it would make it wide."""
    held = held_by_parametrization(module, key)
    return getattr(module, key) if held is None else held


def _has_post_norm(module: Any) -> bool:
    return getattr(module, "has_post_expert_norm", hasattr(module, "post_expert_norm"))


def _parameter_names(module: Any) -> list[str]:
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names] if module.has_bias else names


register_family(InterfaceExperts())
