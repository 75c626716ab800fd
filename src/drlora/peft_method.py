"""DR-LoRA as a PEFT method: `get_peft_model(model, DrLoraConfig(...))` gives a PeftModel.

PEFT's own machinery does the saving, loading, switching and merging; this module says which
modules to wrap and how keys in the adapter file are named:

    ...mlp.experts.drlora_adapters.frequency
    ...mlp.experts.drlora_adapters.pools.{projection}.{lora_A,lora_B,owner,importance,birth,seed}
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import Tensor, nn

from drlora.config import DrLoraConfig
from drlora.errors import CheckpointError
from drlora.inject import (
    choose_blocks,
    note_router_logits,
    release_router,
    train_in_float32,
    wrap_experts,
)
from drlora.layer import DrLoraExperts
from drlora.peft_type import DRLORA

_CONTAINER = ".drlora_adapters."


class DrLoraModel(BaseTuner):
    """The tuner behind PeftModel: wraps the experts modules that `choose_blocks` names."""

    prefix = "drlora_"
    tuner_layer_cls = DrLoraExperts
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._blocks = {b.experts_name: b for b in choose_blocks(self.model, peft_config)}
        peft_config.experts = list(self._blocks)
        if peft_config.router == "train":
            # By full name: PEFT matches endings, and "gate" is also one of "shared_expert_gate".
            routers = [block.router_name for block in self._blocks.values()]
            others = [m for m in peft_config.modules_to_save or [] if m not in routers]
            peft_config.modules_to_save = others + routers
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        assert isinstance(peft_config, DrLoraConfig)
        return key in (peft_config.experts or [])

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        block = self._blocks[current_key]
        layer = wrap_experts(self.model, parent, target_name, block)
        layer.add_adapter(adapter_name, peft_config)
        if peft_config.routing_signal == "probability":
            assert block.router_name is not None
            note_router_logits(self.model.get_submodule(block.router_name), layer)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """PEFT's injection; then trained routers go to float32, as PEFT does with adapters."""
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, *args, **kwargs)
        if autocast_adapter_dtype:
            for copies in self._router_copies(adapter_name):
                train_in_float32(copies.modules_to_save[adapter_name])

    def _router_copies(self, adapter_name: str) -> list[ModulesToSaveWrapper]:
        """Where the adapter's trained routers are kept."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, DrLoraConfig)
        if config.router != "train":
            return []
        names = {block.router_name for block in self._blocks.values()}
        return [
            module
            for name, module in self.model.named_modules()
            if name in names and isinstance(module, ModulesToSaveWrapper)
        ]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        for adapter_name in self.peft_config:
            for copies in self._router_copies(adapter_name):
                dtype = next(copies.original_module.parameters()).dtype
                release_router(copies.modules_to_save[adapter_name], dtype)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, DrLoraExperts):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        named = f"{_CONTAINER}{adapter_name}."
        if named in key:
            return key.replace(named, _CONTAINER, 1)
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
        _refuse_other_adapters(model, adapter_name, remapped)
        return remapped


def _refuse_other_adapters(model: nn.Module, adapter_name: str, loaded: dict[str, Tensor]) -> None:
    """An adapter file must hold exactly the tensors that its configuration asks for."""
    here = {
        key: value
        for key, value in model.state_dict().items()
        if f"{_CONTAINER}{adapter_name}." in key
    }
    there = {key: value for key, value in loaded.items() if _CONTAINER in key}
    for key in [*here, *there]:
        if key in here and key in there and here[key].shape == there[key].shape:
            continue
        saved = tuple(there[key].shape) if key in there else "missing"
        wanted = tuple(here[key].shape) if key in here else "none"
        raise CheckpointError(
            f"the adapter does not fit this model: {key} is {saved} in the file, the model has "
            f"{wanted}. It was made for another model or with other settings, or is incomplete."
        )


def register() -> None:
    """Make PEFT know the method; called when drlora is imported."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if DRLORA not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name="drlora", config_cls=DrLoraConfig, model_cls=DrLoraModel, prefix="drlora_"
        )
