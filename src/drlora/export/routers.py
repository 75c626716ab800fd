"""Trained routers as LoRA: what engines take that refuse modules trained in full.

A router's update is a matrix W - W0 of shape (E, H), so it is a LoRA of rank E at most:

    lora_A = W - W0 (E, H)      lora_B = identity (E, E)

It is exact where the export has rank E; else the rank that there is holds the part of it with the
largest singular values, and what that leaves out is told.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from drlora.adapter.inject import adapted_layers
from drlora.errors import ConfigError
from drlora.export.factors import Factors
from drlora.export.updates import Updates


def routers_as_lora(updates: Updates, model: PeftModel, adapter: str, exact: bool) -> Updates:
    """The same updates with every trained router as LoRA of rank E or less.

    Args:
        updates: of the adapter, with its routers among the modules that were trained in full.
        model: carries the adapter. Where its base weights are on the meta device, the factors have
            the right shapes and no contents, which `Updates.is_sketch` says.
        adapter: its name.
        exact: whether the rank of the export is raised to E where it is less.

    Raises:
        ConfigError: if more of a router was trained than its weight.
    """
    linears, lost, is_sketch = dict(updates.linears), dict[str, float](), False
    for name, router in _routers(updates, model, adapter).items():
        before_EH = _only_weight(router)
        if before_EH is None:
            raise ConfigError(
                f"the router {name} has {sorted(dict(router.named_parameters()))}, and LoRA has a "
                f"place for one weight (E, H) alone; use routers=full where the reader takes it, "
                f"or the format merged."
            )
        after_EH = updates.modules[name]["weight"]
        rank = len(after_EH) if exact else min(updates.rank, len(after_EH))
        if before_EH.device.type == "meta":
            is_sketch = True
            a_rH, b_Er = torch.zeros(rank, after_EH.shape[1]), torch.zeros(len(after_EH), rank)
            lost[name] = 0.0
        else:
            update_EH = after_EH.double() - before_EH.detach().cpu().double()
            a_rH, b_Er, lost[name] = _largest_part(update_EH, rank)
        linears[name] = Factors((a_rH,), (b_Er,))
    modules = {name: state for name, state in updates.modules.items() if name not in lost}
    return replace(updates, linears=linears, modules=modules, routers=lost, is_sketch=is_sketch)


def can_be_lora(updates: Updates, model: PeftModel, adapter: str) -> bool:
    """Whether of every trained router its weight alone was trained."""
    routers = _routers(updates, model, adapter).values()
    return all(_only_weight(router) is not None for router in routers)


def note_on(updates: Updates) -> list[str]:
    """What the user should know of routers that leave as LoRA."""
    if not updates.routers:
        return []
    widest = max(len(updates.linears[name].b[0]) for name in updates.routers)
    found = [f"{len(updates.routers)} trained routers leave as LoRA (A = W - W0, B = 1)"]
    if max(updates.routers.values()) > 0 or (updates.is_sketch and updates.rank < widest):
        share = "" if updates.is_sketch else f" ({max(updates.routers.values()):.2%} of the worst)"
        found.append(
            f"a router of {widest} experts needs rank {widest}; rank {updates.rank} leaves a part "
            f"of its update out{share}. --routers exact raises the rank of all to {widest}, and "
            f"merged needs no rank"
        )
    return found


def _routers(updates: Updates, model: PeftModel, adapter: str) -> dict[str, nn.Module]:
    """Name -> the router before training, of those among the modules that were trained in full."""
    inner = model.get_base_model()
    names = [layer.block.router_name for layer in adapted_layers(inner, adapter).values()]
    trained = [name for name in names if name is not None and name in updates.modules]
    wrappers: dict[str, Any] = {name: inner.get_submodule(name) for name in trained}
    return {name: wrapper.original_module for name, wrapper in wrappers.items()}


def _only_weight(router: nn.Module) -> Tensor | None:
    """Its weight (E, H), if that is all of it that can be trained."""
    own = dict(router.named_parameters())
    return own["weight"] if set(own) == {"weight"} and own["weight"].dim() == 2 else None


def _largest_part(update_EH: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (r, H) and B (E, r) in float32, and the share of the update's norm that is left out."""
    if rank >= len(update_EH):
        return update_EH.float(), torch.eye(len(update_EH)), 0.0
    u_EK, s_K, v_KH = torch.linalg.svd(update_EH, full_matrices=False)
    whole = s_K.norm().item()
    lost = s_K[rank:].norm().item() / whole if whole else 0.0
    if lost < torch.finfo(torch.float32).eps:
        lost = 0.0
    return (s_K[:rank, None] * v_KH[:rank]).float(), u_EK[:, :rank].float(), lost
