"""Find the Mixture-of-Experts blocks of a model by their structure, never by a list of models.

What experts look like is said by the families (`drlora.moe.families`): transformers' experts
interface, which nearly all models follow, and a few exceptions. A module that looks like experts
and that no family understands is refused by name, so that no model is adapted by half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from drlora.distributed.zero import whole_shapes
from drlora.errors import ConfigError
from drlora.moe.families import FAMILIES, Family, family_of
from drlora.moe.refusals import is_plain, is_skeleton, refuse_unfit_weights
from drlora.ops.storage import has_own_storage
from drlora.ops.weights import MATRICES, ExpertWeights, Matrix

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_top_k", "num_selected_experts")
_EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "gate_proj", "down_proj", "w1", "w2", "w3")
_QUANTISED = (
    "Experts work in bfloat16, float16 or float32: load the model with its quantiser's "
    "dequantize=True, or quantise the other layers alone (bitsandbytes leaves fused experts as "
    "they are)."
)


@dataclass(frozen=True)
class MoEBlock:
    """One MoE layer.

    Attributes:
        name: full name of the block, e.g. `model.layers.0.mlp`.
        experts_name: full name of the module whose place the adapter takes: its experts module, or
            the block itself where no module of it holds the experts alone.
        router_name: full name of its router module, or None if none was recognised.
        num_experts: E.
        hidden_size: H, in-features of gate_up and out-features of down.
        expert_width: I, in-features of down.
        has_gate: whether the first matrix is gate and up, or up alone.
        is_interleaved: whether gate and up alternate in its output features.
        shared_names: full names of the shared experts, which every token goes through.
    """

    name: str
    experts_name: str
    router_name: str | None
    num_experts: int
    hidden_size: int
    expert_width: int
    has_gate: bool = True
    is_interleaved: bool = False
    shared_names: tuple[str, ...] = ()

    def shape_of(self, projection: str) -> tuple[int, int]:
        """(in-features, out-features) of one expert's `gate_up`, `gate`, `up` or `down`."""
        return {
            "gate_up": (self.hidden_size, (1 + self.has_gate) * self.expert_width),
            "gate": (self.hidden_size, self.expert_width),
            "up": (self.hidden_size, self.expert_width),
            "down": (self.expert_width, self.hidden_size),
        }[projection]

    def place_of(self, projection: str) -> tuple[Matrix, int, int]:
        """The matrix that a projection is part of, its first output feature there, and the step."""
        if projection == "down":
            return "down", 0, 1
        step = 2 if self.is_interleaved and projection != "gate_up" else 1
        follows_gate = projection == "up" and self.has_gate
        return "gate_up", (1 if step == 2 else self.expert_width) * follows_gate, step


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """All MoE blocks of `model`, in the order of its modules.

    Raises:
        ConfigError: if there is none, or if one is laid out in a way that is not understood; the
            message names the module and what was missing.
    """
    with whole_shapes(model):
        return _find_blocks(model)


def _find_blocks(model: nn.Module) -> list[MoEBlock]:
    modules = dict(model.named_modules())
    blocks: list[MoEBlock] = []
    owners: dict[nn.Parameter, str] = {}
    of_skeleton = is_skeleton(model)
    for name, module, family in _experts_modules(modules):
        _refuse_shared_weights(name, module, owners)
        refuse_unfit_weights(model, name, module, of_skeleton)
        block = _describe(name, module, family, modules)
        if any(block.name == other.name for other in blocks):  # two kinds of experts in one block
            block = replace(block, name=block.experts_name)
        blocks.append(block)
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no Mixture-of-Experts block: no module follows "
            f"transformers' experts interface, and none is of a family with a file of its own in "
            f"drlora.moe.families. Use PEFT's LoraConfig for a dense model."
        )
    return blocks


def has_experts(model: nn.Module) -> bool:
    """Whether there is a block, or what looks like one."""
    return next(_experts_modules(dict(model.named_modules())), None) is not None


def active_experts(model: nn.Module, block: MoEBlock) -> int | None:
    """K, as the block's router says or, where it says nothing, as the model's config does."""
    router = model.get_submodule(block.router_name) if block.router_name else None
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    candidates = [getattr(router, "top_k", None)]
    candidates += [getattr(text, name, None) for name in _TOP_K_NAMES]
    return next((k for k in candidates if isinstance(k, int)), None)


def _experts_modules(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module, Family]]:
    left_alone = {name for family in FAMILIES for name in family.left_alone}
    done: list[str] = []
    for name, module in modules.items():
        if any(name.startswith(other) for other in done):
            continue
        family = family_of(module)
        if family is not None:
            yield name, module, family
        elif type(module).__name__ in left_alone or name.endswith(".drlora_adapters"):
            pass
        elif _looks_like_experts(name, module):
            raise ConfigError(_not_understood(name, module))
        else:
            continue
        done.append(f"{name}.")


