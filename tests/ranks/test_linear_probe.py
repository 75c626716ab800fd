"""Rows of A of ordinary LoRA along the gradient of their layer's weight (start_a=gradient-all)."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import checkpointing_arguments, make_batch, make_model
from transformers import Trainer, TrainingArguments

import drlora
from drlora import ConfigError, DrLoraConfig
from drlora.adapter.inject import adapted_layers

# Tiny batches leave some experts without a token.
pytestmark = pytest.mark.filterwarnings("ignore:.*matrices of experts have no gradient")

SCALE = 3.0


def adapted(seed=0, **settings):
    torch.manual_seed(seed)
    config = DrLoraConfig(
        **{"r_init": 2, "r_target": 4, "r_max": 8, "target_modules": "all-linear", "target_rank": 5}
        | {"options": {"start_a": "gradient-all", "start_a_scale": SCALE}} | settings
    )  # fmt: skip
    return get_peft_model(make_model(), config).train()


def linears_of(model):
    """Name in the base model -> PEFT's layer."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def true_gradients(batches, seed=0):
    """Name -> (O, I) of every linear layer outside of experts, from the base model itself."""
    torch.manual_seed(seed)
    model = make_model().train()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return {n: m.weight.grad for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def few_tokens(seed):
    """So few that no layer's gradient has more directions than a probe has rows."""
    return {key: value[:1, :5] for key, value in make_batch(seed).items()}


def test_rows_span_the_strongest_directions_of_each_layer():
    batches = [few_tokens(1), few_tokens(2)]
    model = adapted()
    drlora.place_ranks(model, batches)
    layers, gradients = linears_of(model), true_gradients(batches)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, layer in layers.items():
        a_RI = layer.lora_A["default"].weight.detach()
        length = 3**-0.5  # of a row that PEFT draws, as the root of its mean square
        torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(5) * length**2, atol=1e-4, rtol=0)
        g_OI = gradients[name]
        kept = (g_OI @ a_RI.T / length).square().sum()
        best = torch.linalg.svdvals(g_OI)[:5].square().sum()
        assert kept >= 0.85 * best, name
        assert not layer.lora_B["default"].weight.any()


def test_the_length_is_that_of_rows_that_peft_draws():
    norms = [
        layer.lora_A["default"].weight.square().sum(1)
        for seed in range(20)
        for layer in linears_of(adapted(seed)).values()
    ]
    mean = torch.cat(norms).mean().sqrt()
    torch.testing.assert_close(mean, torch.tensor(3**-0.5), rtol=0.02, atol=0)


def test_experts_have_the_rows_that_they_have_without():
    """What the other layers do changes nothing for experts, nor the other way round."""
    batches = [make_batch(seed) for seed in range(2)]
    everywhere = adapted()
    experts = adapted(options={"start_a": "gradient", "start_a_scale": SCALE})
    drawn = {n: m.lora_A["default"].weight.clone() for n, m in linears_of(experts).items()}
    for model in (everywhere, experts):
        drlora.place_ranks(model, batches)
    found, wanted = ((adapted_layers(model, "default")) for model in (everywhere, experts))
    for name, layer in wanted.items():
        for projection, pool in layer.adapter("default").rank_pools.items():
            other = found[name].adapter("default").rank_pools[projection]
            assert torch.equal(pool.lora_A, other.lora_A)
    for name, layer in linears_of(experts).items():
        assert torch.equal(layer.lora_A["default"].weight, drawn[name])


def test_it_leaves_no_trace():
    model, batch = adapted(lora_dropout=0.1).eval(), make_batch()
    before, state = model(**batch).logits, torch.get_rng_state()
    drlora.place_ranks(model, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(**batch).logits, before) and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in linears_of(model).values())
    meters = [x.adapter("default").meter for x in adapted_layers(model, "default").values()]
    assert not any(meter.num_tokens for meter in meters)


def test_a_layer_that_no_gradient_reaches_keeps_its_rows():
    """Such as one of a tower for images in batches of text."""
    torch.manual_seed(0)
    base = make_model()
    base.model.tower = torch.nn.Linear(8, 8)
    config = DrLoraConfig(r_init=2, r_target=4, r_max=8, target_modules=["q_proj", "tower"],
                          options={"start_a": "gradient-all"})  # fmt: skip
    model = get_peft_model(base, config)
    layers = linears_of(model)
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in layers.items()}
    drlora.place_ranks(model, [make_batch()])
    for name, layer in layers.items():
        kept = torch.equal(layer.lora_A["default"].weight, before[name])
        assert kept == (name == "model.tower")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_in_the_trainer_under_checkpointing(use_reentrant, tmp_path):
    model = adapted(r_init=4)
    before = {n: m.lora_A["default"].weight.clone() for n, m in linears_of(model).items()}
    data = [{key: value[0] for key, value in make_batch(seed).items()} for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-8,
        **checkpointing_arguments(use_reentrant=use_reentrant),
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[drlora.DrLoraCallback()]).train()
    for name, layer in linears_of(model).items():
        a_RI = layer.lora_A["default"].weight.detach()
        assert not torch.equal(a_RI, before[name])
        torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(5) / 3, atol=1e-3, rtol=0)


def test_without_other_layers_it_is_refused():
    with pytest.raises(ConfigError, match="gradient-all.*has no effect without target_modules"):
        DrLoraConfig(options={"start_a": "gradient-all"})
