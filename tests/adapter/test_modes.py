"""Checkpointing, generation, autocast, mixed precision and determinism, on real model classes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compiled_models import FAMILIES, assert_same, base_model, batch, meters
from compiled_models import start as start_of_layers
from peft import get_peft_model
from tiny import checkpoint_activations, plain_loop, trainable

import drlora
from drlora.adapter.inject import adapted_layers

ENGINES = ["naive", "loop", "grouped"]
start = partial(start_of_layers, layers=2)


def relative_error(model, twin):
    pairs = zip(trainable(model), trainable(twin), strict=True)
    return max(((one.grad - other.grad).norm() / other.grad.norm()).item() for one, other in pairs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_gradient_checkpointing(family, reentrant, engine):
    model, twin = start(family, engine=engine), start(family, engine=engine)
    checkpoint_activations(model.base_model.model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    calls = []
    layer = next(iter(adapted_layers(model, "default").values()))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for each in (model, twin):
        each(**batch()).loss.backward()
    assert len(calls) == 2, "nothing was computed again"
    assert_same(model, twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_cache(family):
    """The merged model's tokens, which are not the base model's; and none of it counts."""
    model = start(family).eval()
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    ids = batch()["input_ids"]
    cached, recomputed = (
        model.generate(input_ids=ids, use_cache=cache, **settings) for cache in (True, False)
    )
    assert cached.shape == (2, 20) and torch.equal(cached, recomputed)
    assert not torch.equal(cached, base_model(family).generate(ids, **settings))
    assert all(meter.num_tokens == 0 for meter in meters(model))
    assert torch.equal(cached, model.merge_and_unload().generate(ids, **settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_computes_experts_in_their_own_dtype(family, engine):
    """As transformers' default experts do: so merged weights give the same under autocast."""
    model, merged = start(family, engine=engine), start(family, engine=engine)
    merged = merged.merge_and_unload().train()
    seen = []
    layer = next(iter(adapted_layers(model, "default").values()))
    layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
        torch.testing.assert_close(loss, merged(**batch()).loss, rtol=2e-3, atol=2e-3)
    loss.backward()
    assert seen == [torch.float32]
    plain = start(family, engine=engine)
    plain(**batch()).loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable(model))
    # What differs is the rest of the model, which does run in bfloat16.
    assert 0 < relative_error(model, plain) < 0.1
    assert meters(model)[0].sum_E.dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES)
def test_backward_inside_autocast(engine):
    """Not what torch advises, but people do."""
    inside, outside = start(engine=engine), start(engine=engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside(**batch()).loss.backward()
        loss = outside(**batch()).loss
    loss.backward()
    assert relative_error(inside, outside) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_base_with_float32_adapters(family, engine):
    settings = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, engine=engine)
    models = []
    for dtype in (torch.bfloat16, torch.float32):
        base = base_model(family).to(torch.bfloat16).to(dtype)  # the same weights in both
        torch.manual_seed(0)
        model = get_peft_model(base, drlora.DrLoraConfig(**settings)).train()
        for index, parameter in enumerate(trainable(model)):
            torch.manual_seed(index)
            parameter.data.normal_(std=0.1)
        models.append(model)
    model, exact = models
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    optimizer = torch.optim.SGD(trainable(model), lr=1e-6)
    for each in models:
        each(**batch()).loss.backward()
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in trainable(model)} == {torch.float32}
    grads = [torch.cat([p.grad.flatten() for p in trainable(each)]) for each in models]
    assert torch.cosine_similarity(*grads, dim=0) > 0.95
    before = [parameter.detach().clone() for parameter in trainable(model)]
    optimizer.step()
    # A step far below bfloat16's spacing arrives, so the factors are really kept in float32.
    assert all(
        not torch.equal(now, then) for now, then in zip(trainable(model), before, strict=True)
    )


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_deterministic_mode(family, engine, deterministic):
    """Runs repeat to the bit with growth on the way, and nothing reads memory it did not write."""
    runs = []
    for strict in (True, True, False):
        torch.use_deterministic_algorithms(strict)
        model = start(family, engine=engine, grow_every=2, settle_steps=1, warmup_steps=1)
        dynamics = drlora.RankDynamics(model, total_steps=6)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        losses = plain_loop(model, dynamics, optimizer, range(6), batch)
        assert dynamics.event_steps and torch.tensor(losses).isfinite().all()
        runs.append((losses, dynamics.ranks(), [p.detach() for p in trainable(model)]))
    for losses, ranks, weights in runs[1:]:
        assert losses == runs[0][0] and ranks == runs[0][1]
        assert all(torch.equal(w, v) for w, v in zip(weights, runs[0][2], strict=True))
