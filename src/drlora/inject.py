"""Put adapters into a model: which blocks, the refusals, and the wrapping itself."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from drlora.blocks import MoEBlock, find_blocks
from drlora.config import DrLoraConfig
from drlora.errors import ConfigError
from drlora.layer import DrLoraExperts
from drlora.observe import watch_tokens


def choose_blocks(model: nn.Module, config: DrLoraConfig) -> list[MoEBlock]:
    """The blocks that `config` adapts: those named in `config.experts`, or all.

    Raises:
        ConfigError: if a name in `config.experts` is no experts module of the model, or the
            router is to be trained but was not recognised, or there is no gate to adapt.
    """
    blocks = find_blocks(model)
    found = {block.experts_name for block in blocks}
    if config.experts is not None:
        missing = sorted(set(config.experts) - found)
        if missing or not config.experts:
            raise ConfigError(
                f"experts={missing or config.experts} match nothing in {type(model).__name__}; "
                f"its experts modules are {sorted(found)}. Was the adapter made for another model? "
                f"Or for code that keeps its experts otherwise (fused, or in a ModuleList)?"
            )
        blocks = [block for block in blocks if block.experts_name in config.experts]
    blocks = [_as_adapted(block) for block in blocks]
    needs_router = config.router == "train" or config.routing_signal == "probability"
    for block in blocks:
        if "gate" in config.projections and not block.has_gate:
            raise ConfigError(
                f"projections={config.projections} cannot work: the experts of {block.name} have "
                f"no gate; use projections=['up', 'down']."
            )
        if config.router == "train" and f"{block.experts_name}.base_layer." in (
            block.router_name or ""
        ):
            raise ConfigError(
                f"router='train' cannot work for {block.name}: its router is inside the module "
                f"that the adapter takes the place of, where PEFT keeps no trained copies; use "
                f"router='frozen'."
            )
        if needs_router and block.router_name is None:
            raise ConfigError(
                f"the router of {block.name} was not recognised, so router={config.router!r} with "
                f"routing_signal={config.routing_signal!r} cannot work; use router='frozen' and "
                f"routing_signal='topk_weight'."
            )
    return blocks


def _as_adapted(block: MoEBlock) -> MoEBlock:
    """The block with its names as they are when the adapter is in.

    A router that is inside what the adapter takes the place of moves down with it.
    """
    inside = f"{block.experts_name}."
    router = block.router_name
    if router is None or not router.startswith(inside) or ".base_layer." in router:
        return block
    return replace(block, router_name=f"{inside}base_layer.{router.removeprefix(inside)}")


def wrap_experts(
    model: nn.Module, parent: nn.Module, child_name: str, block: MoEBlock
) -> DrLoraExperts:
    """Put a `DrLoraExperts` around `parent.child_name`, or return the one that is there."""
    target = getattr(parent, child_name)
    if isinstance(target, DrLoraExperts):
        return target
    wrapped = DrLoraExperts(target, block, watch_tokens(model))
    wrapped.family.prepare(parent)
    wrapped.train(target.training)
    setattr(parent, child_name, wrapped)
    return wrapped


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, DrLoraExperts]:
    """Block name -> adapted experts, for the blocks that carry `adapter`, in model order."""
    return {
        module.block.name: module
        for module in model.modules()
        if isinstance(module, DrLoraExperts) and adapter in module.drlora_adapters
    }


def active_adapter(model: nn.Module) -> str:
    """The name of the model's active adapter; of the first one, if several are.

    Raises:
        ConfigError: if it has none.
    """
    active = getattr(model, "active_adapter", None)
    if active is None and getattr(model, "peft_config", None):
        active = getattr(model, "active_adapters", None)  # transformers' own add_adapter
    if callable(active):
        active = active()
    if isinstance(active, (list, tuple)):
        active = active[0] if active else None
    if not isinstance(active, str):
        raise ConfigError(
            f"{type(model).__name__} has no active adapter; wrap the model first: "
            f"get_peft_model(model, drlora.DrLoraConfig(...))."
        )
    return active
