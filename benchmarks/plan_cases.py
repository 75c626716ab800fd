"""Small runs that forecasts are compared with: models of real classes made here, and recipes.

Weights are random, of sizes that make the parts of memory differ: many experts or few, a large
vocabulary or a small one, 16 bits or 32, packed experts, long rows or many, checkpointed or not.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drlora.embedded import model_folder

EXAMPLES = 24
# What the models share: a head of 64 numbers, tokens of the embedded tokenizer.
COMMON = dict(max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: in the rows of the result.
        family: `model_type` of transformers.
        sizes: of its config.
        length: longest example, in tokens.
        batch: examples at once.
        dtype: of the weights, as they are stored and used.
        short: whether examples have any length up to `length`; else all are that long.
        adapter, training, quantise: of the recipe, beside what all have.
    """

    name: str
    family: str
    sizes: dict[str, Any]
    length: int
    batch: int
    dtype: str = "bfloat16"
    short: bool = False
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    quantise: dict[str, Any] = field(default_factory=dict)


def _sizes(hidden: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> Any:
    return dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=groups, vocab_size=vocab, **more)  # fmt: skip


OLMOE = _sizes(512, 6, 8, 8, 8192, intermediate_size=256, num_experts=16, num_experts_per_tok=4)
MIXTRAL = _sizes(576, 8, 9, 3, 49152, intermediate_size=1536, num_local_experts=8,
                 num_experts_per_tok=2, tie_word_embeddings=True)  # fmt: skip
QWEN3 = _sizes(512, 6, 8, 4, 32768, head_dim=64, intermediate_size=1024, num_experts=32,
               moe_intermediate_size=384, num_experts_per_tok=4, norm_topk_prob=True)  # fmt: skip
QWEN2 = _sizes(512, 4, 8, 8, 16384, intermediate_size=1024, num_experts=16,
               moe_intermediate_size=512, shared_expert_intermediate_size=1024,
               num_experts_per_tok=4)  # fmt: skip
GPT_OSS = _sizes(512, 4, 8, 2, 16384, head_dim=64, intermediate_size=512, num_local_experts=16,
                 num_experts_per_tok=4, sliding_window=128)  # fmt: skip
DEEPSEEK = _sizes(512, 5, 8, 8, 16384, intermediate_size=1024, moe_intermediate_size=256,
                  n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
                  first_k_dense_replace=2, q_lora_rank=192, kv_lora_rank=128, qk_rope_head_dim=32,
                  qk_nope_head_dim=64, v_head_dim=64, n_shared_experts=1)  # fmt: skip
CHECKPOINTED = {"gradient_checkpointing": True}

CASES = (
    Case("olmoe float32", "olmoe", OLMOE, 256, 4, "float32"),
    Case("olmoe bfloat16", "olmoe", OLMOE, 256, 4),
    Case("olmoe bfloat16, one long row", "olmoe", OLMOE, 2048, 1),
    Case("olmoe bfloat16, nf4", "olmoe", OLMOE, 256, 8, quantise={"experts": "nf4"}),
    Case("mixtral float32", "mixtral", MIXTRAL, 160, 4, "float32"),
    Case("mixtral bfloat16", "mixtral", MIXTRAL, 160, 8),
    Case("mixtral bfloat16, int8, checkpointed", "mixtral", MIXTRAL, 160, 8,
         quantise={"experts": "int8"}, training=CHECKPOINTED),
    Case("qwen3 bfloat16, checkpointed", "qwen3_moe", QWEN3, 512, 4, training=CHECKPOINTED),
    Case("qwen3 float32, checkpointed", "qwen3_moe", QWEN3, 512, 2, "float32",
         training=CHECKPOINTED),
    Case("qwen3 bfloat16, attention too, rank 32", "qwen3_moe", QWEN3, 256, 4,
         adapter=dict(r_init=16, r_target=32, r_max=64,
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
    Case("qwen2 bfloat16, packed", "qwen2_moe", QWEN2, 512, 4, short=True,
         training={"packing": True}),
    Case("qwen2 float32, short examples, accumulated", "qwen2_moe", QWEN2, 384, 4, "float32",
         short=True, training={"gradient_accumulation_steps": 2}),
    Case("gpt-oss bfloat16", "gpt_oss", GPT_OSS, 256, 4),
    Case("gpt-oss float32, nf4", "gpt_oss", GPT_OSS, 256, 4, "float32",
         quantise={"experts": "nf4"}),
    Case("deepseek float32, shared and dense layers", "deepseek_v3", DEEPSEEK, 256, 4, "float32"),
    Case("deepseek bfloat16, checkpointed", "deepseek_v3", DEEPSEEK, 1024, 2,
         training=CHECKPOINTED),
)  # fmt: skip


def make(case: Case, folder: Path, steps: int) -> Path:
    """Write the case's model, data and recipe into `folder`; the recipe's file."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.family, **case.sizes, **COMMON)
    config.dtype = case.dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    finally:
        torch.set_default_dtype(default)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder / "model")
    _write_data(case, folder)
    adapter = dict(r_init=4, r_target=8, r_max=16, grow_every=1, settle_steps=1, p_grow=1.0)
    training = dict(
        max_steps=steps, warmup_steps=1, learning_rate=1e-5, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=case.batch,
    )  # fmt: skip
    recipe = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": case.length,
        },
        "adapter": adapter | case.adapter,
        "training": training | case.training,
        "evaluation": dict(loss_examples=case.batch, before=False, samples=0, exact_match=False,
                           batch_size=case.batch),
        "quantise": case.quantise,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def _write_data(case: Case, folder: Path) -> None:
    draw = random.Random(0)
    for name, count in (("train", EXAMPLES), ("eval", case.batch)):
        words = [
            draw.randrange(8, case.length) if case.short else case.length for _ in range(count)
        ]
        texts = (" ".join(str(draw.randrange(10)) for _ in range(number)) for number in words)
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8"
        )
