"""torch.compile: no graph break, eager's numbers, and growth without recompilation.

`aot_eager` runs what dynamo and AOTAutograd made of the model without compiling code for it, so
these tests are about what is traced; one test runs the default backend too. Models have one layer
where a second would be traced in the same way.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import torch._dynamo as dynamo
from compiled_models import (
    assert_same,
    base_model,
    batch,
    compiled,
    meters,
    padded_batch,
    start,
)
from op_cases import run
from peft import get_peft_model
from tiny import checkpoint_activations, plain_loop, trainable

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.moe.quantise import quantise_experts
from drlora.ops import TracedPiece, as_matrix, stand_ins, traced_experts
from drlora.ops.contract import gelu_gate, make_case
from drlora.ops.storage.packed import Packed, packed_format

# torch's own: dynamo makes an instance of each autograd function that it traces, and asks each
# tensor that comes in for its gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
]

METHODS = ["loop", "grouped"]
GROWING = dict(r_init=2, r_target=8, r_max=32, p_grow=0.05, grow_every=1, settle_steps=1,
               warmup_steps=1)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def graph_breaks():
    return sum(dynamo.utils.counters["graph_break"].values())


def graphs():
    return dynamo.utils.counters["stats"]["unique_graphs"]


# The operator alone, against the definition: it runs outside torch.compile too.


def run_traced(case, engine, free=3, dropout=0.0):
    """Output and gradients of `traced_experts`, with free rows at the end of each pool."""
    base, pieces, leaves, index = case
    traced, whole = [], []
    for piece in pieces:
        a, b = (
            torch.cat([f.detach(), torch.randn(free, f.shape[1]).to(f)]).requires_grad_()
            for f in (piece.a_RI, piece.b_RO)
        )
        whole += [a, b]
        bounds = torch.tensor(piece.offsets)
        traced.append(TracedPiece(piece.matrix, piece.start, a, b, bounds, piece.scaling))
    torch.manual_seed(1)
    out = traced_experts(leaves[0], index, leaves[1], base, traced, dropout=dropout, engine=engine)
    torch.manual_seed(2)
    grads = torch.autograd.grad(out, [*leaves[:2], *whole], torch.randn(out.shape, dtype=out.dtype))
    for grad in grads[2:]:
        assert (grad[len(grad) - free :] == 0).all(), "a free row has a gradient"
    return [out.detach(), *grads[:2], *(grad[: len(grad) - free] for grad in grads[2:])]


@pytest.mark.parametrize("engine", METHODS)
@pytest.mark.parametrize(
    ("ranks", "settings", "dropout", "tolerance"),
    [
        ([3, 0, 9, 1, 4], dict(tokens=30), 0.0, 2e-5),
        ([0, 0, 0], {}, 0.0, 2e-5),
        ([3, 4, 0], dict(index=torch.ones(9, 1, dtype=torch.int64)), 0.0, 2e-5),
        ([3, 2, 7], dict(hidden=13, width=5, tokens=11), 0.0, 2e-5),
        ([3, 0, 5, 1], dict(projections=("gate", "up", "down")), 0.0, 2e-5),
        ([3, 0, 5, 1], dict(projections=("down",)), 0.0, 2e-5),
        ([3, 2, 4], dict(gate=gelu_gate), 0.0, 2e-5),
        ([3, 2, 4], {}, 0.4, 2e-5),
        ([3, 2, 4], dict(dtype=torch.float64), 0.0, 1e-11),
        ([3, 8, 1, 4], dict(dtype=torch.bfloat16, hidden=32, width=16, tokens=20), 0.0, 2e-2),
    ],
    ids=["ragged", "no rank", "one expert", "odd sizes", "gate+up+down", "down", "gelu", "dropout",
         "float64", "bfloat16"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:engine=")  # sizes that grouped does not take
def test_operator_equals_naive(engine, ranks, settings, dropout, tolerance):
    case = make_case(ranks, **settings)
    wanted, got = run("naive", case, dropout), run_traced(case, engine, dropout=dropout)
    for w, g in zip(wanted, got, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        assert (g.double() - w.double()).norm() <= tolerance * w.double().norm().clamp(min=1e-12)


@pytest.mark.parametrize("grouped", [False, True], ids=METHODS)
def test_operator_keeps_what_it_tells_the_compiler(grouped):
    """Schema, fake kernels and autograd registration, by torch's own checks."""
    base, pieces, (x, *_), _ = make_case([3, 0, 4], hidden=16, tokens=8)
    ends = torch.tensor([2, 5, 8], dtype=torch.int32)
    piece = pieces[0]
    args = (x, [base.gate_up_EGH], ends, None, [piece.a_RI, piece.b_RO],
            [torch.tensor(piece.offsets)], base.gate_up.shape[1], "", "gate_up", [0], [1], [0.7],
            grouped)  # fmt: skip
    torch.library.opcheck(torch.ops.drlora.adapted_product.default, args)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["nf4-nested", "int8", "mxfp4", "fp8"])
