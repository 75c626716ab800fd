"""The small models that are pretrained here, each of an architecture of transformers.

Imported by `pretrain.py`. `llama_moe` is not made from random weights but from a pretrained
`llama`: its FFNs are split into experts, as LLaMA-MoE was made (Zhu et al., 2024, "LLaMA-MoE:
Building Mixture-of-Experts from LLaMA with Continual Pre-training").
"""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, int]]] = {
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig,
        {"intermediate_size": 192, "num_experts": 16, "num_experts_per_tok": 2},
    ),
    # Fine experts, 64 with top-8 as OLMoE-1B-7B has: the same weights and work a token as `olmoe`.
    "olmoe_fine": (
        OlmoeForCausalLM,
        OlmoeConfig,
        {"intermediate_size": 48, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    # Many narrow experts and a shared one, as Qwen1.5-MoE-A2.7B (60 experts, top-4) has.
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 192,
            "num_experts": 24,
            "num_experts_per_tok": 4,
        },
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 1536}),
}
NAMES = (*ARCHITECTURES, "llama_moe")
# LLaMA-MoE-3.5B: 16 experts, top-4, experts' outputs scaled by their number over top-k.
SPLIT = {"experts": 16, "top_k": 4, "scale": 4.0}


def new_model(name: str, tokenizer: PreTrainedTokenizerFast, **sizes: int) -> PreTrainedModel:
    """A randomly initialised model of the project's size; `sizes` override single settings."""
    model_class, config_class, own = ARCHITECTURES[name]
    config = config_class(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        router_aux_loss_coef=0.0,
        **(COMMON | own | sizes),
    )
    return model_class._from_config(config, **_experts_engine(config))


def _experts_engine(config: PreTrainedConfig) -> dict[str, str]:
    return {"experts_implementation": "grouped_mm"} if has_experts(config) else {}


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration route tokens to experts."""
    return hasattr(config, "num_experts")


def split_dense(
    dense: LlamaForCausalLM, experts: int, top_k: int, scale: float, seed: int
) -> MixtralForCausalLM:
    """Make experts of each FFN: a random partition of its I intermediate neurons into equal slices.

    Everything else is copied; routers are new and random. Mixtral has no factor on the experts'
    outputs, so `scale` is multiplied into their down projections.

    Args:
        dense: the pretrained model, with I intermediate neurons.
        experts: E; I must be a multiple of it.
        top_k: experts a token.
        scale: factor on the output of each expert. Mixtral's routing weights sum to 1 over the
            chosen experts, so `scale=E, top_k=E` and equal weights give the dense model.
        seed: of the partition and the routers.
    """
    taken = (*COMMON, "vocab_size", "max_position_embeddings")
    taken += ("bos_token_id", "eos_token_id", "pad_token_id")
    config = MixtralConfig(
        intermediate_size=dense.config.intermediate_size // experts,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        router_aux_loss_coef=0.0,
        **{name: getattr(dense.config, name) for name in taken},
    )
    torch.manual_seed(seed)
    model = MixtralForCausalLM._from_config(config, **_experts_engine(config))
    kept = {name: w for name, w in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected and all(".mlp." in name for name in missing), (missing, unexpected)
    for moe_layer, layer in zip(model.model.layers, dense.model.layers, strict=True):
        copy_slices(layer.mlp, moe_layer.mlp.experts, scale)
    return model


@torch.no_grad()
def copy_slices(mlp: Any, experts: Any, scale: float) -> None:
    """Copy random slices of the neurons of `mlp` into the F neurons of each of the E experts."""
    neurons_EF = torch.randperm(mlp.gate_proj.out_features).view(experts.num_experts, -1)
    gate_EFH, up_EFH = mlp.gate_proj.weight[neurons_EF], mlp.up_proj.weight[neurons_EF]
    experts.gate_up_proj.copy_(torch.cat((gate_EFH, up_EFH), dim=1))
    experts.down_proj.copy_(scale * mlp.down_proj.weight.T[neurons_EF].transpose(1, 2))
