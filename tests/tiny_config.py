"""A tiny config for any model class: its own default config with every size shrunk by name.

Sizes have the same few names in nearly all configs, so a table of names is enough; what a model
wants otherwise (sizes that must fit each other in another way) is in `SPECIAL`, by model type.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

VOCAB = 64
# Name in a config -> tiny value; only those that the config has are set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "kv_n_heads"], 4),
    **dict.fromkeys(["head_dim", "kv_channels", "attention_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["intermediate_size", "intermediate_size_mlp"], 40),
    **dict.fromkeys(
        ["moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size",
         "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "shared_intermediate_size", "share_expert_dim"], 24,
    ),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 6
    ),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
         "top_k_experts"], 2,
    ),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "first_k_dense"], 1),
    **dict.fromkeys(["q_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "max_seq_len"], 64),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 16),
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Model type -> what it wants otherwise.
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_HALF_ROTARY = {
    **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    **{"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64},
}
_NO_IMAGES = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32)
SPECIAL: dict[str, dict[str, Any]] = {
    "beam": _SPARSE,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "glm4v_moe_text": {"rope_parameters": {"rope_theta": 10000.0, "mrope_section": [1, 1, 0]}},
    "glm4v_moe_vision": _NO_IMAGES,
    "glm5_next_vision": {**_NO_IMAGES, "projection_intermediate_size": 32},
    "glm5_next_text": {**_SPARSE, "qk_rope_head_dim": 0, "linear_num_heads": 4},
    "flint": {"mlp_only_layers": []},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8},
    "llama4_vision_model": {"projector_input_dim": 32, "projector_output_dim": 32},
    "kimi_linear": {"linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},  # doubled in layers with a window
    "mistral4": {"rope_parameters": _HALF_ROTARY},
    "muse_spark": {"projector_hidden_size": 32},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [32] * 4, "depths": [1] * 4,
                         "out_hidden_size": 32},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 60, "audio_start_token_id": 61},
    "step3p5": {**_SPARSE, "sliding_window": 8},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """The default config of `config_class` at tiny sizes, and the same for the configs in it."""
    return config_class(**{**_tiny_settings(config_class), **changes})


def _tiny_settings(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    default = config_class()
    names = {*default.to_dict(), *default.attribute_map}
    settings = {name: size for name, size in SIZES.items() if name in names}
    for name, inner in vars(default).items():
        if isinstance(inner, PreTrainedConfig):
            settings[name] = _tiny_settings(type(inner))
    return {**settings, **SPECIAL.get(config_class.model_type, {})}
