"""The format sglang: names, shapes, and what SGLang's own loader makes of them, as rules.

The rules are those of SGLang 0.5.23 (lora.py, layers.py), which has no build for a CPU: of a
stacked `gate_up_proj` it takes A twice, and of B the first half as gate's and the rest as up's,
which it turns where the model has them in turns.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import make_batch, make_class, make_model
from tiny_adapter import make_settings, train

from drlora.errors import ConfigError
from drlora.export.plan import apply_plan, make_plan
from drlora.export.reference import Reference
from drlora.moe.blocks import find_blocks

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
ROOT = "base_model.model."
# Apart in the checkpoint, under other names there, beside a shared expert, together and in turns,
# and turned without saying so.
BASES = {
    "olmoe": make_model,
    "mixtral": lambda: make_model("mixtral"),
    "qwen2_moe": lambda: make_model("qwen2_moe"),
    "gpt_oss": lambda: make_class("GptOssForCausalLM"),
    "llama4": lambda: make_class("Llama4ForCausalLM"),
}


def in_buffers(tensors, module):
    """What SGLang computes each expert's gate, up and down with: B A, (E, ., .) each."""
    a, b = (tensors[f"{ROOT}{module}.gate_up_proj.lora_{x}.weight"] for x in "AB")
    width = b.shape[1] // 2
    down = (tensors[f"{ROOT}{module}.down_proj.lora_{x}.weight"] for x in "AB")
    a_down, b_down = down
    return b[:, :width] @ a, b[:, width:] @ a, b_down @ a_down


@pytest.mark.parametrize("family", BASES)
def test_every_expert_gets_its_own_update(tmp_path, family):
    changes = {"target_modules": ["q_proj"], "target_rank": 3}
    model = train(get_peft_model(BASES[family](), make_settings(**changes)))
    reference = Reference.of(model, "default")
    blocks = find_blocks(model.get_base_model())
    plan = make_plan(model, "sglang")
    apply_plan(plan, model, BATCHES, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for block in blocks:
        gate, up, down = in_buffers(tensors, block.experts_name)
        own = reference.blocks[block.experts_name]
        for expert in range(block.num_experts):
            both = own.update("gate_up", expert)
            parts = (both[0::2], both[1::2]) if block.is_interleaved else both.chunk(2)
            wanted = (*parts, own.update("down", expert))
            for found, right in zip((gate, up, down), wanted, strict=True):
                assert right.abs().max() > 0
                torch.testing.assert_close(found[expert].double(), right, rtol=0, atol=1e-6)
    assert all(x.shape[1 if x.dim() == 3 else 0] == plan.rank
               for key, x in tensors.items() if ".lora_A." in key)  # fmt: skip
    assert sum(x.numel() * x.element_size() for x in tensors.values()) == plan.weight_bytes


def test_settings_name_what_sglang_knows(tmp_path):
    """It wraps experts only for gate_up_proj and down_proj, and asks for r and lora_alpha."""
    settings = make_settings(target_modules=["q_proj"], target_rank=3)
    model = train(get_peft_model(make_model("mixtral"), settings))
    plan = make_plan(model, "sglang")
    apply_plan(plan, model, BATCHES, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "q_proj"]
    assert config["r"] == config["lora_alpha"] == plan.rank and not config["use_dora"]
    reads = {reading.engine: reading.reads for reading in plan.readings}
    assert reads["SGLang"] and not any(v for k, v in reads.items() if k != "SGLang")


@pytest.mark.parametrize("routers", ["full", "lora", "exact"])
def test_trained_routers_are_refused(routers):
    model = train(get_peft_model(make_model(), make_settings(router="train")))
    with pytest.raises(ConfigError, match="no LoRA on routers"):
        make_plan(model, "sglang", routers=routers)


def test_experts_without_a_gate_are_refused():
    model = train(get_peft_model(make_class("NemotronHForCausalLM"), make_settings()))
    with pytest.raises(ConfigError, match="a gate beside every up projection"):
        make_plan(model, "sglang")
