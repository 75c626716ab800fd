"""Growth under bitsandbytes' optimizers, whose moments have 8 bits."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model, plain_loop, trainable
from tiny_adapter import make_settings

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.ranks.eight_bits import numbers_of
from drlora.ranks.optimizer_rows import forget_rows, inherit_second_moment

optim = pytest.importorskip("bitsandbytes.optim")
KINDS = ["AdamW8bit", "Adam8bit", "PagedAdamW8bit", "AdamW32bit"]
STEPS = 14


def optimizer_of(kind, parameters, **changes):
    return getattr(optim, kind)(parameters, lr=2e-2, min_8bit_size=1, **changes)


def adapted(**changes):
    torch.manual_seed(0)
    model = get_peft_model(
        make_model(hidden_size=64, intermediate_size=64), make_settings(**changes)
    )
    return model


def pools_of(model):
    layers = adapted_layers(model, "default").values()
    return [pool for layer in layers for pool in layer.adapter("default").rank_pools.values()]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("allocation", ["grow", "prune"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_change_and_the_loss_falls(kind, allocation):
    """No warning of a missing second moment, and the budget is exact."""
    start = 6 if allocation == "prune" else 2
    model = adapted(allocation=allocation, r_init=start)
    dynamics = drlora.RankDynamics(model, STEPS)
    optimizer = optimizer_of(kind, trainable(model), weight_decay=0.01)
    losses = plain_loop(model, dynamics, optimizer, range(STEPS), lambda _: make_batch(0))
    assert losses[-1] < losses[0]
    mean = make_settings().r_target
    for pool in pools_of(model):
        assert int((pool.owner >= 0).sum()) == mean * pool.book.num_experts
    codes = {state["state2"].dtype for state in optimizer.state.values()}
    assert codes == {torch.float32 if kind == "AdamW32bit" else torch.uint8}


def test_claimed_rows_start_from_zero():
    """Whatever rounding has made of them while nobody owned them."""
    model = adapted()
    dynamics = drlora.RankDynamics(model, STEPS)
    optimizer = optimizer_of("AdamW8bit", trainable(model))
    claimed = 0
    for step in range(STEPS):
        owners = [pool.owner.clone() for pool in pools_of(model)]
        for pool in pools_of(model):
            pool.lora_B.data[pool.owner < 0] = 1e-6
        plain_loop(model, dynamics, optimizer, range(step, step + 1))
        for pool, before in zip(pools_of(model), owners, strict=True):
            new = (pool.owner >= 0) & (before < 0)
            claimed += int(new.sum())
            assert not pool.lora_B[new].any() and pool.lora_A[new].any(dim=1).all()
    assert claimed


def state_of(shape):
    """The state of an optimizer after two steps, and its parameter."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = optimizer_of("Adam8bit", [parameter])
    for _ in range(2):
        parameter.grad = torch.randn(shape)
        optimizer.step()
    return parameter, optimizer.state[parameter]


@pytest.mark.parametrize("width", [256, 96])
def test_young_rows_start_at_the_mean_of_their_experts(width):
    """Rows that share blocks of 256 with others change these by their codes' width at most."""
    parameter, state = state_of((6, width))
    with numbers_of(state, "state2") as numbers:
        before = numbers.clone()
    owner = torch.tensor([0, 0, 1, 1, 0, -1])
    assert inherit_second_moment(parameter, state, owner, 2, torch.tensor([4]))
    with numbers_of(state, "state2") as numbers:
        wanted = before[:2].mean(dim=0)
        assert (numbers[4] - wanted).abs().max() < 0.02 * before.max()
        others = [0, 1, 2, 3, 5]
        kept = numbers[others] - before[others]
        assert kept.abs().max() <= (0 if width == 256 else 0.02 * before.max())


def test_released_rows_are_forgotten():
    parameter, state = state_of((4, 256))
    forget_rows(parameter, state, torch.tensor([1, 2]))
    for name in ("state1", "state2"):
        with numbers_of(state, name) as numbers:
            assert not numbers[1:3].any() and numbers[0].any() and numbers[3].any()
