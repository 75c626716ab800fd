"""Laws of a run that a device could break: the same bits again, also resumed, and skipped steps.

On the CPU other files hold them at length; here they are short, and run on a GPU too.
Run: make test ARGS="-m gpu"
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model, plain_loop, trainable
from tiny_adapter import make_settings

import drlora
from drlora.adapter.state import adapter_state

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS, CUT = 8, 4


def begin(device, dtype=torch.float32, state=None, tries=0):
    """The model, its optimizer, and the dynamics at the start or where the state was taken."""
    torch.manual_seed(0)
    base = make_model().to(dtype).to(device)
    # Of steps that may be left out, `tries` are put behind the last event.
    model = get_peft_model(base, make_settings(router="train", settle_steps=1 + tries)).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    if state is not None:
        weights, moments = state
        model.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(moments)
    dynamics = drlora.RankDynamics(model, STEPS + tries, step=CUT if state else 0)
    return model, optimizer, dynamics


def steps(model, optimizer, dynamics, numbers):
    """Losses of some steps."""

    def on_device(number):
        return {name: value.to(model.device) for name, value in make_batch(number).items()}

    return plain_loop(model, dynamics, optimizer, numbers, on_device)


def ends(model, dynamics):
    """All that is trained, and the ranks."""
    return {n: t.cpu() for n, t in adapter_state(model).items()}, dynamics.ranks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_repeats_and_resumes_to_the_bit(device, dtype):
    found = []
    for _ in range(2):
        model, optimizer, dynamics = begin(device, dtype)
        losses = steps(model, optimizer, dynamics, range(CUT))
        state = copy.deepcopy((adapter_state(model), optimizer.state_dict()))
        losses += steps(model, optimizer, dynamics, range(CUT, STEPS))
        found.append((losses, *ends(model, dynamics)))
        dynamics.release()
    model, optimizer, dynamics = begin(device, dtype, state)
    losses = steps(model, optimizer, dynamics, range(CUT, STEPS))
    found.append((found[0][0][:CUT] + losses, *ends(model, dynamics)))
    spent, stored = dynamics.budget()
    assert spent == stored
    (wanted_losses, wanted, ranks), *others = found
    assert len({rank for expert in ranks.values() for rank in expert}) > 1
    for losses, tensors, other_ranks in others:
        assert losses == wanted_losses and other_ranks == ranks
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_a_scaler_leaves_out_is_none(device):
    """Experts in float16: the first scale is too large, and halved until the numbers are finite."""
    tries = 60
    model, optimizer, dynamics = begin(device, torch.float16, tries=tries)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=1000)
    taken = 0
    for number in range(tries):
        batch = {name: value.to(model.device) for name, value in make_batch(number).items()}
        loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        dynamics.before_optimizer_step()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        is_skipped = scaler.get_scale() < before
        dynamics.after_optimizer_step(optimizer, skipped=is_skipped)
        optimizer.zero_grad()
        taken += not is_skipped
        if taken == STEPS:
            break
    assert taken == STEPS == dynamics.step and dynamics.skipped == number + 1 - STEPS > 0
    assert dynamics.budget()[0] == dynamics.budget()[1]
    assert all(p.isfinite().all() for p in trainable(model))
