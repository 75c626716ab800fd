"""`auto` on an accelerator tries engines on the first batch: here on the CPU, with broken ones.

The mechanism does not know the device; only which kinds have candidates.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import checkpoint_activations, make_batch, make_model
from tiny_run import save_all

import drlora
from drlora.cli.main import main
from drlora.config.registry import ENGINES
from drlora.ops import Engine, adapted_experts, register_engine, trial
from drlora.ops.contract import cases, make_case
from drlora.ops.grouped import experts_grouped
from drlora.ops.loop.engine import experts_loop

CASE = dict(ranks=[3, 0, 9, 1], tokens=40, hidden=16, width=8)


class Broken(torch.autograd.Function):
    """One number of one row off, in the output or in its gradient alone."""

    @staticmethod
    def forward(ctx, x_TH, where):
        ctx.where = where
        return x_TH + (where == "output") * torch.eye(*x_TH.shape, dtype=x_TH.dtype)

    @staticmethod
    def backward(ctx, grad_TH):
        grad_TH = grad_TH.clone()
        grad_TH[3] *= 2 if ctx.where == "gradient" else 1
        return grad_TH, None


def off(where):
    def run(x_TH, *rest):
        if where == "output":
            return Broken.apply(experts_grouped(x_TH, *rest), where)
        return experts_grouped(Broken.apply(x_TH, where), *rest)

    return run


def raising(*_):
    raise RuntimeError("no kernel image is available for execution on the device\nand more")


def nan(*given):
    return experts_loop(*given) * float("nan")


def refusing(base):
    return "it is for other experts"


@pytest.fixture
def candidates(monkeypatch):
    """Engines tried on the CPU, by name; they are registered for one test."""
    mine = []

    def put(**runs):
        for name, run in runs.items():
            if name not in ENGINES:
                refuses = refusing if name == "refusing" else lambda base: None
                mine.append(register_engine(Engine(name, run, refuses)))
        monkeypatch.setattr(trial, "CANDIDATES", {"cpu": tuple(runs)})

    monkeypatch.setattr(trial, "_FOUND", {})
    yield put
    for engine in mine:
        ENGINES.remove(engine.name)


def run(case, engine="auto", **settings):
    base, pieces, leaves, index_TK = case
    out_TH = adapted_experts(
        leaves[0], index_TK, leaves[1], base, pieces, engine=engine, **settings
    )
    return [out_TH, *torch.autograd.grad(out_TH.sum(), leaves)]


class NoExpansion(torch.autograd.Function):
    """B is read as zeros, which shows in no output while it is zero."""

    @staticmethod
    def forward(ctx, b_RO):
        return torch.zeros_like(b_RO)

    @staticmethod
    def backward(ctx, grad_RO):
        return grad_RO


def without_expansion(x_TH, weight_TK, routing, base, pieces, masks):
    pieces = [piece._replace(b_RO=NoExpansion.apply(piece.b_RO)) for piece in pieces]
    return experts_grouped(x_TH, weight_TK, routing, base, pieces, masks)


def test_an_engine_is_tried_with_numbers_where_b_is_zero_yet(candidates):
    base, pieces, leaves, index_TK = make_case(**CASE)
    before = [piece.b_RO.detach().zero_().clone() for piece in pieces]
    candidates(blind=without_expansion, grouped=experts_grouped)
    with pytest.warns(UserWarning, match="'blind' is not used.*its output is off"):
        run((base, pieces, leaves, index_TK))
    assert set(trial.found().values()) == {"grouped"}
    assert all(torch.equal(p.b_RO, b) for p, b in zip(pieces, before, strict=True))


def test_cards_without_tensor_cores_in_triton_are_not_tried(monkeypatch):
    never = Engine("triton", raising, lambda base: None)
    monkeypatch.setattr(trial, "ENGINES", {"triton": never})
    call = SimpleNamespace(x_TH=SimpleNamespace(device=torch.device("cuda")), base=None)
    for capability, is_tried in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert trial._can("triton", call) == is_tried


def test_no_memory_for_a_trial_is_no_fault_of_an_engine(candidates, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    candidates(first=full, grouped=experts_grouped)
    with pytest.warns(UserWarning, match="no memory to try engines.*'grouped' computes, unchecked"):
        run(make_case(**CASE))
    assert set(trial.found().values()) == {"grouped"}


def test_the_definition_is_formed_without_tf32(candidates):
    seen = []

    def noting(*given):
        seen.append(torch.get_float32_matmul_precision())
        return experts_grouped(*given)

    candidates(noting=noting)
    torch.set_float32_matmul_precision("high")
    try:
        run(make_case(**CASE))
        assert seen[:-1] == ["highest"] * len(seen[:-1]) and seen[-1] == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (off("output"), "its output is off by"),
        (off("gradient"), "its dX is off by"),
        (raising, "it fails: RuntimeError: no kernel image is available"),
        (nan, "its output is off by nan"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_kernel_is_found_out_and_not_used(candidates, broken, said, dtype):
    candidates(broken=broken, grouped=None)
    case = make_case(**CASE, dtype=dtype)
    with pytest.warns(UserWarning, match=f"engine 'broken' is not used for .*{said}"):
        found = run(case)
    assert set(trial.found().values()) == {"grouped"}
    for mine, its in zip(found, run(case, "grouped"), strict=True):
        assert torch.equal(mine, its)
    run(case)  # found, and said, once: a warning is an error


def test_where_none_is_right_the_definition_computes(candidates):
    candidates(broken=raising, other=nan)
    case = make_case(**CASE)
    with pytest.warns(UserWarning, match="is not used"):
        found = run(case)
    assert set(trial.found().values()) == {"naive"}
    assert all(torch.equal(a, b) for a, b in zip(found, run(case, "naive"), strict=True))


def test_where_all_refuse_the_plain_choice_stands(candidates):
    candidates(refusing=experts_grouped)
    case = make_case(**CASE)
    assert all(torch.equal(a, b) for a, b in zip(run(case), run(case, "loop"), strict=True))
    assert not trial.found()


def slowly(function):
    def run(*given):
        torch.randn(1200, 1200) @ torch.randn(1200, 1200)
        return function(*given)

    return run


def test_the_faster_one_is_kept_and_the_log_says_so(candidates, caplog):
    candidates(slow=slowly(experts_loop), loop=None, refusing=experts_loop)
    with caplog.at_level("INFO", "drlora.ops.trial"):
        run(make_case(**CASE))
    (record,) = caplog.records
    said = record.getMessage()
    assert "loop computes (slow " in said and "refusing" not in said
    assert "4 experts 16 x 8" in said and "128 rows, rank 16" in said


def test_without_timing_the_first_that_is_right(candidates):
    candidates(slow=slowly(experts_loop), loop=None)
    torch.use_deterministic_algorithms(True)
    try:
        run(make_case(**CASE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(trial.found().values()) == {"slow"}


def test_each_shape_is_tried_once(candidates):
    calls = []

    def counted(*given):
        calls.append(len(given[0]))
        return experts_loop(*given)

    candidates(counted=counted)
    for tokens in (40, 39, 33, 40):  # up to 64 tokens of 2 experts each
        run(make_case(**{**CASE, "tokens": tokens}))
    assert len(calls) == 1 + trial.REPEATS + 4 and len(trial.found()) == 1
    run(make_case(**{**CASE, "tokens": 12}))
    run(make_case(**{**CASE, "ranks": [17, 0, 1, 1]}))
    assert len(trial.found()) == 3
    calls.clear()
    with torch.no_grad():  # no trial: what was found of the layer
        case = make_case(**{**CASE, "tokens": 300})
        adapted_experts(case.leaves[0], case.index_TK, case.leaves[1], case.base, case.pieces)
    assert calls == [300] and len(trial.found()) == 3


def test_all_cases_of_the_contract_pass_for_right_engines(candidates):
    """A trial refuses no engine that is right: a warning is an error."""
    candidates(loop=None, grouped=None)
    for dtype in (torch.float32, torch.bfloat16):
        for what, case, dropout in cases(dtype):
            run(case, dropout=dropout)
            assert what
    assert set(trial.found().values()) <= {"loop", "grouped"}


def test_a_trial_draws_nothing_and_leaves_no_gradient(candidates):
    candidates(loop=None)
    case = make_case(**CASE)
    torch.manual_seed(5)
    wanted = run(case, "loop", dropout=0.3)
    torch.manual_seed(5)
    found = run(case, dropout=0.3)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(leaf.grad is None for leaf in case.leaves)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_in_a_model_with_checkpointing(candidates, reentrant):
    """Gradients are those of the engine by name; nothing of the trial is counted as kept."""
    results = []
    for engine in ("loop", "auto"):
        candidates(loop=None)
        config = drlora.DrLoraConfig(r_init=1, r_target=2, r_max=4, engine=engine)
        model = get_peft_model(make_model(), config).train()
        if reentrant is not None:
            checkpoint_activations(model.get_base_model(), use_reentrant=reentrant)
            model.enable_input_require_grads()
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model(**make_batch()).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert trial.found() and results[0]
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its)


def test_a_resumed_run_has_the_engine_of_the_checkpoint(candidates, tmp_path, monkeypatch):
    candidates(slow=slowly(experts_loop), loop=None)
    recipe = save_all(tmp_path, training=dict(max_steps=12, save_steps=6))
    assert main(["train", str(recipe)]) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())["engines"]
    assert found == trial.found() and set(found.values()) == {"loop"}
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-6/trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["DrLoraCallback"]
    kept = kept[-1] if isinstance(kept, list) else kept
    # Ranks grew after it, and with them came shapes of their own.
    assert {} != kept["attributes"]["engines"].items() <= found.items()
    monkeypatch.setattr(trial, "_FOUND", {})
    trial.remember({**found, "elsewhere": "no such engine"})
    assert trial.found() == found


def test_on_the_cpu_there_are_no_candidates():
    run(make_case(**CASE))
    assert "cpu" not in trial.CANDIDATES and not trial.found()
