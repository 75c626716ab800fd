"""All that an adapter changes in its model, taken out of drlora's own layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from drlora.adapter.embeddings import embedding_names, rows_before
from drlora.adapter.inject import adapted_layers
from drlora.adapter.layer import DrLoraExperts
from drlora.errors import ConfigError
from drlora.export.factors import Factors, expert_factors
from drlora.ops.weights import Matrix

# The parameter of an experts module that holds a matrix of all experts.
PARAMETERS: dict[Matrix, tuple[str, ...]] = {
    "gate_up": ("gate_up_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Updates:
    """The contents of one adapter.

    Attributes:
        experts: full name of a stacked expert parameter -> its update.
        linears: full name of a linear layer with ordinary LoRA -> its update (E = 1).
        modules: full name of a module that was trained in full -> its tensors.
        embeddings: key -> tensor of the base model's own embeddings, where they were resized: what
            a base model as it is published does not have.
        task_type: PEFT's, of the adapter.
        routers: full name of a trained router that is among the linears -> the share of its update
            that the rank has no room for.
        is_sketch: whether base weights were not there to be read, so that routers among the
            linears have their shapes alone.
    """

    experts: dict[str, Factors]
    linears: dict[str, Factors]
    modules: dict[str, dict[str, Tensor]]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    task_type: str | None = None
    routers: dict[str, float] = field(default_factory=dict)
    is_sketch: bool = False

    @property
    def rank(self) -> int:
        """The largest rank, to which all others are padded; at least 1."""
        factors = [*self.experts.values(), *self.linears.values()]
        return max([1, *(rank for f in factors for rank in f.ranks)])

    def shrunk(self) -> Updates:
        """The same updates at their numerical ranks."""
        return replace(
            self,
            experts={name: factors.shrunk() for name, factors in self.experts.items()},
            linears={name: factors.shrunk() for name, factors in self.linears.items()},
        )


def collect_updates(model: PeftModel, adapter: str, all_matrices: bool = False) -> Updates:
    """What `adapter` changes in its base model; copies, on the CPU, in float32.

    Args:
        model: carries the adapter; its base weights are not read.
        adapter: its name.
        all_matrices: whether a matrix that is not adapted gets an update of rank 0.

    Raises:
        ConfigError: if a block's experts are not in one parameter a matrix; the block is named.
    """
    inner = model.get_base_model()
    refuse_tokens(inner, adapter, "which this format has no place for; use the format merged.")
    experts = {}
    for layer in adapted_layers(inner, adapter).values():
        for matrix in PARAMETERS:
            factors = expert_factors(layer.adapter(adapter), matrix)
            if factors is None and all_matrices:
                factors = _no_update(layer.block.num_experts, *layer.block.shape_of(matrix))
            if factors is not None:
                name = _parameter_name(layer, matrix)
                experts[name] = factors.transposed() if seen_transposed(layer, matrix) else factors
    return Updates(
        experts,
        linear_updates(inner, adapter),
        trained_modules(inner, adapter),
        resized_embeddings(inner),
        model.peft_config[adapter].task_type,
    )


def resized_embeddings(inner: nn.Module) -> dict[str, Tensor]:
    """The base model's own embeddings as PEFT's files name them, if they were resized."""
    if rows_before(inner) is None:
        return {}
    found = {}
    for name in embedding_names(inner):
        module = inner.get_submodule(name)
        part = ""
        if isinstance(module, ModulesToSaveWrapper):
            module, part = module.original_module, "original_module."
        elif isinstance(module, LoraLayer):
            module, part = module.get_base_layer(), "base_layer."
        for key, value in module.state_dict().items():
            found[f"{name}.{part}{key}"] = value.detach().clone()
    return found


def unread_keys(model: PeftModel, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Put `tensors` into the adapter as PEFT does; (missing, unexpected) keys where it does not."""
    report: Any = set_peft_model_state_dict(model, tensors)
    missing = [key for key in report.missing_keys if ".lora_" in key or "modules_to_save" in key]
    return missing, list(report.unexpected_keys)


def base_of(model: PeftModel, adapter: str) -> PreTrainedModel:
    """The base model without any adapter, as it was before; `model` is used up.

    PEFT's own `unload` would leave modules that were trained in full in their trained state.
    """
    inner = model.get_base_model()
    originals = {name: module.original_module for name, module in _saved(inner)}
    base = cast(PreTrainedModel, model.unload())
    for name, original in originals.items():
        base.set_submodule(name, original)
    return base


def seen_transposed(layer: DrLoraExperts, matrix: Matrix) -> bool:
    """Whether PEFT takes a block's in-features for its out-features, and the other way round.

    It believes a flag `is_transposed`, which some modules that store (E, in, out) do not have.
    """
    is_transposed = layer.base_weights.matrix(matrix).is_transposed
    return is_transposed != getattr(layer.get_base_layer(), "is_transposed", False)


def _parameter_name(layer: DrLoraExperts, matrix: Matrix) -> str:
    experts = layer.get_base_layer()
    own = dict(experts.named_parameters(recurse=False))
    for key in PARAMETERS[matrix]:
        if key in own and own[key].dim() == 3 and len(own[key]) == layer.block.num_experts:
            return f"{layer.block.experts_name}.{key}"
    raise ConfigError(
        f"{layer.block.experts_name} ({type(experts).__name__}) does not hold its {matrix} "
        f"matrices in one parameter (E, ., .), which PEFT's LoRA needs; use the format merged"
        + (", from the model as it was before." if layer.base_weights.fixed else ".")
    )


def _no_update(num_experts: int, in_features: int, out_features: int) -> Factors:
    a_rI, b_Or = torch.zeros(0, in_features), torch.zeros(out_features, 0)
    return Factors((a_rI,) * num_experts, (b_Or,) * num_experts)


def linear_updates(inner: nn.Module, adapter: str) -> dict[str, Factors]:
    """Ordinary LoRA on linear layers, by full name.

    Raises:
        ConfigError: if a layer's is no plain LoRA.
    """
    found = {}
    for name, module in inner.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            continue
        if (
            adapter in module.lora_embedding_A
            or adapter in module.lora_variant
            or module.lora_bias.get(adapter)
        ):
            raise ConfigError(
                f"the LoRA on {name} is no plain LoRA on a linear layer, which is all that can be "
                f"converted; merge it into the base model instead."
            )
        if adapter not in module.lora_A:
            continue
        a_rI = module.lora_A[adapter].get_parameter("weight").detach().float().cpu()
        b_Or = module.lora_B[adapter].get_parameter("weight").detach().float().cpu()
        found[name] = Factors((a_rI,), (b_Or * module.scaling[adapter],))
    return found


def trained_modules(inner: nn.Module, adapter: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of modules that were trained in full, by full name."""
    return {
        name: {
            key: value.detach().cpu().clone()
            for key, value in module.modules_to_save[adapter].state_dict().items()
        }
        for name, module in _saved(inner)
        if adapter in module.modules_to_save
    }


def refuse_tokens(inner: nn.Module, adapter: str, way_out: str) -> None:
    """`way_out` ends the sentence.

    Raises:
        ConfigError: if single tokens of an embedding were trained.
    """
    for name, module in inner.named_modules():
        if isinstance(module, TrainableTokensWrapper) and (
            adapter in module.token_adapter.trainable_tokens_delta
        ):
            raise ConfigError(
                f"the adapter trained single tokens of {name} (trainable_token_indices), {way_out}"
            )


def _saved(inner: nn.Module) -> list[tuple[str, ModulesToSaveWrapper]]:
    return [(n, m) for n, m in inner.named_modules() if isinstance(m, ModulesToSaveWrapper)]
