"""The CPU engine's own ways: cut experts, several threads, 16-bit experts widened in a buffer."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from op_cases import assert_engines_agree, run

from drlora.ops import as_matrix
from drlora.ops.contract import make_case
from drlora.ops.loop import engine as loop
from drlora.ops.loop import tasks as loop_tasks


@pytest.fixture
def small_tasks(monkeypatch):
    """So small that a few tokens make many tasks, and a loaded expert is cut into parts."""
    monkeypatch.setattr(loop_tasks, "FEWEST_ROWS", 3)
    monkeypatch.setattr(loop_tasks, "MOST_ROWS", 4)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def skewed(tokens):
    """Most tokens go to expert 1, some to 2 and 0, none to 3."""
    return torch.tensor([[1, 2], [1, 0], [1, 2], [1, 0], [0, 1]])[torch.arange(tokens) % 5]


def test_tasks_cover_all_rows_in_order(small_tasks):
    counts = [0, 30, 1, 2, 0, 9, 3]
    segments = [segment for task in loop_tasks.cut(counts) for segment in task.segments]
    assert [segment.number for segment in segments] == list(range(len(segments)))
    for expert, count in enumerate(counts):
        own = [segment for segment in segments if segment.expert == expert]
        assert sum(segment.rows for segment in own) == count
        assert [segment.part for segment in own] == list(range(len(own)))
    assert [s.expert for s in segments] == sorted(s.expert for s in segments)
    assert max(segment.rows for segment in segments) <= 8


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("projections", [("gate_up", "down"), ("gate", "up", "down")], ids="+".join)
def test_cut_experts_on_threads(small_tasks, threads, projections, dropout):
    case = make_case([3, 5, 0, 2], projections, tokens=40, index=skewed(40))
    assert len(loop_tasks.cut([20, 40, 20, 0])) > 6
    assert_engines_agree(case, "loop", dropout=dropout)


def test_results_do_not_depend_on_which_thread_was_faster(small_tasks, threads):
    case = make_case([3, 5, 1, 2], tokens=200, index=skewed(200))
    wanted = run("loop", case)
    for _ in range(20):
        for got, want in zip(run("loop", case), wanted, strict=True):
            assert torch.equal(got, want)


def test_threads_leave_the_settings_of_others_alone(small_tasks):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run("loop", make_case([3, 5, 1, 2], tokens=40))
        seen = [torch.get_num_threads()]
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_reaches_the_caller(small_tasks, threads):
    def broken_gate(gate_up):
        raise ArithmeticError("no gate today")

    with pytest.raises(ArithmeticError, match="no gate today"):
        run("loop", make_case([3, 5, 1, 2], tokens=40, gate=broken_gate))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_makes_threads_of_its_own(small_tasks):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run("loop", make_case([3, 5, 1, 2], tokens=40))
        assert loop_tasks._pools
        child = os.fork()
        if child == 0:
            os._exit(len(loop_tasks._pools))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=["native", "widened"])
def sixteen_bit(request, monkeypatch):
    """As on a processor with 16-bit products, and on one without."""
    monkeypatch.setattr(loop, "_multiplies", lambda dtype: request.param == "native")
    monkeypatch.setattr(loop, "PAYS_FROM", 0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_with_and_without_products_of_their_own(
    sixteen_bit, small_tasks, threads, dtype
):
    case = make_case([3, 5, 0, 2], dtype=dtype, hidden=32, tokens=40, index=skewed(40))
    assert_engines_agree(case, "loop", tolerance=2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_widened_products_are_closer_to_the_truth_than_those_in_bfloat16(monkeypatch):
    """Only the ends are rounded, so the output is what bfloat16 can say of the exact one."""
    case = make_case([3, 5, 1, 2], dtype=torch.bfloat16, hidden=64, width=32, tokens=40)
    base, pieces, leaves, index = case
    exact = make_case([3, 5, 1, 2], dtype=torch.float64, hidden=64, width=32, tokens=40)
    exact_base = exact[0].__class__(
        as_matrix(base.gate_up_EGH.double()),
        as_matrix(base.down_EHI.double()),
        base.apply_gate,
        base.is_silu,
    )
    wide_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide_pieces = [
        piece._replace(a_RI=wide_leaves[2 + 2 * i], b_RO=wide_leaves[3 + 2 * i])
        for i, piece in enumerate(pieces)
    ]
    truth = run("naive", (exact_base, wide_pieces, wide_leaves, index))[0]
    errors = {}
    monkeypatch.setattr(loop, "PAYS_FROM", 0)
    for native in (True, False):
        monkeypatch.setattr(loop, "_multiplies", lambda dtype, native=native: native)
        errors[native] = (run("loop", case)[0].double() - truth).norm() / truth.norm()
    assert errors[False] < 0.6 * errors[True]


def test_the_processor_is_asked_which_products_it_has(monkeypatch):
    for able, wanted in ({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        loop._multiplies.cache_clear()
        assert loop.working_dtype(torch.zeros(1, dtype=torch.bfloat16)) == wanted
    loop._multiplies.cache_clear()
    assert loop.working_dtype(torch.zeros(1)) == torch.float32
    assert loop.working_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize(
    ("rows", "hidden", "width", "wanted"),
    [
        (16, 256, 256, torch.float32),
        (256, 256, 256, torch.bfloat16),
        (64, 1024, 1024, torch.bfloat16),
        (1, 128, 48, torch.float32),
        (1, 2048, 1024, torch.bfloat16),  # decoding: to widen it takes longer than all else
    ],
)
def test_small_experts_are_computed_in_float32(monkeypatch, rows, hidden, width, wanted):
    """Where to begin a product of 16 bits takes longer than it saves."""
    monkeypatch.setattr(loop, "_multiplies", lambda dtype: True)
    like = torch.zeros(1, dtype=torch.bfloat16)
    assert loop.working_dtype(like, loop.work_saved(rows, hidden, width)) == wanted


@pytest.mark.parametrize("width", [24, 40])
def test_the_engine_goes_by_the_rows_of_experts_that_have_any(monkeypatch, width):
    """Two of four experts have 10 rows each: (10 + 16) * 32 * width multiply-adds."""
    monkeypatch.setattr(loop, "_multiplies", lambda dtype: True)
    monkeypatch.setattr(loop, "PAYS_FROM", 26 * 32 * 32)
    taken = []
    plain = loop.working_dtype
    monkeypatch.setattr(
        loop, "working_dtype", lambda *given: taken.append(plain(*given)) or taken[-1]
    )
    index = torch.tensor([[0], [2]] * 10)
    case = make_case([2, 2, 2, 2], dtype=torch.bfloat16, hidden=32, width=width, tokens=20,
                     index=index)  # fmt: skip
    run("loop", case)
    assert taken == [torch.bfloat16 if width > 32 else torch.float32]
