"""The check of an export: right in every dtype and at any depth, and able to fail."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import get_peft_model
from tiny import FAMILIES, make_batch, make_model

import drlora
import drlora.adapter.layer
from drlora.adapter.inject import adapted_layers
from drlora.errors import CheckpointError
from drlora.export import peft_lora as peft_format
from drlora.export.float32 import in_float32
from drlora.export.formats import per_expert
from drlora.export.make import Made
from drlora.export.plan import apply_plan, make_plan
from drlora.export.reference import Deviation
from drlora.ops.merge import Rounding

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sizes of B: what an adapter does to the logits is a few per mille of them, or most of them.
MILD, STRONG = 1e-3, 0.2


def adapted(dtype, std, layers=2, family="olmoe", **changes):
    """A model of many layers with an adapter of random rows."""
    base = make_model(family, num_hidden_layers=layers).to(dtype)
    torch.manual_seed(1)
    config = drlora.DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.5, **changes)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(std * torch.randn(parameter.shape))
    return model.eval()


def export(model, folder, format, **more) -> Made:
    return apply_plan(make_plan(model, format), model, BATCHES, folder, **more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [MILD, STRONG])
@pytest.mark.parametrize("format", ["peft", "per-expert", "merged"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_a_right_export_of_a_deep_model_passes(tmp_path, dtype, std, format):
    found = export(adapted(dtype, std, layers=30), tmp_path / "out", format).difference
    assert found.of_weight_effect < 1e-5 and found.error < 1e-5
    assert found.effect < 0.05 if std == MILD else found.effect > 0.2


def without_expert(piece, layer="model.layers.1.mlp.experts", expert=2):
    """What is left of a piece when one expert of one layer is forgotten."""
    b_RO = piece.b_RO.clone()
    b_RO[piece.offsets[expert] : piece.offsets[expert + 1]] = 0
    return piece._replace(b_RO=b_RO)


DEFECTS = {
    "a dropped expert": lambda piece, name: (
        without_expert(piece) if name == "model.layers.1.mlp.experts" else piece
    ),
    "a dropped down projection": lambda piece, name: piece if piece.matrix != "down" else None,
    "the scale twice": lambda piece, name: piece._replace(scaling=2 * piece.scaling),
    "nothing merged": lambda piece, name: None,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [MILD, STRONG])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_merge_with_a_defect_is_refused(tmp_path, monkeypatch, dtype, std, rounding, defect):
    add = drlora.adapter.layer.add_update

    def broken(base, piece, how, name):
        piece = DEFECTS[defect](piece, name)
        if piece is not None:
            add(base, piece, how, name)

    monkeypatch.setattr("drlora.adapter.layer.add_update", broken)
    with pytest.raises(CheckpointError, match=r"does not do what the adapter does: expert \d of"):
        export(adapted(dtype, std), tmp_path / "out", "merged", rounding=Rounding(rounding))
    assert not list(tmp_path.iterdir())


def changed(updates, defect):
    """The contents of an export with the same defects."""
    experts = dict(updates.experts)
    for name, factors in updates.experts.items():
        b = list(factors.b)
        if defect == "a dropped expert" and name == "model.layers.1.mlp.experts.down_proj":
            b[2] = torch.zeros_like(b[2])
        elif defect == "a dropped down projection" and name.endswith("down_proj"):
            b = [torch.zeros_like(b_Or) for b_Or in b]
        elif defect == "the scale twice":
            b = [2 * b_Or for b_Or in b]
        elif defect == "two experts exchanged" and name.startswith("model.layers.1."):
            b[0], b[1] = b[1], b[0]
        experts[name] = dataclasses.replace(factors, b=tuple(b))
    return dataclasses.replace(updates, experts=experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [MILD, STRONG])
@pytest.mark.parametrize("format", ["peft", "per-expert"])
@pytest.mark.parametrize(
    "defect",
    ["a dropped expert", "a dropped down projection", "the scale twice", "two experts exchanged"],
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_a_lora_with_a_defect_is_refused(tmp_path, monkeypatch, dtype, std, format, defect):
    attach, read_back = peft_format.attach, per_expert.read_back
    monkeypatch.setattr(peft_format, "attach", lambda b, u: attach(b, changed(u, defect)))
    monkeypatch.setattr(per_expert, "read_back", lambda b, u: read_back(b, changed(u, defect)))
    model = adapted(dtype, std)  # of equal ranks: what belongs to one expert fits another
    with pytest.raises(CheckpointError, match=r"does not do what the adapter does: expert \d of"):
        export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["modules", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defects_beside_the_experts_are_refused(tmp_path, monkeypatch, target, dtype):
    changes = dict(router="train") if target == "modules" else dict(target_modules=["q_proj"])
    changes |= dict(target_rank=2) if target == "linear" else {}
    model = adapted(dtype, STRONG, **changes)
    if target == "modules":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".modules_to_save." in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    attach = peft_format.attach

    def broken(base, updates):
        linears = {n: dataclasses.replace(f, b=(0 * f.b[0],)) for n, f in updates.linears.items()}
        modules = {n: {k: x + 0.01 for k, x in s.items()} for n, s in updates.modules.items()}
        return attach(base, dataclasses.replace(updates, linears=linears, modules=modules))

    monkeypatch.setattr(peft_format, "attach", broken)
    with pytest.raises(CheckpointError, match="mlp.gate" if target == "modules" else "q_proj"):
        export(model, tmp_path / "out", "peft")


def test_a_weight_that_is_no_number_is_the_worst():
    found = Deviation()
    for where, error in (("small", 1e-9), ("none", float("nan")), ("large", 0.5)):
        found.add(where, torch.tensor([error]), torch.tensor([1.0]))
    assert found.where == "none" and not found.is_rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_an_adapter_that_does_nothing(tmp_path, dtype, format):
    made = export(adapted(dtype, 0.0), tmp_path / "out", format)
    assert made.difference.effect < 1e-6 and made.difference.error < 1e-6
    assert made.notes == ["the adapter changes nothing: every B is zero, as before training"]
    json.loads((tmp_path / "out" / "drlora_export.json").read_text())


class TestRounding:
    def test_what_it_costs_is_told(self, tmp_path):
        """A mild update is smaller than the last bit of most weights."""
        made = {
            mode: export(
                adapted(torch.bfloat16, MILD, layers=6), tmp_path / mode, "merged",
                rounding=Rounding(mode),
            )
            for mode in ("nearest", "stochastic")
        }  # fmt: skip
        for mode, found in made.items():
            record = json.loads((tmp_path / mode / "drlora_export.json").read_text())
            assert record["rounding"] == found.rounding and record["rounding"]["mode"] == mode
            assert any(f"rounding to bfloat16 ({mode})" in note for note in record["notes"])
        nearest, stochastic = (made[m].rounding for m in ("nearest", "stochastic"))
        assert nearest["unmoved"] > 0.5 and abs(nearest["kept"] - 1) > 0.02
        assert abs(stochastic["kept"] - 1) < abs(nearest["kept"] - 1) / 2
        assert stochastic["seed"] == 0 and nearest["seed"] is None

    def test_in_float32_there_is_none(self, tmp_path):
        assert export(adapted(torch.float32, MILD), tmp_path / "out", "merged").rounding is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_stochastic_is_right_on_average(self, dtype):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(200_000, generator=generator).to(dtype)
        update = 1e-4 * torch.randn(200_000, generator=generator, dtype=torch.float64)
        exact = weight.double() + update
        kept = {}
        for mode in ("nearest", "stochastic"):
            moved = Rounding(mode)(exact, dtype, "x").double() - weight.double()
            kept[mode] = (moved @ update / (update @ update)).item()
        assert abs(kept["stochastic"] - 1) < 0.1 < abs(kept["nearest"] - 1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_stochastic_takes_one_of_the_two_neighbours(self, dtype):
        exact = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).double()
        rounded = Rounding("stochastic")(exact, dtype, "x").double()
        gap = (exact - rounded).abs() / exact.abs()
        assert gap.max() < torch.finfo(dtype).eps and rounded.ne(exact.to(dtype)).any()
        assert torch.equal(Rounding("stochastic")(rounded, dtype, "x").double(), rounded)

    def test_the_same_place_and_seed_give_the_same(self):
        exact = torch.randn(100, generator=torch.Generator().manual_seed(1)).double()
        one, again = (Rounding("stochastic", 3)(exact, torch.bfloat16, "x") for _ in range(2))
        assert torch.equal(one, again)
        for other in (
            Rounding("stochastic", 4)(exact, torch.bfloat16, "x"),
            Rounding("stochastic", 3)(exact, torch.bfloat16, "y"),
        ):
            assert not torch.equal(one, other)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_ends_of_the_range(self, dtype):
        largest = torch.finfo(dtype).max
        values = torch.tensor(
            [0.0, float("inf"), -float("inf"), largest, -largest], dtype=torch.float64
        )
        assert torch.equal(Rounding("stochastic")(values, dtype, "x").double(), values)
        assert Rounding("stochastic")(values.new_tensor([float("nan")]), dtype, "x").isnan()


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_in_float32_from_16_bits(family):
    """As if the whole model were in float32; and afterwards it is as before."""
    model = make_model(family).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), in_float32(model):
        found = model(IDS, use_cache=False).logits
    wide = make_model(family).to(torch.bfloat16).float()
    with torch.no_grad():
        assert torch.equal(found, wide(IDS, use_cache=False).logits)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {tensor.dtype for tensor in after.values()} == {t.dtype for t in before.values()}


def test_what_fails_in_float32_leaves_the_model_as_it_was():
    model = adapted(torch.bfloat16, STRONG)
    with pytest.raises(ZeroDivisionError), in_float32(model):
        layer = next(iter(adapted_layers(model, "default").values()))
        layer.register_forward_pre_hook(lambda *_: 1 / 0)
        model(IDS)
    assert layer.base_weights.dtype == torch.bfloat16
