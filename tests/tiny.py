"""Tiny models of real transformers classes, with random weights: milliseconds per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny_config import VOCAB, tiny_config
from transformers import PreTrainedModel, TrainingArguments

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_DEEPSEEK = dict(
    kv_lora_rank=8,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    n_shared_experts=1,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    intermediate_size=40,
    moe_intermediate_size=24,
)
# Family -> (model class, config class, settings of the config).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmoe": (
        "OlmoeForCausalLM",
        "OlmoeConfig",
        dict(intermediate_size=24, num_experts=6, num_experts_per_tok=2),
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        dict(
            intermediate_size=40,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=2,
        ),
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        dict(
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            head_dim=8,
        ),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        "PhimoeConfig",
        dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        dict(
            intermediate_size=40,
            moe_intermediate_size=24,
            n_routed_experts=6,
            n_shared_experts=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            head_dim=8,
        ),
    ),
}


def make_config(family: str = "olmoe", **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a tiny model of `family`."""
    _, config_class, settings = FAMILIES[family]
    return getattr(transformers, config_class)(**{**_COMMON, **settings, **changes})


def make_model(family: str = "olmoe", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with random weights that are the same for the same seed."""
    torch.manual_seed(seed)
    return _enlarged(getattr(transformers, FAMILIES[family][0])(make_config(family, **changes)))


def make_class(class_name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of any class of transformers, the same each time."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    return _enlarged(model_class(tiny_config(model_class.config_class, **changes)))


def _enlarged(model: PreTrainedModel) -> PreTrainedModel:
    # Larger weights than the default 0.02, so that experts and routers matter to the output.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
    return model.eval()


def make_batch(seed: int = 0, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Random token ids as inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def plain_loop(
    model: torch.nn.Module,
    dynamics: Any,
    optimizer: torch.optim.Optimizer,
    steps: range,
    batch: Callable[[int], dict[str, torch.Tensor]] = make_batch,
) -> list[float]:
    """The plain training loop of the README; returns the losses."""
    model.train()
    losses = []
    for step in steps:
        loss = model(**batch(step)).loss
        loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def checkpoint_activations(model, **settings) -> None:
    """Gradient checkpointing, by the name that this version of transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(
        *([settings] if settings else [])
    )


def checkpointing_arguments(**settings) -> dict:
    """The same, for TrainingArguments."""
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing"
    name = name if name in fields else "gradient_checkpointing"
    return {name: True, **({f"{name}_kwargs": settings} if settings else {})}
