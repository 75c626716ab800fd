"""The loss of the targets in chunks is the plain loss: every loss, every gradient, every family."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import FAMILIES, make_batch, make_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import drlora
from drlora.evaluation import head
from drlora.evaluation.choices import summed_losses
from drlora.evaluation.head import IGNORED, has_plain_head, losses_at_targets, target_losses

HIDDEN, VOCABULARY, TARGETS = 8, 40, 23


@pytest.fixture
def every_vocabulary(monkeypatch):
    """Tiny vocabularies are large enough."""
    monkeypatch.setattr(head, "LEAST_VOCABULARY", 1)


def numbers(dtype=torch.float32, count=TARGETS):
    torch.manual_seed(0)
    x_NH = torch.randn(count, HIDDEN).to(dtype).requires_grad_()
    weight_VH, bias_V = torch.randn(VOCABULARY, HIDDEN).to(dtype), torch.randn(VOCABULARY).to(dtype)
    return x_NH, weight_VH, bias_V, torch.randint(0, VOCABULARY, (count,)), torch.randn(count)


def plain(x_NH, weight_VH, bias_V, target_N):
    """The definition: all logits, in float32 for the loss."""
    logits_NV = F.linear(x_NH, weight_VH, bias_V).float()
    return F.cross_entropy(logits_NV, target_N, reduction="none")


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_losses_and_gradient_are_those_of_all_logits(monkeypatch, rows, dtype, has_bias):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", rows * 4 * VOCABULARY)
    x_NH, weight_VH, bias_V, target_N, grad_N = numbers(dtype)
    bias_V = bias_V if has_bias else None
    losses = [f(x_NH, weight_VH, bias_V, target_N) for f in (plain, target_losses)]
    wanted, found = (torch.autograd.grad(loss, x_NH, grad_N)[0] for loss in losses)
    assert found.dtype == wanted.dtype == dtype and losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    allowed = 1e-6 if dtype == torch.float32 else 8e-3  # both round to bfloat16, in another order
    assert (found.float() - wanted.float()).norm() <= allowed * wanted.float().norm()


def test_under_autocast_products_are_in_its_dtype():
    x_NH, weight_VH, bias_V, target_N, grad_N = numbers()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [f(x_NH, weight_VH, bias_V, target_N) for f in (plain, target_losses)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(losses[1], target_losses(x_NH, weight_VH, bias_V, target_N))
    wanted, found = (torch.autograd.grad(loss, x_NH, grad_N)[0] for loss in losses)
    assert found.dtype == torch.float32
    assert (found - wanted).norm() <= 8e-3 * wanted.norm()


def test_no_target_is_no_loss_and_a_gradient_of_zero():
    x_NH, weight_VH, _, target_N, _ = numbers(count=0)
    loss = target_losses(x_NH, weight_VH, None, target_N).sum()
    assert loss == 0 and torch.autograd.grad(loss, x_NH)[0].shape == (0, HIDDEN)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operator returned."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numbers = max(self.numbers, found.numel())
        return found


def test_logits_are_never_all_there(monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 3 * 4 * VOCABULARY)
    x_NH, *rest, grad_N = numbers()
    seen = {}
    for function in (plain, target_losses):
        with Largest() as largest:
            torch.autograd.grad(function(x_NH, *rest), x_NH, grad_N)
        seen[function] = largest.numbers
    assert seen[plain] == TARGETS * VOCABULARY
    # The head's weight, which is transposed; logits of three rows are less.
    assert seen[target_losses] == VOCABULARY * HIDDEN < TARGETS * VOCABULARY


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_the_loss_of_its_own_forward(family, every_vocabulary):
    model = make_model(family)
    for name, weight in model.named_parameters():
        weight.requires_grad_(model.get_output_embeddings().weight is not weight)
        assert name
    assert has_plain_head(model)
    batch = make_batch()
    batch["labels"][:, :7] = IGNORED
    batch["labels"][0, 9:] = IGNORED
    wanted = model(**batch, use_cache=False).loss
    found = losses_at_targets(model, batch["labels"], input_ids=batch["input_ids"])
    assert len(found) == (batch["labels"][:, 1:] != IGNORED).sum()
    torch.testing.assert_close(found.mean(), wanted)
    of_plain, of_chunks = gradients(model, wanted), gradients(model, found.mean())
    assert of_plain and of_plain.keys() == of_chunks.keys()
    for name, gradient in of_plain.items():
        torch.testing.assert_close(of_chunks[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def softcapped(model):
    """A model that does something to its logits, as some families do."""

    class Capped(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            if labels is not None:
                out.loss = self.loss_function(out.logits, labels, self.vocab_size)
            return out

    model.__class__ = Capped
    return model


def with_aux_loss():
    return make_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)


UNFIT = {
    "softcapping": lambda: softcapped(make_model()),
    "scaling": lambda: make_model("granitemoe", logits_scaling=2.0),
    "auxiliary loss": with_aux_loss,
    "float16": lambda: make_model().half(),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_model_with_another_loss_is_left_alone(what, every_vocabulary):
    model = UNFIT[what]().requires_grad_(False)
    assert not has_plain_head(model)
    assert has_plain_head(make_model().requires_grad_(False))


@pytest.mark.parametrize("what", ["trained", "adapted", "wrapped", "moved", "meta", "small"])
def test_a_head_that_is_more_than_a_matrix_is_left_alone(what, monkeypatch):
    monkeypatch.setattr(head, "LEAST_VOCABULARY", 10_000 if what == "small" else 1)
    model = make_model()
    settings = dict(r_init=1, r_target=2, r_max=4)
    if what == "trained":
        model.lm_head.weight.requires_grad_(True)
    elif what == "adapted":
        model.lm_head = nn.Sequential(model.lm_head)
        model.lm_head.weight = model.lm_head[0].weight
    elif what == "wrapped":
        config = drlora.DrLoraConfig(**settings, modules_to_save=["lm_head"])
        model = get_peft_model(model, config).get_base_model()
    elif what == "moved":
        model.lm_head.forward = model.lm_head.forward
    elif what == "meta":
        model = model.to("meta")
    if what != "trained":
        model.lm_head.requires_grad_(False)
    assert not has_plain_head(model)


def test_a_trial_leaves_no_trace(every_vocabulary):
    """Modes, hooks and the statistics of an adapter are as before; a copy is tried anew."""
    model = get_peft_model(make_model(), drlora.DrLoraConfig(r_init=1, r_target=2, r_max=4)).train()
    base = model.get_base_model()
    base.model.layers[0].eval()
    modes = {name: module.training for name, module in base.named_modules()}
    assert has_plain_head(base)
    assert {name: module.training for name, module in base.named_modules()} == modes
    assert not base.lm_head._forward_pre_hooks
    assert not any(layer.adapter("default").meter.num_tokens for layer in base.modules()
                   if isinstance(layer, drlora.adapter.layer.DrLoraExperts))  # fmt: skip
    assert has_plain_head(copy.deepcopy(base))


def test_evaluation_has_the_same_losses(monkeypatch):
    model = make_model().requires_grad_(False)
    batch = {**make_batch(), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    batch["labels"][:, :7] = IGNORED
    with torch.no_grad():
        wanted = summed_losses(model, batch)
        monkeypatch.setattr(head, "LEAST_VOCABULARY", 1)
        assert has_plain_head(model)
        found = summed_losses(model, batch)
    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