@pytest.mark.parametrize("engine", METHODS)
def test_operator_on_packed_experts(engine, name, transposed):
    """To the bit what it is on the numbers that they stand for."""
    case = make_case([3, 8, 1, 4], hidden=128, width=64, tokens=20)
    bases = []
    for wide in (False, True):
        both = []
        for w in (case.base.gate_up_EGH, case.base.down_EHI):
            stored = w.transpose(1, 2).contiguous() if transposed else w
            packed = Packed.of(stored, packed_format(name))
            both.append(as_matrix(packed.wide() if wide else packed, transposed))
        bases.append(replace(case.base, gate_up=both[0], down=both[1]))
    got, wanted = (run_traced(case._replace(base=base), engine) for base in bases)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-5) if transposed else None
        assert transposed or torch.equal(g, w)


# Whole models.


@pytest.mark.parametrize(
    ("family", "method"),
    [("olmoe", "loop"), ("olmoe", "grouped"), ("qwen3_moe", "grouped"), ("mixtral", "loop"),
     ("gpt_oss", "grouped")],
)  # fmt: skip
def test_one_graph_with_eager_gradients_and_statistics(family, method):
    model, twin = start(family, engine=method), start(family, engine=method)
    call = compiled(model)
    for seed in (0, 1):
        loss, wanted = call(**padded_batch(seed)).loss, twin(**padded_batch(seed)).loss
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        loss.backward()
        wanted.backward()
    assert graph_breaks() == 0 and graphs() == 1
    assert_same(model, twin)
    assert meters(model)[0].num_tokens.item() == 2 * 21  # without the padding


@pytest.mark.parametrize("method", METHODS)
def test_packed_experts_are_in_the_graph(method):
    """Growth and all, without a new graph."""
    losses = []
    for wrap in (compiled, lambda model: model):
        torch.manual_seed(0)
        base = quantise_experts(base_model("olmoe", hidden_size=64, intermediate_size=64), "nf4")
        model = get_peft_model(base, drlora.DrLoraConfig(**GROWING, engine=method)).train()
        dynamics = drlora.RankDynamics(model, total_steps=8)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        losses.append(plain_loop(wrap(model), dynamics, optimizer, range(8), batch))
    assert graph_breaks() == 0 and graphs() == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(options={"routing_signal": "probability"}, router="train"),
        dict(lora_dropout=0.3, projections=["gate", "up", "down"]),
    ],
    ids=["trained router", "dropout"],
)
def test_settings_that_reach_into_the_graph(changes):
    model, twin = start(**changes), start(**changes)
    for call in (compiled(model), twin):
        torch.manual_seed(5)
        call(**batch()).loss.backward()
    assert graph_breaks() == 0 and graphs() == 1
    assert_same(model, twin)


def test_growth_does_not_recompile():
    """More events than dynamo's limit of recompilations, beyond which it would run eagerly.

    test_callback.py has growth in a compiled Trainer, on GPT-OSS too.
    """
    events = dynamo.config.recompile_limit + 3
    runs = []
    for wrap in (compiled, lambda model: model):
        model = start(layers=2, **GROWING)
        dynamics = drlora.RankDynamics(model, total_steps=events + 2)
        assert len(dynamics.event_steps) >= events
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        with dynamo.config.patch(error_on_recompile=True):
            losses = plain_loop(wrap(model), dynamics, optimizer, range(events + 2), batch)
        frequencies = [adapter.frequency for adapter in dynamics.adapters.values()]
        runs.append((losses, frequencies, dynamics.ranks(), dynamics.budget()))
    assert graphs() == 1 and graph_breaks() == 0
    (losses, frequencies, ranks, budget), (wanted, wanted_f, wanted_ranks, _) = runs
    assert ranks == wanted_ranks and budget[0] == budget[1]
    assert len({rank for block in ranks.values() for rank in block["down"]}) > 1, "ranks are even"
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frequencies, wanted_f, rtol=1e-4, atol=1e-5)


