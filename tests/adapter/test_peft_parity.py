"""Law 2: uniform ranks with growth off equal PEFT's LoRA on `target_parameters`."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from peft_layout import PARAMETERS, peft_factors, to_pool_layout
from tiny import make_batch, make_model

import drlora
from drlora.adapter.inject import adapted_layers

RANK, ALPHA = 4, 8.0


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("engine", ["naive", "loop", "grouped"])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral"])
def test_loss_and_every_gradient_equal_pefts(family, engine, rslora):
    theirs = get_peft_model(
        make_model(family),
        LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=rslora,
                   target_parameters=[f"experts.{key}" for key in PARAMETERS.values()]),
    )  # fmt: skip
    ours = get_peft_model(
        make_model(family),
        drlora.DrLoraConfig(r_init=RANK, r_target=RANK, r_max=RANK, lora_alpha=ALPHA,
                            use_rslora=rslora, engine=engine),
    )  # fmt: skip
    pairs = peft_factors(theirs, RANK)
    layers = adapted_layers(ours, "default")
    assert len(pairs) == 2 * len(layers)
    for (block, projection), (a, b) in pairs.items():
        b.data.normal_(std=0.2)
        pool = layers[block].drlora_adapters["default"].pools[projection]
        a_pool, b_pool = to_pool_layout(a.data, b.data, layers[block].block.num_experts)
        pool.lora_A.data.copy_(a_pool)
        pool.lora_B.data.copy_(b_pool)
    losses = []
    for model in (theirs, ours):
        out = model.train()(**make_batch())
        out.loss.backward()
        losses.append(out.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for (block, projection), (a, b) in pairs.items():
        pool = layers[block].drlora_adapters["default"].pools[projection]
        wanted = to_pool_layout(a.grad, b.grad, layers[block].block.num_experts)
        for want, got in zip(wanted, (pool.lora_A.grad, pool.lora_B.grad), strict=True):
            assert (got - want).norm() / want.norm() < 1e-5, (block, projection)
