"""Put adapters into a model: which blocks, the refusals, and the wrapping itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drlora.blocks import MoEBlock, find_blocks
from drlora.config import DrLoraConfig
from drlora.errors import ConfigError
from drlora.layer import DrLoraExperts
from drlora.observe import watch_tokens


def choose_blocks(model: nn.Module, config: DrLoraConfig) -> list[MoEBlock]:
    """The blocks that `config` adapts: those named in `config.experts`, or all.

    Raises:
        ConfigError: if a name in `config.experts` is no experts module of the model, or the
            router is to be trained but was not recognised.
    """
    blocks = find_blocks(model)
    found = {block.experts_name for block in blocks}
    if config.experts is not None:
        missing = sorted(set(config.experts) - found)
        if missing or not config.experts:
            raise ConfigError(
                f"experts={missing or config.experts} match nothing in {type(model).__name__}; "
                f"its experts modules are {sorted(found)}. Was the adapter made for another model?"
            )
        blocks = [block for block in blocks if block.experts_name in config.experts]
    needs_router = config.router == "train" or config.routing_signal == "probability"
    for block in blocks:
        if needs_router and block.router_name is None:
            raise ConfigError(
                f"the router of {block.name} was not recognised, so router={config.router!r} with "
                f"routing_signal={config.routing_signal!r} cannot work; use router='frozen' and "
                f"routing_signal='topk_weight'."
            )
    return blocks


def wrap_experts(
    model: nn.Module, parent: nn.Module, child_name: str, block: MoEBlock
) -> DrLoraExperts:
    """Put a `DrLoraExperts` around `parent.child_name`, or return the one that is there."""
    target = getattr(parent, child_name)
    if isinstance(target, DrLoraExperts):
        return target
    wrapped = DrLoraExperts(target, block, watch_tokens(model))
    wrapped.train(target.training)
    setattr(parent, child_name, wrapped)
    return wrapped


def note_router_logits(router: nn.Module, layer: DrLoraExperts) -> None:
    """Have the router's logits at hand when the experts of the same block are called next."""

    def note(module: nn.Module, args: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        layer.router_logits = logits.detach() if isinstance(logits, Tensor) else None

    router.register_forward_hook(note)


def train_in_float32(router: nn.Module) -> None:
    """Keep a trained router in float32, and hand it float32 input.

    In bfloat16, steps at usual learning rates are smaller than the spacing of the weights, so most
    entries would never move.
    """
    router.to(torch.float32)
    router.register_forward_pre_hook(_input_to_float32)


def release_router(router: nn.Module, dtype: torch.dtype) -> None:
    """Undo `train_in_float32`, for a router that becomes part of the merged model."""
    for key, hook in list(router._forward_pre_hooks.items()):
        if hook is _input_to_float32:
            del router._forward_pre_hooks[key]
    router.to(dtype)


def _input_to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, DrLoraExperts]:
    """Block name -> adapted experts, for the blocks that carry `adapter`, in model order."""
    return {
        module.block.name: module
        for module in model.modules()
        if isinstance(module, DrLoraExperts) and adapter in module.drlora_adapters
    }
