"""Rows and ranks filled up for 16-bit products: they count nothing, and few shapes are left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import assert_engines_agree, run
from torch.utils._python_dispatch import TorchDispatchMode

from drlora.ops.contract import make_case
from drlora.ops.loop import engine as loop
from drlora.ops.loop.filling import fill_ranks, fill_rows, fill_tasks, size_of
from drlora.ops.loop.tasks import cut
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import sort_by_expert

EXPERTS = 5


@pytest.fixture
def native(monkeypatch):
    """As on a processor with products of bfloat16 that pay at any size."""
    monkeypatch.setattr(loop, "_multiplies", lambda dtype: True)
    monkeypatch.setattr(loop, "PAYS_FROM", 0)


@given(st.integers(0, 5000), st.sampled_from([1, 4, 16]), st.sampled_from([1, 2, 4, 8]))
def test_a_size_holds_its_number_and_few_are_in_use(number, least, sizes):
    size = size_of(number, least, sizes)
    assert number <= size < number + max(least, number / sizes + 1)
    assert size == 0 if number == 0 else size % least == 0
    assert size_of(size, least, sizes) == size


@given(choices=st.lists(st.tuples(*[st.integers(0, EXPERTS - 1)] * 2), max_size=200))
def test_rows_keep_order_expert_and_mask_and_the_rest_points_past_the_end(choices):
    index_TK = torch.tensor(choices, dtype=torch.long).view(-1, 2)
    routing = sort_by_expert(index_TK, EXPERTS)
    mask_SH = torch.arange(index_TK.numel())[:, None]
    before = cut(routing.counts())
    after = fill_tasks(before, 4)
    filled, masks = fill_rows(routing, DropoutMasks(mask_SH, None), before, after)
    segments = [segment for task in after for segment in task.segments]
    for expert, count in enumerate(filled.counts()):
        assert count == sum(s.rows for s in segments if s.expert == expert)
    assert all(s.rows == size_of(s.rows, 4, 4) for s in segments)
    fills_F = filled.order_S == index_TK.numel()
    for name, before_S, after_F in [
        ("order", routing.order_S, filled.order_S),
        ("token", routing.token_S, filled.token_S),
        ("expert", routing.expert_S, filled.expert_S),
        ("mask", mask_SH, masks.gate_up_SH),
    ]:
        assert torch.equal(after_F[~fills_F], before_S), name
    assert ((filled.token_S >= 0) & (filled.token_S < max(len(choices), 1))).all()
    assert masks.down_SI is None


@given(ranks=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_ranks_keep_their_rows_among_zeros(ranks):
    offsets = [sum(ranks[:n]) for n in range(len(ranks) + 1)]
    rows = torch.arange(1.0, offsets[-1] + 1)[:, None]
    filled, place_R = fill_ranks(LoraPiece("down", 0, rows, rows, tuple(offsets), 1.0))
    assert filled.ranks == [size_of(rank, 16, 2) for rank in ranks]
    spread = torch.zeros(filled.offsets[-1], 1).index_copy_(0, place_R, rows)
    for expert, rank in enumerate(ranks):
        own = spread[filled.rows(expert)]
        assert torch.equal(own[:rank], rows[offsets[expert] : offsets[expert + 1]])
        assert not own[rank:].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("projections", [("gate_up", "down"), ("gate", "up", "down")], ids="+".join)
def test_filled_products_are_right_to_every_gradient(native, projections, dropout):
    index = torch.rand(150, 4).argsort(dim=1)[:, :2]
    case = make_case(
        [3, 17, 0, 2], projections, dtype=torch.bfloat16, hidden=32, tokens=150, index=index
    )
    assert_engines_agree(case, "loop", dropout=dropout, tolerance=2e-2)


def test_what_is_not_finite_stays_with_the_experts_of_its_row(native):
    """Token 0 goes to experts 0 and 1, so 2 and 3 must not learn of it."""
    index = torch.tensor([[0, 1]] + [[2, 3]] * 5 + [[0, 2]] * 2)
    base, pieces, leaves, index = make_case(
        [3, 5, 4, 2], dtype=torch.bfloat16, hidden=32, tokens=8, index=index
    )
    with torch.no_grad():
        leaves[0][0] = float("nan")
    _, *grads = run("loop", (base, pieces, leaves, index))
    for piece, number in zip(pieces, range(2, len(grads), 2), strict=True):
        for grad in grads[number : number + 2]:
            assert grad[piece.rows(0)].isnan().any()
            assert grad[piece.rows(2)].isfinite().all() and grad[piece.rows(3)].isfinite().all()


def test_few_shapes_are_multiplied_whatever_the_routing(native):
    def shapes_of(dtype):
        seen = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if "mm" in func.__name__:
                    of = tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))
                    seen.add((func.__name__, of))
                return func(*args, **(kwargs or {}))

        before = torch.get_num_threads()
        torch.set_num_threads(1)  # a mode watches its own thread
        try:
            for seed in range(6):
                torch.manual_seed(seed)
                index = torch.rand(300, 8).argsort(dim=1)[:, :2]
                case = make_case([3, 5, 8, 2, 9, 11, 4, 7], dtype=dtype, tokens=300, index=index)
                with Watch():
                    run("loop", case)
        finally:
            torch.set_num_threads(before)
        return len(seen)

    few, many = shapes_of(torch.bfloat16), shapes_of(torch.float32)
    assert few < 0.2 * many, (few, many)
