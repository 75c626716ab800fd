"""Rows that wake up late step like an Adam of their own: whatever the optimizer's options are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model, plain_loop, trainable
from torch.utils._python_dispatch import TorchDispatchMode

import drlora
from drlora.ranks import young_rows
from drlora.ranks.young_rows import Clock, Cohort, OwnClocks, read_cohorts, young_spans

BIRTHS = torch.tensor([0, 0, 0, 3, 3, 5, 5, 5, 0, 0], dtype=torch.int32)
APART = torch.tensor([5, 0, 3, 3, 0, 5, 0, 3, 0, 0], dtype=torch.int32)
STEPS = 12


def make_pool(births, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(len(births), n, generator=generator).to(dtype) for n in (7, 5))
    return SimpleNamespace(
        lora_A=torch.nn.Parameter(a), lora_B=torch.nn.Parameter(b), birth=births.clone()
    )


def gradients(pool, step):
    """Zero in rows that are not born yet, as those of free rows are."""
    generator = torch.Generator().manual_seed(100 + step)
    alive_R1 = (pool.birth < step)[:, None]
    for parameter in (pool.lora_A, pool.lora_B):
        drawn = torch.randn(parameter.shape, generator=generator) + 1.0
        parameter.grad = (drawn * alive_R1).to(parameter.dtype)


def train(pool, make, clocks=None):
    optimizer = make([pool.lora_A, pool.lora_B])
    for step in range(1, STEPS + 1):
        gradients(pool, step)
        optimizer.step()
        if clocks is not None:
            clocks.correct(optimizer, [pool], step)
    return pool


def train_apart(births, make, dtype=torch.float32):
    """Every cohort with an Adam of its own that starts when it is born."""
    whole = make_pool(births, dtype)
    for birth in births.unique().tolist():
        rows = births == birth
        pool = make_pool(births, dtype)
        optimizer = make([pool.lora_A, pool.lora_B])
        for step in range(birth + 1, STEPS + 1):
            gradients(pool, step)
            optimizer.step()
        for name in ("lora_A", "lora_B"):
            getattr(whole, name).data[rows] = getattr(pool, name).data[rows]
    return whole


# Without weight decay, which would wear out rows before their birth (test_growth has that).
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-1, amsgrad=True),
    "maximize": lambda p: torch.optim.AdamW(p, lr=1e-1, weight_decay=0, maximize=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-1, weight_decay=0, fused=True),
    "tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-1), weight_decay=0),
    "large-eps": lambda p: torch.optim.Adam(p, lr=1e-1, eps=1.0),
    "betas": lambda p: torch.optim.Adam(p, lr=1e-1, betas=(0.0, 0.95)),
}


@pytest.mark.parametrize("block", [2**18, 8], ids=["one block", "a row at a time"])
@pytest.mark.parametrize("births", [BIRTHS, APART], ids=["in order", "apart"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_cohort_steps_like_an_adam_of_its_own(make, births, block, monkeypatch):
    monkeypatch.setattr(young_rows, "_CPU_BLOCK", block)
    found, wanted = train(make_pool(births), make, OwnClocks()), train_apart(births, make)
    shared = train(make_pool(births), make)
    for name in ("lora_A", "lora_B"):
        now, then, plain = (getattr(p, name).detach() for p in (found, wanted, shared))
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)
        assert torch.equal(now[births == 0], plain[births == 0]), "old rows are not touched"
        assert (now - plain)[births > 0].abs().min(dim=0).values.max() > 1e-3, "a real difference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scattered_rows_are_gathered_with_the_same_result_to_the_bit(make, dtype, monkeypatch):
    where_they_lie = train(make_pool(APART, dtype), make, OwnClocks())
    monkeypatch.setattr(young_rows, "_MOST_SPANS", 0)
    monkeypatch.setattr(young_rows, "_CPU_BLOCK", 21)  # three rows of lora_A at a time
    gathered = train(make_pool(APART, dtype), make, OwnClocks())
    for name in ("lora_A", "lora_B"):
        assert torch.equal(getattr(gathered, name), getattr(where_they_lie, name))


def test_in_bfloat16_the_correction_is_rounded_once_a_step():
    make, dtype = OPTIMIZERS["fused"], torch.bfloat16
    found = train(make_pool(BIRTHS, dtype), make, OwnClocks())
    wanted = train_apart(BIRTHS, make, dtype)
    # Adam rounds the weight, of size up to 4, and so does the correction, in each step.
    bound = 4 * torch.finfo(dtype).eps * STEPS / 2
    error = (found.lora_A - wanted.lora_A).abs().max()
    plain = (train(make_pool(BIRTHS, dtype), make).lora_A - wanted.lora_A).abs().max()
    assert error < bound / 2 < plain


def test_births_are_read_again_after_they_changed():
    pool, clocks = make_pool(torch.zeros(4, dtype=torch.int32)), OwnClocks()
    assert clocks._cohorts(0, pool.birth) == [Cohort(0, 4, 0)]
    pool.birth[2:] = 7
    assert clocks._cohorts(0, pool.birth) == [Cohort(0, 2, 0), Cohort(2, 4, 7)]
    pool.birth = torch.zeros(4, dtype=torch.int32)
    assert clocks._cohorts(0, pool.birth) == [Cohort(0, 4, 0)]


def test_young_rows_grow_up_when_their_bias_is_negligible():
    cohorts = read_cohorts(BIRTHS)
    assert cohorts == [Cohort(0, 3, 0), Cohort(3, 5, 3), Cohort(5, 8, 5), Cohort(8, 10, 0)]
    assert young_spans(cohorts, Clock(3, 0.9, 0.999, 1e-8)) == []
    assert young_spans(cohorts, Clock(4, 0.9, 0.999, 1e-8)) == [range(3, 5)]
    assert young_spans(cohorts, Clock(6, 0.9, 0.999, 1e-8)) == [range(3, 8)]
    assert young_spans(cohorts, Clock(9000, 0.9, 0.999, 1e-8)) == [range(3, 8)]
    # 0.999 ** 9206 is just below 1e-4: the first cohort is grown up at step 9209.
    assert young_spans(cohorts, Clock(9209, 0.9, 0.999, 1e-8)) == [range(5, 8)]
    assert young_spans(cohorts, Clock(9211, 0.9, 0.999, 1e-8)) == []


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for an accelerator: values, and shapes that hang on them."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed = {t.data_ptr() for t in allowed}
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim")
        if name in ("index", "index_put", "index_put_"):
            waits = any(t is not None and t.dtype == torch.bool for t in args[1])
        if waits and args[0].data_ptr() not in self.allowed:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def test_an_ordinary_step_never_makes_the_host_wait():
    settings = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=4, warmup_steps=1,
                    settle_steps=2)  # fmt: skip
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**settings))
    dynamics = drlora.RankDynamics(model, 15)  # events after steps 5, 9 and 13
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    plain_loop(model, dynamics, optimizer, range(6))  # one step with the new births
    model(**make_batch(6)).loss.backward()
    # On an accelerator our own count stands for the optimizer's.
    counts = [state["step"] for state in optimizer.state.values()]
    with NoWait(counts) as before:
        dynamics.before_optimizer_step()
    optimizer.step()
    with NoWait(counts) as after:
        dynamics.after_optimizer_step(optimizer)
    assert before.calls > 20 and after.calls > 20
    with pytest.raises(AssertionError, match="wait"), NoWait([]):
        torch.ones(3).nonzero()
