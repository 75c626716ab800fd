"""Linear layers beside packed experts, in four bits by bitsandbytes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_class, make_model
from tiny_adapter import logits, make_settings
from transformers import AutoModelForCausalLM

import drlora
from drlora.moe.rest import linears_of_rest

WIDE = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=64)


def test_routers_gates_heads_and_shared_experts_are_left_out():
    model = make_model("qwen2_moe", **WIDE)
    names = {name.partition("layers.")[2][2:] for name in linears_of_rest(model)}
    attention = {f"self_attn.{key}_proj" for key in "qkvo"}
    assert names == attention
    shared = {name.partition("layers.")[2][2:] for name in linears_of_rest(model, shared=True)}
    assert shared == attention | {f"mlp.shared_expert.{k}_proj" for k in ("gate", "up", "down")}


def test_dense_layers_of_a_mixed_model_are_among_them():
    model = make_class("DeepseekV3ForCausalLM", first_k_dense_replace=1)
    names = linears_of_rest(model)
    assert "model.layers.0.mlp.gate_proj" in names
    assert not any("layers.1.mlp" in name or "lm_head" in name for name in names)


def load(folder, dtype):
    torch.manual_seed(0)
    make_model("olmoe", **WIDE).save_pretrained(folder)
    config = drlora.QuantisedExperts("nf4", rest="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


@pytest.fixture
def loaded(tmp_path):
    pytest.importorskip("bitsandbytes")
    return load(tmp_path, torch.bfloat16)


def gradients(model):
    torch.manual_seed(3)
    adapted = get_peft_model(model, make_settings(target_modules=["q_proj"]))
    torch.manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.data.normal_()
    adapted.train()(**make_batch(0)).loss.backward()
    return {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}


def test_a_look_at_the_model_before_training_changes_no_gradient(loaded):
    """bitsandbytes 0.50 packs weights anew for inference, and that has no backward pass."""
    looked_at = copy.deepcopy(loaded)
    with torch.no_grad():
        logits(looked_at.eval())
    wanted, got = gradients(loaded), gradients(looked_at)
    assert any("q_proj" in name for name in wanted)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def test_dequantized_it_is_an_ordinary_model_with_the_same_numbers(tmp_path):
    pytest.importorskip("bitsandbytes")
    loaded = load(tmp_path, torch.float32)  # in 16 bits rounding sends a token to another expert
    wanted = logits(loaded)
    plain = loaded.dequantize()
    assert not any("4bit" in type(m).__name__ or "Packed" in type(m).__name__
                   for m in plain.modules())  # fmt: skip
    off = (logits(plain) - wanted).float().norm() / wanted.float().norm()
    assert off < 1e-5
