"""Every family of experts in every storage: the same function, gradients, and a loss that falls."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_of_others import old_model
from tiny import make_batch, make_class, make_model, plain_loop, trainable
from tiny_adapter import logits, make_settings, train
from transformers import AutoModelForCausalLM

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.moe.packing import is_packed
from drlora.moe.quantise import quantise_experts

WIDE = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
STORAGES = ["nf4", "nf4-nested", "int8", "mxfp4", "fp8"]
CLASSES = {
    "gpt_oss": ("GptOssForCausalLM", dict(hidden_size=64, intermediate_size=64)),
    "llama4": ("Llama4ForCausalLM", dict(hidden_size=64, intermediate_size=64)),
    "dbrx": ("DbrxForCausalLM", dict(d_model=64, hidden_size=64)),
    "jetmoe": ("JetMoeForCausalLM", dict(hidden_size=64, intermediate_size=64)),
}
# Kept in other ways than transformers' experts interface has it.
EXCEPTIONS = ["llama4", "dbrx", "jetmoe", "list"]
FAMILIES = ["olmoe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", *EXCEPTIONS]


def base(family):
    torch.manual_seed(0)
    if family == "list":
        return old_model()
    if family in CLASSES:
        name, changes = CLASSES[family]
        if family == "dbrx":
            sizes = dict(hidden_size=64, ffn_hidden_size=64, moe_num_experts=6, moe_top_k=2)
            changes = {**changes, "ffn_config": sizes}
        return make_class(name, **changes)
    return make_model(family, **WIDE)


def adapted(model, **changes):
    torch.manual_seed(3)
    kind = {} if hasattr(model, "prepare_inputs_for_generation") else {
        "task_type": "FEATURE_EXTRACTION"
    }  # fmt: skip
    found = get_peft_model(model, make_settings(**kind, **changes))
    assert isinstance(found, PeftModel)
    return found


def wide_of(packed):
    """A model of ordinary numbers, those that the packed ones stand for."""
    wide = copy.deepcopy(packed)
    for module in list(wide.modules()):
        if is_packed(module):
            drlora.moe.packing.take_out(module)
    assert not any(is_packed(module) for module in wide.modules())
    return wide


def said(model, seed=7):
    with torch.no_grad():
        return model.eval()(**make_batch(seed)).logits


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_had_rows_learn_and_the_loss_falls(family, storage):
    """An adapter that does nothing, or experts without a gradient, would show here."""
    model = adapted(quantise_experts(base(family), storage))
    batch = make_batch(0, rows=4)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    dynamics = drlora.RankDynamics(model, total_steps=16)
    losses = plain_loop(model, dynamics, optimizer, range(16), lambda step: batch)
    assert losses[-1] < losses[0] - 0.5
    model.zero_grad()
    for layer in adapted_layers(model, "default").values():
        layer.adapter("default").meter.reset()
    model.train()(**batch).loss.backward()
    seen = 0
    for layer in adapted_layers(model, "default").values():
        adapter = layer.adapter("default")
        assert layer.base_weights.down.name == storage
        for expert in torch.where(adapter.meter.sum_E > 0)[0].tolist():
            for pool in adapter.rank_pools.values():
                rows = pool.owner == expert
                assert pool.lora_A.grad[rows].any() and pool.lora_B.grad[rows].any()
                seen += 1
    assert seen > 8


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", EXCEPTIONS)
def test_packed_they_compute_what_their_numbers_say(family, storage):
    plain = base(family)
    packed = quantise_experts(copy.deepcopy(plain), storage)
    wide = wide_of(packed)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in wide.named_parameters()] and {
        name: p.shape for name, p in wide.named_parameters()
    } == {name: p.shape for name, p in plain.named_parameters()}
    assert len(names) < len([n for n, _ in packed.named_parameters()])
    torch.testing.assert_close(said(packed), said(wide), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said(packed), said(plain))
    models = [adapted(packed), adapted(wide)]
    found = []
    for model in models:
        torch.manual_seed(5)
        for layer in adapted_layers(model, "default").values():
            for pool in layer.adapter("default").rank_pools.values():
                owned = (pool.owner >= 0)[:, None]
                pool.lora_B.data = torch.randn(pool.lora_B.shape) * 0.1 * owned
        model.train()(**make_batch(0)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, gradient in found[0].items():
        error = (gradient - found[1][key]).norm()
        assert error < 1e-4 * found[1][key].norm().clamp(min=1e-9), key
    with models[0].disable_adapter():
        torch.testing.assert_close(said(models[0]), said(wide_of(quantise_experts(
            copy.deepcopy(plain), storage))), rtol=1e-4, atol=1e-5)  # fmt: skip
    with pytest.raises(drlora.ConfigError, match="stored in [48] bits"):
        models[0].merge_and_unload()


@pytest.mark.parametrize("family", ["llama4", "dbrx", "jetmoe"])
def test_packed_while_loading_they_are_what_packing_in_place_gives(family, tmp_path):
    base(family).save_pretrained(tmp_path / "base")
    config = drlora.QuantisedExperts("nf4")
    load = AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "base", dtype=torch.float32, quantization_config=config)
    wanted = quantise_experts(load(tmp_path / "base", dtype=torch.float32), "nf4")
    one, other = loaded.state_dict(), wanted.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(logits(loaded), logits(wanted))
    model = train(adapted(loaded))
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "base", dtype=torch.float32, quantization_config=config)
    read = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(read), logits(model))
