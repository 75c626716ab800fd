"""DR-LoRA as a PEFT method: `get_peft_model(model, DrLoraConfig(...))` gives a PeftModel.

PEFT's own machinery does the saving, loading, switching and merging; this module says which
modules to wrap and how keys in the adapter file are named:

    ...mlp.experts.drlora_adapters.frequency
    ...mlp.experts.drlora_adapters.pools.{projection}.{lora_A,lora_B,owner,importance,birth,seed}
    ...self_attn.q_proj.{lora_A,lora_B}.weight          ordinary LoRA on `target_modules`
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import Tensor, nn

from drlora.adapter_files import (
    CONTAINER,
    put_embeddings_in_place,
    refuse_damaged_ranks,
    refuse_other_tensors,
)
from drlora.blocks import MoEBlock, active_experts
from drlora.config import DrLoraConfig
from drlora.errors import ConfigError
from drlora.inject import (
    adapted_layers,
    choose_blocks,
    forget_router_logits,
    note_router_logits,
    release_router,
    train_in_float32,
    wrap_experts,
)
from drlora.layer import DrLoraExperts
from drlora.observe import forget_tokens
from drlora.ordinary import choose_targets, lora_config
from drlora.peft_type import DRLORA

# In the keys of pools, "drlora_adapters", as in those of ordinary LoRA, "lora_A". transformers'
# load_adapter puts the adapter's name behind the first part of a key that begins with it.
_PREFIX = "lora_"


class DrLoraModel(LoraModel):
    """The tuner behind PeftModel: pools on the experts, ordinary LoRA on `target_modules`."""

    prefix = _PREFIX
    tuner_layer_cls: Any = BaseTunerLayer  # both kinds of layers
    target_module_mapping: dict[str, Sequence[str]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        _refuse_other_architecture(peft_config, model_config.get("model_type"))
        self._blocks = {b.experts_name: b for b in choose_blocks(self.model, peft_config)}
        _refuse_other_layout(peft_config, list(self._blocks.values()))
        for name in self._blocks:
            _refuse_mixed_dtypes(name, self.model.get_submodule(name))
        peft_config.experts = list(self._blocks)
        _split_by_active(self.model, peft_config, list(self._blocks.values()))
        if peft_config.router == "train":
            # By full name: PEFT matches endings, and "gate" is also one of "shared_expert_gate".
            routers = [block.router_name for block in self._blocks.values()]
            others = [m for m in peft_config.modules_to_save or [] if m not in routers]
            peft_config.modules_to_save = others + routers
        # The injection works on a copy with full names; what is saved is what the user said.
        resolved = copy.copy(peft_config)
        resolved.target_modules = choose_targets(
            self.model, peft_config, list(self._blocks.values())
        )
        return resolved

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Nothing to do: LoRA's layer replication is no setting of ours."""

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        assert isinstance(peft_config, DrLoraConfig)
        if key in (peft_config.experts or []):
            return True
        return bool(peft_config.target_modules and check_target_module_exists(peft_config, key))

    def _create_and_replace(  # type: ignore[override]  # as LoraModel's is
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        block = self._blocks.get(current_key)
        if block is None:
            lora = lora_config(peft_config, target)
            super()._create_and_replace(
                lora, adapter_name, target, target_name, parent, current_key
            )
            return
        layer = wrap_experts(self.model, parent, target_name, block)
        config = self.peft_config[adapter_name]
        assert isinstance(config, DrLoraConfig)
        layer.add_adapter(adapter_name, config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """PEFT's injection; then trained routers go to float32, as PEFT does with adapters."""
        # The copy that PEFT makes of a trained router must not copy its hook, and what that holds.
        forget_router_logits(model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, *args, **kwargs)
        self._note_routers()
        if autocast_adapter_dtype:
            for copies in self._router_copies(adapter_name):
                train_in_float32(copies.modules_to_save[adapter_name])

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            self._release_routers(adapter_name)

    def _release_routers(self, adapter_name: str) -> list[ModulesToSaveWrapper]:
        """Trained routers go back to the dtype that the model has them in."""
        found = self._router_copies(adapter_name)
        for copies in found:
            dtype = next(copies.original_module.parameters()).dtype
            release_router(copies.modules_to_save[adapter_name], dtype)
        return found

    def _note_routers(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, DrLoraExperts) and any(
                layer.adapter(name).config.routing_signal == "probability"
                for name in layer.drlora_adapters
            ):
                assert layer.block.router_name is not None
                note_router_logits(self.model.get_submodule(layer.block.router_name), layer)

    def _router_copies(self, adapter_name: str) -> list[ModulesToSaveWrapper]:
        """Where the adapter's trained routers are kept."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, DrLoraConfig)
        if config.router != "train":
            return []
        layers = adapted_layers(self.model, adapter_name).values()
        names = {layer.block.router_name for layer in layers}
        return [
            module
            for name, module in self.model.named_modules()
            if name in names and isinstance(module, ModulesToSaveWrapper)
        ]

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As in PEFT; where `safe_merge` refuses one layer, no layer stays merged."""
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        was_merged = any(layer.merged for layer in layers)
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except ValueError:
            if not was_merged:
                for layer in layers:
                    if layer.merged:
                        layer.unmerge()
            raise

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        for adapter_name in self.peft_config:
            for copies in self._release_routers(adapter_name):
                if not merge:  # PEFT would leave the trained router in
                    copies.set_adapter([])
        base: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        _take_hooks_off(base)
        return base

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name}={kwargs[name]!r}: DR-LoRA takes one set of adapters for a whole "
                    f"batch; call the model once for each adapter, after set_adapter(name)."
                )
        yield

    def add_weighted_adapter(self, adapters: Sequence[str], *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: each adapter gives an expert another rank, so factors cannot be averaged."""
        names = list(adapters)
        raise ConfigError(
            f"add_weighted_adapter({names}) is not supported: experts differ in rank between "
            f"adapters. model.base_model.set_adapter({names}) adds them up without weights, "
            f"and merge_and_unload(adapter_names={names}) merges the sum."
        )

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            "path_initial_model_for_weight_conversion is for LoRA that starts by changing the base "
            "model (PiSSA, OLoRA, CorDA); a DR-LoRA adapter never does. Leave it out."
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        named = f"{CONTAINER}{adapter_name}."
        if named in key:
            return key.replace(named, CONTAINER, 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        fitting = (model, adapter_name, remapped, cls._remove_adapter_name_from_key)
        refuse_other_tensors(*fitting)
        assert isinstance(config, DrLoraConfig)
        refuse_damaged_ranks(config, remapped)
        return put_embeddings_in_place(*fitting)


def _refuse_other_architecture(config: DrLoraConfig, model_type: str | None) -> None:
    if config.base_model_type not in (None, model_type):
        raise ConfigError(
            f"the adapter is one for {config.base_model_type!r}, the model is a {model_type!r}; "
            f"load the model that it was trained on (base_model_name_or_path="
            f"{config.base_model_name_or_path!r}), or make a new DrLoraConfig."
        )
    config.base_model_type = model_type


def _refuse_other_layout(config: DrLoraConfig, blocks: list[MoEBlock]) -> None:
    """Factors of the fused matrix have the shapes that the model wants, in either order."""
    order = "interleaved" if any(block.is_interleaved for block in blocks) else "halves"
    if "gate_up" in config.projections and config.gate_up_order not in (None, order):
        raise ConfigError(
            f"the adapter was trained with gate and up as {config.gate_up_order} of one matrix "
            f"(gate_up_order), in this model they are {order}: load it with the version of "
            f"transformers that it was trained with, and export it there as merged."
        )
    config.gate_up_order = order


def _split_by_active(model: nn.Module, config: DrLoraConfig, blocks: list[MoEBlock]) -> None:
    """Do what `split_by_active` asks for, once: the saved configuration has the final ranks."""
    if not config.split_by_active:
        return
    active = {active_experts(model, block) for block in blocks}
    if len(active) > 1 or None in active:
        raise ConfigError(
            f"split_by_active cannot work: tokens use {active} experts of this model's blocks; "
            f"leave it out and set r_target to the rank that each expert should have."
        )
    (count,) = active
    assert count is not None and config.lora_alpha is not None
    before = config.r_target
    for name in ("r_init", "r_target", "r_max"):
        setattr(config, name, max(1, getattr(config, name) // count))
    config.lora_alpha *= config.r_target / before  # the scaling stays as it is
    config.split_by_active = False


def _refuse_mixed_dtypes(name: str, experts: nn.Module) -> None:
    base = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
    kept = {key: p.dtype for key, p in base.named_parameters() if p.is_floating_point()}
    if len(set(kept.values())) > 1:
        raise ConfigError(
            f"the experts module {name} mixes dtypes: {kept}; bring it to one dtype first, for "
            f"example with model.to(torch.bfloat16)."
        )


def _take_hooks_off(model: nn.Module) -> None:
    """Remove the hooks with which adapters watched the model, and what they wrote on it."""
    forget_tokens(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "func", hook).__module__.startswith("drlora."):
                    del hooks[key]


def register() -> None:
    """Make PEFT know the method; called when drlora is imported."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if DRLORA not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name="drlora", config_cls=DrLoraConfig, model_cls=DrLoraModel, prefix=_PREFIX
        )
