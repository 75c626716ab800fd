"""Put adapters into a model: which blocks, the refusals, and the wrapping itself."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from drlora.adapter.expert_parallel import (
    exchange_for,
    refuse_unfit_experts,
)
from drlora.adapter.layer import DrLoraExperts
from drlora.adapter.observe import watch_tokens
from drlora.adapter.sharded import was_sharded_at_load
from drlora.adapter.shared_rows import raise_ranks
from drlora.config.adapter import DrLoraConfig
from drlora.distributed.zero import whole_shapes
from drlora.errors import ConfigError
from drlora.moe.blocks import MoEBlock, active_experts, find_blocks
from drlora.moe.families import Family, family_of
from drlora.moe.fingerprint import fingerprint
from drlora.moe.refusals import is_skeleton, refuse_unfit_model, refuse_unfit_weights
from drlora.moe.rest import keep_trainable
from drlora.moe.stored.told import (
    refuse_lost_experts,
    refuse_packed_routers,
    tell_of_wide_experts,
)
from drlora.ops import choose_engine
from drlora.ops.storage import has_own_storage


def prepare(model: nn.Module, config: DrLoraConfig, model_type: str | None) -> list[MoEBlock]:
    """The blocks that `config` adapts in `model`; `config` is filled in from them.

    Raises:
        ConfigError: as `choose_blocks`, or if the adapter was made for another architecture or
            layout, or its engine is not installed; `model` is as it was then.
    """
    _refuse_other_architecture(config, model_type)
    with whole_shapes(model):
        return _prepare(model, config)


def _prepare(model: nn.Module, config: DrLoraConfig) -> list[MoEBlock]:
    blocks = choose_blocks(model, config)
    _refuse_experts_in_full(model, config, blocks)
    _refuse_other_layout(config, blocks)
    _tell_of_other_numbers(config, model, blocks)
    for block in blocks:
        family, base = _experts_of(model, block)
        refuse_unfit_experts(block.experts_name, base, family, model)
        _refuse_mixed_dtypes(block.experts_name, base)
        _try_engine(config, base)
        _tell_of_other_storage(config, block.experts_name, base)
    if not config.inference_mode:
        tell_of_wide_experts(model, blocks)
    keep_trainable(model)
    config.experts = [block.experts_name for block in blocks]
    _split_by_active(model, config, blocks)
    _take_share(config)
    raise_ranks(config, blocks)
    if config.router == "train":
        # By full name: PEFT matches endings, and "gate" is also one of "shared_expert_gate".
        routers = [block.router_name for block in blocks if block.router_name]
        others = [name for name in config.modules_to_save or [] if name not in routers]
        config.modules_to_save = others + routers
    return blocks


def choose_blocks(model: nn.Module, config: DrLoraConfig) -> list[MoEBlock]:
    """The blocks that `config` adapts: those named in `config.experts`, or all.

    Raises:
        ConfigError: if a name in `config.experts` is no experts module of the model, or the
            router is to be trained but was not recognised, or there is no gate to adapt, or
            weights are not where an adapter can read them (`drlora.moe.refusals`).
    """
    refuse_unfit_model(model)
    refuse_lost_experts(model)
    blocks = find_blocks(model)
    refuse_packed_routers(model, blocks)
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
    signal = config.option("routing_signal")
    needs_router = config.router == "train" or signal == "probability"
    of_skeleton = is_skeleton(model)
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
                f"routing_signal={signal!r} cannot work; use router='frozen' and the option "
                f"routing_signal='topk_weight'."
            )
        if config.router == "train":
            assert block.router_name is not None
            _refuse_unfit_router(model, block.router_name, of_skeleton)
    return blocks


def _refuse_unfit_router(model: nn.Module, name: str, of_skeleton: bool) -> None:
    router = model.get_submodule(name)
    if isinstance(router, ModulesToSaveWrapper):
        router = router.original_module
    is_sharded = any(isinstance(weight, DTensor) for weight in router.parameters())
    if is_sharded and not was_sharded_at_load(model):
        raise ConfigError(
            f"router='train' cannot work for {name}: its weights are sharded already, and a copy "
            f"of shards cannot be trained. Use router='frozen', or load the model whole and have "
            f"accelerate shard it with the adapter in."
        )
    refuse_unfit_weights(model, name, router, of_skeleton)


def _refuse_experts_in_full(model: nn.Module, config: DrLoraConfig, blocks: list[MoEBlock]) -> None:
    """PEFT would train a copy of the experts, past the adapter, and nobody could load that."""
    adapted = {block.experts_name for block in blocks}
    adapted |= {name for name, m in model.named_modules() if isinstance(m, DrLoraExperts)}
    for wanted in config.modules_to_save or []:
        for name, _ in model.named_modules() if wanted else ():
            if not name.endswith(wanted):  # as PEFT matches
                continue
            for experts in adapted:
                if f"{experts}.".startswith(f"{name}.") or f"{name}.".startswith(f"{experts}."):
                    raise ConfigError(
                        f"modules_to_save={wanted!r} matches {name}, but {experts} is adapted: a "
                        f"copy of it would be trained in full, and the adapter not at all. Name "
                        f"modules without adapted experts, or leave these out of `experts`."
                    )


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
    wrapped = DrLoraExperts(target, block)
    wrapped.family.prepare(parent)
    wrapped.train(target.training)
    wrapped.exchange = exchange_for(target, model)
    setattr(parent, child_name, wrapped)
    wrapped.tokens = watch_tokens(model, block.experts_name)
    return wrapped


def refuse_fixed_weights(model: nn.Module) -> None:
    """Refuse to merge where one block's weights cannot be changed, before another's are.

    Raises:
        ConfigError: naming the first such block.
    """
    for module in model.modules():
        if isinstance(module, DrLoraExperts):
            module.refuse_fixed_weights()


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


def _refuse_other_architecture(config: DrLoraConfig, model_type: str | None) -> None:
    made_for = config.recorded("base_model_type")
    if made_for not in (None, model_type):
        raise ConfigError(
            f"the adapter is one for {made_for!r}, the model is a {model_type!r}; "
            f"load the model that it was trained on (base_model_name_or_path="
            f"{config.base_model_name_or_path!r}), or make a new DrLoraConfig."
        )
    config.note(base_model_type=model_type)


def _refuse_other_layout(config: DrLoraConfig, blocks: list[MoEBlock]) -> None:
    """Factors of the fused matrix have the shapes that the model wants, in either order."""
    order = "interleaved" if any(block.is_interleaved for block in blocks) else "halves"
    trained = config.recorded("gate_up_order")
    if "gate_up" in config.projections and trained not in (None, order):
        raise ConfigError(
            f"the adapter was trained with gate and up as {trained} of one matrix "
            f"(gate_up_order), in this model they are {order}: load it with the version of "
            f"transformers that it was trained with, and export it there as merged."
        )
    config.note(gate_up_order=order)


def _tell_of_other_storage(config: DrLoraConfig, name: str, base: nn.Module) -> None:
    """An adapter works on other numbers than it was trained on, and not quite as it did there."""
    family = family_of(base)
    assert family is not None, "find_blocks names recognised modules only"
    storage, trained = family.weights(base).down.name, config.recorded("storage")
    if trained not in (None, storage):
        warnings.warn(
            f"the adapter was trained on experts stored as {trained}, those of {name} are stored "
            f"as {storage}: it is used as it is, and what it computes differs by their rounding.",
            stacklevel=2,
        )
    config.note(storage=storage)


def _tell_of_other_numbers(config: DrLoraConfig, model: nn.Module, blocks: list[MoEBlock]) -> None:
    """The same storage may hold another base, or one that other code has packed."""
    found, trained = fingerprint(model, blocks), config.recorded("fingerprint")
    if found is None:
        return
    family, base = _experts_of(model, blocks[0])
    if (
        trained not in (None, found)
        and config.recorded("storage") == family.weights(base).down.name
    ):
        warnings.warn(
            f"the adapter was trained on a base whose packed experts have other bytes (fingerprint "
            f"{trained[:12]}, here {found[:12]}): another model or revision, or packed in another "
            f"way. It is used as it is; load {config.base_model_name_or_path!r}, packed as it was, "
            f"to have the same numbers.",
            stacklevel=2,
        )
    config.note(fingerprint=found)


def _experts_of(model: nn.Module, block: MoEBlock) -> tuple[Family, nn.Module]:
    """Its experts without the adapter, and what they are."""
    experts = model.get_submodule(block.experts_name)
    base = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
    family = family_of(base)
    assert family is not None, "find_blocks names recognised modules only"
    return family, base


def _split_by_active(model: nn.Module, config: DrLoraConfig, blocks: list[MoEBlock]) -> None:
    """Do what `split_by_active` asks for, once: the saved configuration has the final ranks."""
    if not config.option("split_by_active"):
        return
    active = {active_experts(model, block) for block in blocks}
    if len(active) > 1 or None in active:
        raise ConfigError(
            f"split_by_active cannot work: tokens use {active} experts of this model's blocks; "
            f"leave it out and set r_target to the rank that each expert should have."
        )
    (count,) = active
    assert count is not None and config.lora_alpha is not None
    scaling = config.scaling
    for name in ("r_init", "r_target", "r_max"):
        setattr(config, name, max(1, getattr(config, name) // count))
    config.lora_alpha *= scaling / config.scaling
    config.options = {**config.options, "split_by_active": False}


def _take_share(config: DrLoraConfig) -> None:
    """Do what `budget_share` asks for, once: the saved configuration has the final ranks."""
    share, scaling = config.option("budget_share"), config.scaling
    if share == 1:
        return
    for name in ("r_init", "r_target"):
        setattr(config, name, math.ceil(share * getattr(config, name) - 1e-9))
    assert config.lora_alpha is not None
    config.lora_alpha *= scaling / config.scaling
    config.options = {**config.options, "budget_share": 1.0}


def _try_engine(config: DrLoraConfig, base: nn.Module) -> None:
    """Say before training that an engine that was asked for cannot run on these experts."""
    family = family_of(base)
    assert family is not None, "find_blocks names recognised modules only"
    if config.engine != "auto" and not config.inference_mode:
        choose_engine(config.engine, family.weights(base))


def _refuse_mixed_dtypes(name: str, base: nn.Module) -> None:
    """Of what is stored as it is computed with; scales of packed numbers may be of any dtype."""
    family = family_of(base)
    weights = family.weights(base) if family is not None else None
    if weights and not weights.is_plain and weights.bias("down") is None:
        return
    packed = {id(p) for m in base.modules() if has_own_storage(m) for p in m.parameters()}
    kept = {
        key: p.dtype
        for key, p in base.named_parameters()
        if p.is_floating_point() and id(p) not in packed and not has_own_storage(p)
    }
    if len(set(kept.values())) > 1:
        raise ConfigError(
            f"the experts module {name} mixes dtypes: {kept}; bring it to one dtype first, for "
            f"example with model.to(torch.bfloat16)."
        )
