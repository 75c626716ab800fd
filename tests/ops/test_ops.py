"""Law 1: every engine equals the naive definition, in the output and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    FAST,
    assert_engines_agree,
    looped_grouped_mm,
    run,
)
from torch.nn import functional as F

from drlora.ops import (
    ExpertWeights,
    adapted_experts,
    as_matrix,
    choose_engine,
    grouped,
    stand_ins,
)
from drlora.ops.contract import LAYOUTS, change_layout, gelu_gate, make_case, silu_gate


@pytest.mark.parametrize("engine", FAST)
@settings(max_examples=40)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=2, max_size=6),
    tokens=st.integers(1, 20),
    top_k=st.integers(1, 2),
    seed=st.integers(0, 999),
)
@pytest.mark.filterwarnings("ignore:engine=")
def test_ragged_ranks_in_double_precision(engine, ranks, tokens, top_k, seed):
    case = make_case(ranks, dtype=torch.float64, tokens=tokens, top_k=top_k, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "grouped_mm", looped_grouped_mm)
        patch.setattr(grouped, "_DTYPES", (torch.float64,))
        assert_engines_agree(case, engine, tolerance=1e-11)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("ranks", [[3, 0, 9, 1, 4], [0, 0, 1, 0], [8, 8, 8]], ids=str)
def test_ragged_ranks_in_single_precision(engine, ranks):
    assert_engines_agree(make_case(ranks, tokens=30), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(
    "projections",
    [("up", "down"), ("gate", "up", "down"), ("gate_up",), ("down",), ("gate", "up"), ("gate",)],
    ids="+".join,
)
def test_projections(engine, projections):
    assert_engines_agree(make_case([3, 0, 5, 1], projections), engine)


@pytest.mark.parametrize("engine", FAST)
def test_all_tokens_on_one_expert(engine):
    assert_engines_agree(make_case([3, 4, 0], index=torch.ones(9, 1, dtype=torch.int64)), engine)


@pytest.mark.parametrize("engine", FAST)
def test_no_adapter_rank_at_all(engine):
    base, pieces, leaves, index = make_case([0, 0, 0])
    out = adapted_experts(leaves[0], index, leaves[1], base, pieces, engine=engine)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(grad.numel() == 0 for grad in grads[2:])
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.filterwarnings("ignore:engine=")
def test_odd_sizes(engine):
    assert_engines_agree(make_case([3, 2, 7], hidden=13, width=5, tokens=11), engine)


@pytest.mark.parametrize("engine", FAST)
def test_bfloat16(engine):
    case = make_case([3, 8, 1, 4], dtype=torch.bfloat16, hidden=32, width=16, tokens=20)
    assert_engines_agree(case, engine, tolerance=2e-2)


@pytest.mark.parametrize("engine", FAST)
def test_float32_routing_weights_on_bfloat16_experts(engine):
    base, pieces, leaves, index = make_case([3, 2, 4], dtype=torch.bfloat16)
    leaves[1] = leaves[1].detach().float().requires_grad_()
    assert_engines_agree((base, pieces, leaves, index), engine, tolerance=2e-2)


@pytest.mark.parametrize("engine", FAST)
def test_another_activation(engine):
    assert_engines_agree(make_case([3, 2, 4], gate=gelu_gate), engine)


@pytest.mark.parametrize("engine", FAST)
def test_dropout_draws_the_same_mask(engine):
    case = make_case([3, 2, 4])
    assert_engines_agree(case, engine, dropout=0.4)
    plain, dropped = run(engine, case), run(engine, case, dropout=0.4)
    assert not torch.allclose(plain[0], dropped[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.filterwarnings("ignore:engine=")  # the layouts that an engine cannot take
def test_layouts(engine, layout, dropout):
    projections = ("up", "down") if layout == "no gate" else ("gate", "up", "down")
    case = make_case([3, 0, 5, 1], projections, tokens=300)  # experts in more than one task
    assert_engines_agree(change_layout(case, layout), engine, dropout=dropout)


@pytest.mark.parametrize("layout", ["transposed", "apart", "lists"])
def test_the_layout_does_not_matter(layout):
    case = make_case([3, 0, 5, 1], dtype=torch.float64)
    same = change_layout(case, layout)
    for one, other in zip(run("naive", case), run("naive", same), strict=True):
        torch.testing.assert_close(one, other)


def test_naive_is_the_merged_weights():
    """The definition itself, against experts whose weights are W + s B A."""
    base, pieces, leaves, index = make_case([3, 0, 5, 1], ("gate", "up", "down"))
    out = adapted_experts(leaves[0], index, leaves[1], base, pieces, engine="naive")
    matrices = {"gate_up": base.gate_up_EGH.clone(), "down": base.down_EHI.clone()}
    for piece in pieces:
        for e in range(4):
            rows = slice(piece.offsets[e], piece.offsets[e + 1])
            update = piece.scaling * piece.b_RO[rows].T @ piece.a_RI[rows]
            matrices[piece.matrix][e, piece.columns] += update.detach()
    merged = ExpertWeights(*map(as_matrix, matrices.values()), silu_gate, is_silu=True)
    plain = adapted_experts(leaves[0], index, leaves[1], merged, [], engine="naive")
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["naive", "loop"])
def test_gradients_are_right_in_double_precision(engine):
    base, pieces, leaves, index = make_case([2, 0, 3], dtype=torch.float64, hidden=5, width=3,
                                            tokens=4)  # fmt: skip

    def function(x, weight, *factors):
        bound = [p._replace(a_RI=factors[2 * i], b_RO=factors[2 * i + 1])
                 for i, p in enumerate(pieces)]  # fmt: skip
        return adapted_experts(x, index, weight, base, bound, engine=engine)

    assert torch.autograd.gradcheck(function, tuple(leaves))


@pytest.mark.parametrize(
    ("engine", "layout", "said"),
    [
        ("grouped", "lists", "the weights of all experts are not one tensor. 'loop' computes"),
        ("loop", "norm", "have a norm after each, .* 'grouped' computes"),
    ],
)
def test_an_engine_that_cannot_run_is_told_of_once(engine, layout, said, monkeypatch):
    monkeypatch.setattr(stand_ins, "_TOLD", set())
    base = change_layout(make_case([3, 0, 5, 1]), layout)[0]
    with pytest.warns(UserWarning, match=rf"engine='{engine}' cannot run here: .*{said}"):
        choose_engine(engine, base)
    choose_engine(engine, base)  # a warning is an error
    choose_engine("auto", base)
