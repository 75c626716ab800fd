"""The equations of the signals, against sums written out by hand (method: arXiv 2601.04823)."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from drlora.adapter import row_book as ranks
from drlora.ranks import directions as row_directions
from drlora.ranks import event as growth
from drlora.ranks import saliency, young_rows
from drlora.ranks.optimizer_rows import inherit_second_moment
from drlora.ranks.saliency import (
    RowSums,
    ema,
    expert_sums,
    rank_importance,
    routed_share,
    row_sums,
)


def sums_of(a, grad_a, b, grad_b):
    return RowSums(row_sums(a, grad_a), row_sums(b, grad_b), a.shape[1], b.shape[1])


def test_rank_importance_is_the_product_of_two_one_norms():
    a, grad_a = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    b, grad_b = torch.tensor([[0.5, 1.0, -1.0]]), torch.tensor([[2.0, -2.0, 1.0]])
    wanted = (abs(3.0) + abs(-8.0)) * (abs(1.0) + abs(-2.0) + abs(-1.0))
    assert rank_importance(sums_of(a, grad_a, b, grad_b)).item() == pytest.approx(wanted)


def test_trap_2_absolute_value_inside_the_sum_and_product_not_sum():
    """The released script takes |sum| and adds the two terms: both give 0 + 4 here, ours 4 * 4."""
    a, grad_a = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, -2.0]])
    b, grad_b = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]])
    assert rank_importance(sums_of(a, grad_a, b, grad_b)).item() == pytest.approx(4.0 * 4.0)


def test_ema():
    value = ema(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), beta=0.9)
    torch.testing.assert_close(value, torch.tensor([0.9 + 0.3, 1.8]))


def test_ema_skips_what_is_not_finite():
    previous = torch.tensor([1.0, 2.0, 3.0])
    poisoned = torch.tensor([float("nan"), float("inf"), 0.0])
    torch.testing.assert_close(ema(previous, poisoned, 0.5), torch.tensor([1.0, 2.0, 1.5]))


def test_a_step_without_tokens_has_no_share():
    assert routed_share(torch.zeros(3), torch.tensor(0.0)).isnan().all()


def test_expert_sums_leave_free_rows_out():
    owner = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    sums = expert_sums(torch.tensor([1.0, 100.0, 2.0, 4.0]), owner, 3)
    assert sums.tolist() == [2.0, 5.0, 0.0]


def in_row_order(values, owner, num_experts):
    """Sums of float32 values, one row after the other."""
    sums = np.zeros((num_experts, *values.shape[1:]), dtype=np.float32)
    for value, expert in zip(values, owner, strict=True):
        if expert >= 0:
            sums[expert] += value
    return sums


def wide(*shape):
    """Values of many sizes, whose sum depends on its order."""
    random = np.random.default_rng(0)
    return (random.standard_normal(shape) * 10.0 ** random.integers(-6, 6, shape)).astype("f4")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_sums_that_decide_growth_are_taken_in_the_order_of_rows(device):
    values, owner = wide(300), np.random.default_rng(1).integers(-1, 7, 300)
    wanted = in_row_order(values, owner, 7)
    assert not np.array_equal(wanted, in_row_order(values[::-1], owner[::-1], 7))
    got = expert_sums(torch.from_numpy(values).to(device), torch.from_numpy(owner).to(device), 7)
    assert np.array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_moments_of_young_rows_are_taken_in_the_order_of_rows(device):
    values, owner = np.abs(wide(300, 5)), np.random.default_rng(1).integers(-1, 7, 300)
    young = np.flatnonzero(owner == 3)[-2:].tolist() + np.flatnonzero(owner == 6)[-1:].tolist()
    older = owner.copy()
    older[young] = -1
    sums, counts = in_row_order(values, older, 7), np.bincount(older[older >= 0], minlength=7)
    moment = torch.from_numpy(values.copy()).to(device)
    state = {"exp_avg_sq": moment}
    rows, owners = torch.tensor(young).to(device), torch.from_numpy(owner).int().to(device)
    assert inherit_second_moment(torch.zeros(300, 5, device=device), state, owners, 7, rows)
    wanted = (sums / counts[:, None].astype("f4"))[owner[young]]
    assert np.array_equal(moment[rows].cpu().numpy(), wanted)


@pytest.mark.parametrize("module", [growth, ranks, row_directions, saliency, young_rows])
def test_no_sum_whose_order_a_device_may_choose(module):
    source = inspect.getsource(module)
    for name in ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "accumulate=True"):
        lines = [line for line in source.splitlines() if name in line and "`" not in line]
        assert not lines, lines


def test_saliency_is_penalised_by_rank():
    f, g = torch.tensor([0.5, 0.5]), torch.tensor([2.0, 2.0])
    value = saliency.saliency(f, g, torch.tensor([1, 3]), gamma=1.2)
    torch.testing.assert_close(value, torch.tensor([1 / 2**1.2, 1 / 4**1.2]))
