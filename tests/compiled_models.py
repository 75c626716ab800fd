"""Tiny adapted models that are compiled, and what is compared."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tiny import make_batch, make_class, make_model

import drlora
from drlora.adapter.inject import adapted_layers

FAMILIES = ["olmoe", "qwen3_moe", "mixtral", "gpt_oss"]


def base_model(family, **changes):
    if family == "gpt_oss":
        return make_class("GptOssForCausalLM", **changes)
    return make_model(family, **changes)


def start(family="olmoe", layers=1, **changes):
    """An adapted model whose update is not zero."""
    settings = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5)
    torch.manual_seed(0)
    base = base_model(family, num_hidden_layers=layers)
    model = get_peft_model(base, drlora.DrLoraConfig(**{**settings, **changes})).train()
    for layer in adapted_layers(model, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            pool.lora_B.data.normal_(std=0.1)
    return model


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend)


def batch(seed=0, **changes):
    """No cache of keys, as training has none."""
    return {**make_batch(seed), "use_cache": False, **changes}


def padded_batch(seed=0):
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    return batch(seed, attention_mask=mask)


def meters(model):
    return [layer.adapter("default").meter for layer in adapted_layers(model, "default").values()]


def assert_same(model, twin, tolerance=1e-5):
    """Same gradients, by relative norm, and same statistics."""
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.requires_grad:
            error = (one.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-12)
            assert error < tolerance, f"relative error of d{name} is {error:.2e}"
    for one, other in zip(meters(model), meters(twin), strict=True):
        assert one.num_tokens.item() == other.num_tokens.item() > 0
        torch.testing.assert_close(one.sum_E, other.sum_E, rtol=1e-5, atol=1e-5)