def test_layers_compiled_one_by_one_share_a_graph():
    """Compiling by layer, as for very deep models: no Python value may differ between layers."""
    layers = dynamo.config.recompile_limit + 2
    model, twin = start(layers=layers), start(layers=layers)
    for each in (model, twin):
        for number, layer in enumerate(adapted_layers(each, "default").values()):
            for pool in layer.adapter("default").rank_pools.values():
                pool.grant([(number + expert) % 3 for expert in range(6)], step=0)
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager")
    for call in (model, twin):
        call(**batch()).loss.backward()
    assert graphs() <= 2, "dynamo compiled the same code for several layers"
    assert dynamo.utils.counters["frames"]["ok"] == dynamo.utils.counters["frames"]["total"]
    assert_same(model, twin, tolerance=1e-4)  # errors add up over ten layers


def test_evaluation_is_compiled_and_does_not_count():
    model, twin = start().eval(), start().eval()
    call = compiled(model)
    with torch.no_grad():
        logits, wanted = call(**batch()).logits, twin(**batch()).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert graph_breaks() == 0
    model.train()
    with torch.no_grad():
        call(**batch())
    assert all(meter.num_tokens == 0 and not meter.sum_E.any() for meter in meters(model))
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(call(**batch()).logits, twin(**batch()).logits,
                                   rtol=1e-5, atol=1e-5)  # fmt: skip


def test_two_passes_in_one_backward_both_count():
    """As in preference losses."""
    model, twin = start(), start()
    for call in (compiled(model), twin):
        (call(**batch(0)).loss + call(**batch(1)).loss).backward()
    assert_same(model, twin)
    assert meters(model)[0].num_tokens.item() == 48


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_checkpointing_inside_the_graph(family):
    model, twin = start(family), start(family)
    checkpoint_activations(model.base_model.model, use_reentrant=False)
    # transformers' hook on the embeddings breaks the graph, and only re-entrant mode needs it.
    model.base_model.model.disable_input_require_grads()
    compiled(model)(**batch()).loss.backward()
    twin(**batch()).loss.backward()
    assert graph_breaks() == 0
    assert_same(model, twin)


def test_reentrant_checkpointing_breaks_no_more_than_the_frozen_base():
    frozen = base_model("olmoe", num_hidden_layers=1).train().requires_grad_(False)
    frozen.get_input_embeddings().requires_grad_(True)
    model, twin = start(), start()
    found = []
    for whole, inner in ((frozen, frozen), (model, model.base_model.model)):
        checkpoint_activations(inner, use_reentrant=True)
        inner.get_input_embeddings().requires_grad_(True)
        dynamo.reset()
        dynamo.utils.counters.clear()
        compiled(whole)(**batch()).loss.backward()
        found.append(graph_breaks())
    twin.get_input_embeddings().requires_grad_(True)
    twin(**batch()).loss.backward()
    assert found[1] <= found[0]
    assert_same(model, twin)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_base_with_float32_adapters(method):
    model, twin = (start(engine=method).to(torch.bfloat16) for _ in range(2))
    for each in (model, twin):
        for parameter in trainable(each):
            parameter.data = parameter.data.float()
    for call in (compiled(model), twin):
        call(**batch()).loss.backward()
    assert graph_breaks() == 0
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable(model))
    assert_same(model, twin, tolerance=2e-2)


def test_autocast():
    model, twin = start(), start()
    for call in (compiled(model), twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(**batch()).loss
        loss.backward()
    assert graph_breaks() == 0
    assert_same(model, twin)


def test_deterministic_mode(deterministic):
    runs = []
    for _ in range(2):
        model = start()
        compiled(model)(**batch()).loss.backward()
        runs.append([parameter.grad for parameter in trainable(model)])
        dynamo.reset()
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert all(torch.isfinite(grad).all() for grad in runs[0])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="the default backend needs a C++ compiler")
def test_the_default_backend():
    model, twin = start(layers=1), start(layers=1)
    for call in (compiled(model, "inductor"), twin):
        call(**batch()).loss.backward()
    assert graph_breaks() == 0
    assert_same(model, twin)


def test_an_engine_that_the_compiler_does_not_know_is_told_of_once(monkeypatch):
    """While it traces; the graph stays whole."""
    monkeypatch.setattr(stand_ins, "_TOLD", set())
    model, twin = start(engine="naive", layers=2), start(engine="naive", layers=2)
    call = compiled(model)
    with pytest.warns(UserWarning, match="engine='naive' cannot run here.*'loop' computes") as told:
        out = call(**batch())
    assert len(told) == 1
    assert graph_breaks() == 0
    call(**batch()).loss.backward()
    torch.testing.assert_close(out.logits, twin(**batch()).logits, rtol=1e-4, atol=1e-4)
