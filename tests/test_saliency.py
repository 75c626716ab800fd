"""The equations of the signals, against sums written out by hand (method: arXiv 2601.04823)."""

from __future__ import annotations

import pytest
import torch

from drlora.saliency import ema, expert_sums, rank_importance, routed_share, saliency


def test_rank_importance_is_the_product_of_two_one_norms():
    a, grad_a = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    b, grad_b = torch.tensor([[0.5, 1.0, -1.0]]), torch.tensor([[2.0, -2.0, 1.0]])
    wanted = (abs(3.0) + abs(-8.0)) * (abs(1.0) + abs(-2.0) + abs(-1.0))
    assert rank_importance(a, grad_a, b, grad_b).item() == pytest.approx(wanted)


def test_trap_2_absolute_value_inside_the_sum_and_product_not_sum():
    """The released script takes |sum| and adds the two terms: both give 0 + 4 here, ours 4 * 4."""
    a, grad_a = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, -2.0]])
    b, grad_b = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]])
    assert rank_importance(a, grad_a, b, grad_b).item() == pytest.approx(4.0 * 4.0)


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


def test_saliency_is_penalised_by_rank():
    f, g = torch.tensor([0.5, 0.5]), torch.tensor([2.0, 2.0])
    value = saliency(f, g, torch.tensor([1, 3]), gamma=1.2)
    torch.testing.assert_close(value, torch.tensor([1 / 2**1.2, 1 / 4**1.2]))
