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
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import (
    AuxiliaryTrainingWrapper,
    register_peft_method,
)
from torch import Tensor, nn

from drlora.adapter.common_budget import share_budget
from drlora.adapter.files import (
    CONTAINER,
    put_embeddings_in_place,
    refuse_damaged_ranks,
    refuse_other_tensors,
)
from drlora.adapter.inject import (
    adapted_layers,
    prepare,
    refuse_fixed_weights,
    wrap_experts,
)
from drlora.adapter.layer import DrLoraExperts
from drlora.adapter.linear import choose_targets, lora_config, refuse_endless
from drlora.adapter.merged_copies import InUse, put_back, use_copies_of
from drlora.adapter.observe import forget_tokens
from drlora.adapter.router import TrainedRouters, forget_router_logits, note_router_logits
from drlora.adapter.sharded import (
    put_shards_back,
    share_out,
    was_sharded_at_load,
    whole_while_copied,
)
from drlora.config.adapter import DrLoraConfig
from drlora.config.peft_type import DRLORA
from drlora.distributed.held import whole_weights
from drlora.errors import ConfigError

# In the keys of pools, "drlora_adapters", as in those of ordinary LoRA, "lora_A". transformers'
# load_adapter puts the adapter's name behind the first part of a key that begins with it.
_PREFIX = "lora_"


class DrLoraModel(LoraModel):
    """The tuner behind PeftModel: pools on the experts, ordinary LoRA on `target_modules`."""

    prefix = _PREFIX
    tuner_layer_cls: Any = BaseTunerLayer  # both kinds of layers
    target_module_mapping: dict[str, Sequence[str]] = {}
    # Of a model that transformers sharded, PEFT would gather the whole base to save an adapter.
    # Where there is tensor parallelism, adapters are refused.
    _tp_size = None

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        # Of a copy: what is refused leaves the configuration as it was, to be used again.
        config = copy.copy(peft_config)
        blocks = prepare(self.model, config, model_config.get("model_type"))
        # The injection works on a copy with full names; what is saved is what the user said.
        targets = choose_targets(self.model, config, blocks)
        targets = share_budget(self.model, config, blocks, targets)
        resolved = copy.copy(config)
        resolved.target_modules = targets
        peft_config.__dict__.update(config.__dict__)
        self._blocks = {block.experts_name: block for block in blocks}
        return resolved

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """What is trained in full can be copied until the injection is over."""
        whole = whole_while_copied(self.model, peft_config.modules_to_save or [])
        self._while_injecting.enter_context(whole)

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
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection; then trained routers go to float32, as PEFT does with adapters."""
        if state_dict is not None:
            raise ConfigError(
                "state_dict cannot say what is adapted: a DR-LoRA adapter is made from its "
                "DrLoraConfig alone. Leave state_dict out, and load the tensors with "
                "peft.set_peft_model_state_dict when the adapter is in."
            )
        config = self.peft_config[adapter_name]
        assert isinstance(config, DrLoraConfig)
        refuse_endless(config.target_modules, [name for name, _ in model.named_modules()])
        put_shards_back(model)
        # The copy that PEFT makes of a trained router must not copy its hook, and what that holds.
        forget_router_logits(model)
        try:
            with ExitStack() as self._while_injecting:
                super().inject_adapter(
                    model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
                )
        finally:  # those of other adapters also where this one is refused
            self._note_routers()
        in_full = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        for layer in adapted_layers(self.model, adapter_name).values():
            layer.trained_in_full = in_full
        if autocast_adapter_dtype:
            TrainedRouters(self.model, adapter_name).train_in_float32()
        layers = adapted_layers(self.model, adapter_name).values()
        adapters = [layer.adapter(adapter_name) for layer in layers]
        for adapter in adapters:
            adapter.of_all_blocks = adapters
        pools = [pool for adapter in adapters for pool in adapter.rank_pools.values()]
        share_out(self.model, adapter_name, pools if config.option("share_rows") else ())

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            TrainedRouters(self.model, adapter_name).train_as_the_model()

    def _note_routers(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, DrLoraExperts) and any(
                layer.adapter(name).routing_signal == "probability"
                for name in layer.drlora_adapters
            ):
                assert layer.block.router_name is not None
                note_router_logits(self.model.get_submodule(layer.block.router_name), layer)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As in PEFT; where `safe_merge` refuses one layer, no layer stays merged.

        Modules that are trained in full are those of the merged adapters until these are unmerged.
        """
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        was_merged = any(layer.merged for layer in layers)
        refuse_fixed_weights(self.model)
        before = self._use_copies(adapter_names) if adapter_names != [] else []
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except ValueError:
            if not was_merged:
                for layer in layers:
                    if layer.merged:
                        layer.unmerge()
            put_back(before)
            raise
        for layer in layers:
            if isinstance(layer, DrLoraExperts) and not layer.copies_before_merge:
                layer.copies_before_merge = before

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT, which unmerges first."""
        for layer in self.model.modules():
            if isinstance(layer, DrLoraExperts):
                put_back(layer.copies_before_merge)
        super().set_adapter(adapter_name, inference_mode)

    def _use_copies(self, adapter_names: Any) -> InUse:
        """Take what is trained in full from the adapters that are merged, and these as well."""
        if adapter_names is not None and not isinstance(adapter_names, list | tuple):
            return []  # PEFT says what is wrong with it
        if unknown := [name for name in adapter_names or () if name not in self.peft_config]:
            raise ConfigError(
                f"adapter_names={adapter_names}: the model has no adapter {unknown[0]!r} to merge; "
                f"its adapters are {list(self.peft_config)}."
            )
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        merged = [name for layer in layers for name in layer.merged_adapters]
        if adapter_names is None and not merged:
            return []
        chosen = self.active_adapters if adapter_names is None else adapter_names
        return use_copies_of(self.model, dict.fromkeys([*merged, *chosen]))

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: Any = None, **kwargs: Any
    ) -> Any:
        is_merged = any(m.merged for m in self.model.modules() if isinstance(m, BaseTunerLayer))
        before: InUse = []
        if merge:
            refuse_fixed_weights(self.model)
            before = self._use_copies(adapter_names)
        for adapter_name in self.peft_config:
            routers = TrainedRouters(self.model, adapter_name)
            routers.train_as_the_model()
            for copies in routers.copies if not merge and not is_merged else ():
                copies.set_adapter([])  # PEFT would leave the trained router in
        kwargs["adapter_names"] = adapter_names
        try:
            base: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        except ValueError:
            put_back(before)
            raise
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
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT; of a model that was sharded when it was loaded, in full: a collective."""
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, *args, **kwargs)
        if not was_sharded_at_load(model):
            return found
        # Where PEFT looks next for what is trained in full.
        everything: dict[str, Tensor] = kwargs["state_dict"]
        copies = f".modules_to_save.{kwargs['adapter_name']}."
        for key in [key for key in everything if copies in key]:
            everything[key] = whole_weights(everything[key]).cpu()
        return {key: whole_weights(value).cpu() for key, value in found.items()}

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


def _take_hooks_off(model: nn.Module) -> None:
    """Remove the hooks with which adapters watched the model, and what they wrote on it."""
    forget_tokens(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "func", hook).__module__.startswith("drlora."):
                    del hooks[key]


def register() -> None:
    """Make PEFT know the method; see `drlora.registration`."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if DRLORA not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name="drlora", config_cls=DrLoraConfig, model_cls=DrLoraModel, prefix=_PREFIX
        )