def _refuse_shared_weights(name: str, module: nn.Module, owners: dict[nn.Parameter, str]) -> None:
    """Two modules on one weight would get two adapters, and a merge would add up both."""
    for parameter in module.parameters():
        other = owners.setdefault(parameter, name)
        if other != name:
            raise ConfigError(
                f"the experts module {name} ({type(module).__name__}) cannot be adapted: its "
                f"weights are also those of {other}, so an adapter of its own could not be merged."
            )


def _not_understood(name: str, module: nn.Module) -> str:
    kind = f"the experts module {name} ({type(module).__name__}) is not understood"
    if any(p.dtype not in _FLOATS or not is_plain(p) for p in module.parameters()):
        return f"{kind}: it is quantised. {_QUANTISED}"
    return (
        f"{kind}: it does not follow transformers' experts interface (it has no flags such as "
        f"is_transposed), and no family in drlora.moe.families recognises it. The model was left "
        f"as it is; docs/families.md shows how to add a family."
    )


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    class_name = type(module).__name__
    if "Shared" in class_name or class_name == "DrLoraExperts":
        return False
    own = dict(module.named_parameters(recurse=False))
    if any(key in own and own[key].dim() >= 3 for key in _EXPERT_PARAMETERS):
        return True
    named_so = name.rpartition(".")[2] == "experts" or "Experts" in class_name
    return named_so and any(True for _ in module.parameters())


def _describe(
    name: str, experts: nn.Module, family: Family, modules: dict[str, nn.Module]
) -> MoEBlock:
    kind = f"the experts module {name} ({type(experts).__name__})"
    if (reason := family.missing(experts)) is not None:
        raise ConfigError(f"{kind} cannot be adapted: {reason}.")
    base = family.weights(experts)
    _check_shapes(kind, base)
    # Already adapted experts sit one level deeper; their block is described as before.
    experts_name = name.removesuffix(".base_layer")
    parent_name = experts_name if family.wraps_block else experts_name.rpartition(".")[0]
    inside = name if family.wraps_block else parent_name
    return MoEBlock(
        name=parent_name,
        experts_name=experts_name,
        router_name=_find_router(inside, experts_name, modules, family.num_choices(experts)),
        num_experts=base.num_experts,
        hidden_size=base.in_features("gate_up"),
        expert_width=base.width,
        has_gate=base.out_features("gate_up") == 2 * base.width,
        is_interleaved=family.is_interleaved(experts),
        shared_names=tuple(_find_shared(parent_name, modules)),
    )


def _check_shapes(kind: str, base: ExpertWeights) -> None:
    for matrix in MATRICES:
        dtype = base.matrix(matrix).dtype
        if dtype not in _FLOATS:
            raise ConfigError(f"{kind} keeps {matrix} in {dtype}: it is quantised. {_QUANTISED}")
    shapes = {m: [part.shape[1:] for part in base.matrix(m).parts] for m in MATRICES}
    counts = {part.shape[0] for m in MATRICES for part in base.matrix(m).parts}
    width, hidden = base.width, base.in_features("gate_up")
    whole = base.out_features("gate_up") in (width, 2 * width)
    if len(counts) != 1 or not whole or base.out_features("down") != hidden:
        raise ConfigError(
            f"{kind} is not understood: its matrices have the (out, in) shapes {shapes} for "
            f"{sorted(counts)} experts, expected are (2I, H) or (I, H) and (H, I), for as many."
        )


def _find_router(
    parent_name: str, experts_name: str, modules: dict[str, nn.Module], num_choices: int
) -> str | None:
    """The block's other child with a weight of one row for each expert it can choose."""
    for child_name, child in modules[parent_name].named_children():
        full_name = f"{parent_name}.{child_name}" if parent_name else child_name
        if full_name != experts_name and _scores_experts(child, num_choices):
            return full_name
    return None


def _scores_experts(module: nn.Module, num_choices: int) -> bool:
    def has_rows(weight: Any) -> bool:
        # bitsandbytes keeps a column of bytes, and says what it stands for.
        shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
        return len(shape) == 2 and shape[0] == num_choices

    # Parts of packed matrices have a row for each expert too.
    own = (m for m in module.modules() if not has_own_storage(m))
    return any(has_rows(weight) for m in own for weight in m.parameters(recurse=False))


def _find_shared(parent_name: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Children of the block, or of the layer around it, that are called shared and are no gate."""
    for around in (parent_name, parent_name.rpartition(".")[0]):
        for child_name, child in modules[around].named_children():
            has_matrices = sum(p.dim() == 2 and min(p.shape) > 1 for p in child.parameters()) > 1
            if "shared" in child_name and has_matrices:
                yield f"{around}.{child_name}" if around else child_name
