"""Law 6: training tokens count once; never evaluation, padding or recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import checkpoint_activations, make_batch, make_model

import drlora
from drlora.adapter import observe
from drlora.adapter.inject import adapted_layers
from drlora.adapter.observe import _warn_of_uncut_mask, real_tokens


def start(**changes):
    settings = dict(r_init=2, r_target=2, r_max=2)
    return get_peft_model(make_model(), drlora.DrLoraConfig(**{**settings, **changes})).train()


def meters(model):
    return [
        layer.drlora_adapters["default"].meter
        for layer in adapted_layers(model, "default").values()
    ]


def sums(model):
    return [(meter.sum_E.clone(), meter.num_tokens.item()) for meter in meters(model)]


def assert_same(one, other):
    for (sum_a, tokens_a), (sum_b, tokens_b) in zip(one, other, strict=True):
        assert tokens_a == tokens_b
        torch.testing.assert_close(sum_a, sum_b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_counts_once(reentrant):
    plain, checkpointed = start(), start()
    checkpoint_activations(checkpointed, use_reentrant=reentrant)
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(**make_batch()).loss.backward()
    assert sums(plain)[0][1] == 24
    assert_same(sums(plain), sums(checkpointed))
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_evaluation_and_passes_without_backward_do_not_count():
    model = start()
    model(**make_batch())  # training mode, but nothing is learned from it
    with torch.no_grad():
        model(**make_batch())
    model.eval()(**make_batch()).loss.backward()
    model.train()
    with model.disable_adapter():
        model(**make_batch())
    model.generate(make_batch()["input_ids"], max_new_tokens=2, do_sample=False)
    assert all(tokens == 0 and sum_E.abs().sum() == 0 for sum_E, tokens in sums(model))


def test_padding_does_not_count():
    model, padded = start(), start()
    batch = make_batch(length=8)
    model(**batch).loss.backward()
    pad = torch.zeros(2, 5, dtype=torch.int64)
    mask = torch.cat([torch.ones(2, 8), pad], dim=1).long()
    labels = torch.cat([batch["labels"], pad - 100], dim=1)
    ids = torch.cat([batch["input_ids"], pad], dim=1)
    padded(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert_same(sums(model), sums(padded))


def test_micro_batches_accumulate():
    whole, parts = start(), start()
    batch = make_batch(rows=4)
    whole(**batch).loss.backward()
    for half in (slice(0, 2), slice(2, 4)):
        parts(**{key: value[half] for key, value in batch.items()}).loss.backward()
    assert_same(sums(whole), sums(parts))


@pytest.mark.parametrize("signal", ["topk_weight", "probability", "count"])
def test_frequency_is_the_moving_average_of_the_mean_per_token(signal):
    model = start(options={"routing_signal": signal})
    dynamics = drlora.RankDynamics(model, total_steps=5)
    wanted = {name: torch.zeros(6) for name in dynamics.adapters}
    routed = {}

    def note(name):
        def hook(module, args, output):
            logits, weight, index = (t.detach() for t in output)
            if signal == "probability":
                routed[name] = logits.softmax(-1).mean(0)
            else:
                value = weight if signal == "topk_weight" else torch.ones_like(weight)
                routed[name] = torch.zeros(24, 6).scatter_add(1, index, value).mean(0)

        return hook

    inner = model.base_model.model
    for name, adapter in dynamics.adapters.items():
        inner.get_submodule(adapter.block.router_name).register_forward_hook(note(name))
    for step in range(3):
        model(**make_batch(step)).loss.backward()
        dynamics.before_optimizer_step()
        dynamics.after_optimizer_step()
        for name in wanted:
            wanted[name] = 0.9 * wanted[name] + 0.1 * routed[name]
    for name, adapter in dynamics.adapters.items():
        torch.testing.assert_close(adapter.frequency, wanted[name], rtol=1e-5, atol=1e-6)
        if signal == "count":
            assert adapter.frequency.sum().item() == pytest.approx(2 * (1 - 0.9**3), rel=1e-5)


def test_a_step_of_padding_alone_leaves_the_statistics():
    model = start()
    dynamics = drlora.RankDynamics(model, total_steps=5)
    model(**make_batch()).loss.backward()
    dynamics.before_optimizer_step()
    dynamics.after_optimizer_step()
    before = [adapter.frequency.clone() for adapter in dynamics.adapters.values()]
    model.zero_grad()
    batch = make_batch()
    model(input_ids=batch["input_ids"], labels=batch["labels"],
          attention_mask=torch.zeros_like(batch["input_ids"])).loss.backward()  # fmt: skip
    dynamics.before_optimizer_step()
    for adapter, frequency in zip(dynamics.adapters.values(), before, strict=True):
        assert torch.equal(adapter.frequency, frequency)


def test_a_copied_model_has_its_own_mask():
    model = start()
    twin = copy.deepcopy(model)
    batch = make_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 6:] = 0
    twin(**batch, attention_mask=mask).loss.backward()
    assert sums(twin)[0][1] == 12 and sums(model)[0][1] == 0


def masked(seed=0, real=6):
    """A batch, and the same with a mask that leaves `real` tokens of the second row."""
    batch = make_batch(seed)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, real:] = 0
    return {**batch, "attention_mask": mask}


def past_the_head(model, batch):
    """A loss that is computed around the outermost module, as trainers with a head of theirs do."""
    inner = model.get_base_model()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    hidden = inner.model(**inputs).last_hidden_state
    return inner.lm_head(hidden).square().mean()


def other_passes(model):
    """Calls with other masks of that size, each of which was once taken for that of the next."""
    flipped = masked()["attention_mask"].flip(0)
    with torch.no_grad():
        model(**make_batch(), attention_mask=flipped)
    model(**make_batch(), attention_mask=flipped)
    with pytest.raises(ValueError, match="specify"):
        model(attention_mask=flipped)
    with pytest.raises(IndexError):
        past_the_head(model, {"input_ids": torch.full((2, 12), 999), "attention_mask": flipped})


@pytest.mark.parametrize("batch", [masked(), make_batch()], ids=["masked", "no mask"])
def test_a_call_past_the_outermost_module_has_its_own_mask(batch):
    right, after = (
        start(options={"routing_signal": "count"}),
        start(options={"routing_signal": "count"}),
    )
    right(**batch).loss.backward()
    other_passes(after)
    past_the_head(after, batch).backward()
    assert_same(sums(right), sums(after))


def test_a_call_of_one_layer_has_no_mask_but_its_own():
    model = start()
    other_passes(model)
    inner = model.get_base_model().model
    hidden = torch.randn(2, 12, 32)
    rope = inner.rotary_emb(hidden, torch.arange(12)[None])
    for layer in inner.layers:
        hidden = layer(hidden, position_embeddings=rope, attention_mask=None)
    hidden.square().mean().backward()
    assert [tokens for _, tokens in sums(model)] == [24, 24]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("order", ["sum", "first", "last"])
def test_passes_with_masks_of_their_own_before_one_backward(order, reentrant):
    """What is computed again in the backward pass is counted with the mask it was computed with."""
    batches = [masked(1, real=3), masked(2, real=9)]
    apart, together = start(), start()
    checkpoint_activations(together, use_reentrant=reentrant)
    together.enable_input_require_grads()
    for batch in batches:
        apart(**batch).loss.backward()
    losses = [together(**batch).loss for batch in batches]
    together.eval()(**masked(3, real=1))
    together.train()
    if order == "sum":
        sum(losses).backward()
    else:
        for loss in losses if order == "first" else losses[::-1]:
            loss.backward()
    assert_same(sums(apart), sums(together))


def test_a_copy_made_in_the_middle_of_a_pass_is_in_none():
    model = start()
    copies = []
    layer = model.get_base_model().model.layers[1]
    hook = layer.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    with torch.no_grad():
        model(**masked())
    hook.remove()
    copies[0].get_base_model().model.layers[1]._forward_hooks.clear()
    past_the_head(copies[0], make_batch()).backward()
    assert sums(copies[0])[0][1] == 24


def test_a_mask_that_sequence_parallelism_left_whole_is_warned_of(monkeypatch, recwarn):
    """Once; and of none that fits, nor in one process, where such input is packed."""
    _warn_of_uncut_mask.cache_clear()
    whole, own = torch.ones(2, 12), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert real_tokens((whole,), 6) is None and not recwarn.list
    monkeypatch.setattr(observe, "are_several", lambda: True)
    assert real_tokens((whole, own), 6).tolist() == [1, 1, 0, 1, 0, 0]
    assert real_tokens((whole,), 7) is None and not recwarn.list
    with pytest.warns(UserWarning, match="4 times as long.*padding.*Pack"):
        assert real_tokens((whole,), 6) is None
    assert real_tokens((whole,), 6) is None and not recwarn.list


def test_no_hook_stays_after_unloading():
    model = start()
    model(**masked()).loss.backward()
    base = model.unload()
    for module in base.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called",
                     "_forward_pre_hooks_with_kwargs"):  # fmt: skip
            assert not getattr(module, kind)
        assert not [key for key in module.__dict__ if "drlora" in key]
