"""Engines are open: each that is registered is held to `naive`, and one of a user's own is chosen.

The engine of this file is one object; nothing in the package names it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_cases import run
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_model
from tiny_adapter import logits, make_settings, train

import drlora
from drlora.config.registry import ENGINES
from drlora.ops import Engine, choose_engine, register_engine, stand_ins
from drlora.ops.contract import change_layout, check_engine, make_case


def experts_by_token(x_TH, weight_TK, routing, base, pieces, masks):
    """One row after the other, with W + s B A of its expert formed; no dropout."""
    index_S = torch.empty_like(routing.order_S).scatter(0, routing.order_S, routing.expert_S)
    place_S = torch.empty_like(routing.order_S)
    place_S[routing.order_S] = torch.arange(len(place_S))

    def through(matrix, expert, x_I, mask_SI, row):
        out_O = base.linear(matrix, expert, x_I[None])[0]
        for piece in pieces:
            if piece.matrix == matrix:
                ranks = slice(piece.offsets[expert], piece.offsets[expert + 1])
                dropped_I = x_I if mask_SI is None else x_I * mask_SI[row]
                update = (dropped_I @ piece.a_RI[ranks].T @ piece.b_RO[ranks]) * piece.scaling
                out_O = out_O + piece.spread(update[None], len(out_O))[0]
        return out_O

    rows = []
    for token, weights in enumerate(weight_TK):
        total = torch.zeros_like(x_TH[token])
        for choice, weight in enumerate(weights):
            row = token * len(weights) + choice
            expert, place = int(index_S[row]), int(place_S[row])
            h_I = base.apply_gate(
                through("gate_up", expert, x_TH[token], masks.gate_up_SH, place)[None]
            )[0]
            y_H = base.finish(through("down", expert, h_I, masks.down_SI, place)[None])[0]
            total = total + (y_H * weight).to(total.dtype)
        rows.append(total)
    return torch.stack(rows)


BY_TOKEN = Engine("by-token", experts_by_token)


@pytest.fixture
def own():
    """Registered for one test."""
    engines = []

    def register(engine):
        engines.append(register_engine(engine))
        return engine

    yield register
    for engine in engines:
        ENGINES.remove(engine.name)


# `triton` computes on a GPU alone: tests/ops/test_triton.py.
@pytest.mark.parametrize("name", [name for name in ENGINES.names() if name != "triton"])
def test_engines_that_are_registered_keep_the_contract(name):
    refused = check_engine(ENGINES[name], (torch.float32, torch.bfloat16, torch.float64))
    assert len(refused) < 40 and (name != "naive" or not refused)


def test_the_contract_names_all_that_an_engine_refuses():
    assert set(check_engine(ENGINES["loop"], (torch.float32,))) == {
        "layout norm (torch.float32)", "layout norm, dropout (torch.float32)",
    }  # fmt: skip
    picky = Engine("picky", experts_by_token, lambda base: "it has no time")
    with pytest.raises(AssertionError, match="picky refused every case.*no time"):
        check_engine(picky)


def test_an_engine_from_outside_keeps_the_contract():
    assert check_engine(BY_TOKEN, (torch.float32,)) == {}


def without_weight_gradient(x_TH, weight_TK, *rest):
    return experts_by_token(x_TH, weight_TK.detach() + 0 * weight_TK, *rest)


def ignoring_ranks(x_TH, weight_TK, routing, base, pieces, masks):
    return experts_by_token(x_TH, weight_TK, routing, base, pieces[:1], masks)


def wide_output(*args):
    return experts_by_token(*args).double()


def without_dropout(*args):
    return experts_by_token(*args[:-1], type(args[-1])(None, None))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (without_weight_gradient, "dweight is off by"),
        (wide_output, "out is of torch.float64, not torch.float32"),
        (without_dropout, "case dropout.*out is off by"),
    ],
)
def test_the_contract_finds_what_is_wrong(broken, said):
    with pytest.raises(AssertionError, match=f"engine 'broken'.*{said}"):
        check_engine(Engine("broken", broken), (torch.float32,))


def test_the_contract_finds_an_adapter_that_is_left_out():
    with pytest.raises((AssertionError, RuntimeError), match="off by|not.*used in the graph"):
        check_engine(Engine("broken", ignoring_ranks), (torch.float32,))


def test_the_contract_leaves_the_seed_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    check_engine(ENGINES["loop"], (torch.float32,))
    assert torch.equal(torch.rand(3), wanted)


# Chosen by its name in a configuration.


def test_an_engine_from_outside_trains(own):
    with pytest.raises(drlora.ConfigError, match="engine='by-token' is not known"):
        make_settings(engine="by-token")
    calls = []

    def counted(*args):
        calls.append(len(args))
        return experts_by_token(*args)

    own(replace(BY_TOKEN, run=counted))
    found = []
    for engine in ("by-token", "naive"):
        torch.manual_seed(3)
        model = get_peft_model(make_model(), make_settings(engine=engine))
        assert isinstance(model, PeftModel)
        found.append(logits(train(model, steps=2)))
    assert calls
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_its_name_is_kept_in_the_saved_adapter(own, tmp_path):
    own(BY_TOKEN)
    get_peft_model(make_model(), make_settings(engine="by-token")).save_pretrained(tmp_path)
    assert drlora.DrLoraConfig.from_pretrained(tmp_path).engine == "by-token"


def test_under_torch_compile_another_takes_its_place_and_that_is_said(own, monkeypatch):
    monkeypatch.setattr(stand_ins, "_TOLD", set())
    own(BY_TOKEN)
    model = get_peft_model(make_model(), make_settings(engine="by-token")).eval()
    wanted = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    said = "engine='by-token' cannot run here.*'loop' computes"
    with pytest.warns(UserWarning, match=said), torch.no_grad():
        got = compiled(**make_batch(7)).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_what_it_refuses_is_computed_by_its_stand_in(own, monkeypatch):
    monkeypatch.setattr(stand_ins, "_TOLD", set())
    own(replace(BY_TOKEN, refuses=lambda base: "it is Sunday", stand_ins=("loop", "grouped")))
    base = make_case([3, 0, 5, 1]).base
    said = "engine='by-token' cannot run here: it is Sunday. 'loop' computes"
    with pytest.warns(UserWarning, match=said):
        assert choose_engine("by-token", base).name == "loop"
    assert choose_engine("by-token", base).name == "loop"  # said once: a warning is an error
    with_norm = change_layout(make_case([3, 0, 5, 1]), "norm").base
    with pytest.warns(UserWarning, match="Sunday; the experts have a norm.* 'grouped' computes"):
        assert choose_engine("by-token", with_norm).name == "grouped"


def test_where_nothing_stands_in_it_is_refused(own):
    own(replace(BY_TOKEN, refuses=lambda base: "it is Sunday", stand_ins=()))
    case = make_case([3, 0, 5, 1])
    with pytest.raises(drlora.ConfigError, match="'by-token' cannot.*Sunday.*engine='naive'"):
        run("by-token", case)


def test_names_that_cannot_be_registered(own):
    with pytest.raises(drlora.ConfigError, match="called 'auto'.*rename it"):
        register_engine(replace(BY_TOKEN, name="auto"))
    with pytest.raises(drlora.ConfigError, match="engine='loop' is registered already"):
        register_engine(replace(BY_TOKEN, name="loop"))
    with pytest.raises(drlora.ConfigError, match="engine='nobody' is not known; choose one of"):
        choose_engine("nobody", make_case([1, 1]).base)


def test_no_file_of_the_package_knows_this_engine():
    source = Path(drlora.__file__).parent
    assert not [p for p in source.rglob("*.py") if "by-token" in p.read_text("utf-8")]
