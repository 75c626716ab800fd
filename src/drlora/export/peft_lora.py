"""The format `peft`: plain LoRA on `target_parameters`, for PEFT without drlora.

All ranks are padded with zeros to one, and scalings are part of B, so that alpha / r = 1. In PEFT,
row e * r + k of A and column k * E + e of B belong to expert e: in B the expert runs fastest.
Names and files are left to PEFT, which also makes the model that is compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from drlora.errors import CheckpointError
from drlora.export.factors import Factors
from drlora.export.updates import Updates, linear_updates, trained_modules, unread_keys

# Ordinary LoRA on such a linear layer is targeted as a parameter: of these names PEFT makes the
# fused experts when it translates configurations that were written for transformers 4.
_NAMES_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}


def make_config(updates: Updates, base: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of the export."""
    rank = updates.rank
    clashing = {n for n in updates.linears if n.rpartition(".")[2] in _NAMES_OF_EXPERTS}
    clashing |= set(updates.routers)  # modules of their own, not Linear layers
    parameters = _short(list(updates.experts), base) + [f"{n}.weight" for n in sorted(clashing)]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_parameters=parameters,
        target_modules=sorted(set(updates.linears) - clashing),
        modules_to_save=list(updates.modules) or None,
        task_type=updates.task_type or _task_of(base),
        base_model_name_or_path=base.name_or_path or None,
    )


def _task_of(base: PreTrainedModel) -> str | None:
    return "CAUSAL_LM" if hasattr(base, "prepare_inputs_for_generation") else None


def attach(base: PreTrainedModel, updates: Updates) -> PeftModel:
    """`base` with a plain PEFT LoRA that does what the adapter did.

    Raises:
        CheckpointError: if PEFT would not find the tensors again in the file that it writes.
    """
    config = make_config(updates, base)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    filled = set()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            target = target_of(name, module)
            _fill(module, {**updates.experts, **updates.linears}[target], config.r)
            filled.add(target)
        elif isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"].load_state_dict(updates.modules[name])
            filled.add(name)
    assert filled == {*updates.experts, *updates.linears, *updates.modules}
    _refuse_unreadable(model)
    return model


def refuse_if_not_readable(base: PreTrainedModel, updates: Updates) -> None:
    """Refuse before anything is computed what `attach` would refuse, on a model without weights.

    Raises:
        CheckpointError: if PEFT would not find the tensors again in the file that it writes.
    """
    base_class: Any = type(base)
    with torch.device("meta"):
        skeleton = base_class(copy.deepcopy(base.config))
        model = get_peft_model(skeleton, make_config(updates, base))
    assert isinstance(model, PeftModel)
    _refuse_unreadable(model)


def _refuse_unreadable(model: PeftModel) -> None:
    """PEFT renames keys as the model's checkpoint does, for some models to names without a layer.

    Loading then leaves those layers as if they were new, with nothing but a warning.
    """
    missing, unexpected = unread_keys(
        model, get_peft_model_state_dict(model, save_embedding_layers=False)
    )
    if missing or unexpected:
        raise CheckpointError(
            f"PEFT does not read back its own LoRA on {type(model.get_base_model()).__name__}: it "
            f"renames {missing[:1]} to {unexpected[:1]}. Nothing was written; use the "
            f"format merged."
        )


def read(model: PeftModel, adapter: str = "default") -> Updates:
    """What a plain PEFT LoRA changes in its base model: the way back from `attach`."""
    inner = model.get_base_model()
    experts: dict[str, Factors] = {}
    linears = linear_updates(inner, adapter)
    for name, module in inner.named_modules():
        if isinstance(module, ParamWrapper) and adapter in module.lora_A:
            target, factors = target_of(name, module), _factors_of(module, adapter)
            (experts if module.get_param().dim() == 3 else linears)[target] = factors
    return Updates(experts, linears, trained_modules(inner, adapter))


def target_of(name: str, module: LoraLayer) -> str:
    """Full name of the stacked parameter, or of the linear layer, that a LoRA layer is on."""
    target = name.replace(".base_layer", "")
    if isinstance(module, ParamWrapper):
        target = f"{target}.{module.parameter_name}".removesuffix(".weight")
    return target


def _factors_of(module: ParamWrapper, adapter: str) -> Factors:
    rank, num_experts = module.r[adapter], module.num_experts
    a = module.lora_A[adapter].get_parameter("weight").detach().float().cpu()
    b = module.lora_B[adapter].get_parameter("weight").detach().float().cpu()
    a_ErI = a.unflatten(0, (num_experts, rank))
    b_EOr = b.unflatten(1, (rank, num_experts)).permute(2, 0, 1) * module.scaling[adapter]
    return Factors(tuple(a_ErI.unbind()), tuple(b_EOr.unbind()))


def size_bytes(updates: Updates) -> int:
    """Size of the written tensors; LoRA is kept in float32."""
    rows = [*updates.experts.values(), *updates.linears.values()]
    lora = sum(len(f.a) * updates.rank * (f.in_features + f.out_features) for f in rows)
    whole = [x for state in updates.modules.values() for x in state.values()]
    if updates.embeddings:  # PEFT writes embeddings that were trained in full a second time
        names = [key.partition(".original_module.")[0] for key in updates.embeddings]
        twice = [state for name, state in updates.modules.items() if name in names]
        whole += [*updates.embeddings.values(), *(x for state in twice for x in state.values())]
    return 4 * lora + sum(x.numel() * x.element_size() for x in whole)


@torch.no_grad()
def _fill(module: LoraLayer, factors: Factors, rank: int) -> None:
    a_ErI, b_EOr = factors.padded(rank)
    module.lora_A["default"].get_parameter("weight").copy_(a_ErI.flatten(0, 1))
    module.lora_B["default"].get_parameter("weight").copy_(b_EOr.permute(1, 2, 0).flatten(1))


def _short(names: list[str], base: nn.Module) -> list[str]:
    """Endings such as `experts.down_proj`, where they stand for exactly these parameters."""
    endings = {".".join(name.split(".")[-2:]) for name in names}
    meant = {n for n, _ in base.named_parameters() if n.endswith(tuple(f".{e}" for e in endings))}
    return sorted(endings) if meant == set(names) else sorted(names)
