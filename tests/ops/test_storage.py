"""Storages of frozen experts: the plain ones, and one that only this file knows.

Eight bits with a scale for each row stand for any quantiser's format: what is stored is no tensor
of the experts' dtype, one expert is made wide at a time, and nothing can be merged into it. All
that it takes is a class and `register_storage`; nothing in the package names it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from op_cases import run
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_model
from tiny_adapter import logits, make_settings, train
from torch import nn

import drlora
from drlora.export.plan import make_plan
from drlora.ops import Apart, as_matrix, choose_engine, register_storage
from drlora.ops.contract import make_case
from drlora.ops.merge import add_update
from drlora.ops.storage import STORAGES, Storage


class Packed(nn.Module):
    """What a quantiser puts in the place of a parameter: (..., O, I) codes, (..., O, 1) scales."""

    def __init__(self, w):
        super().__init__()
        scale = w.float().abs().amax(-1, keepdim=True) / 127
        codes = (w.float() / scale).round().to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.dtype = w.dtype

    def wide(self):
        return (self.codes.float() * self.scale).to(self.dtype)


class EightBits(Storage):
    """Of `Packed`: one of all experts, or one for each."""

    fixed = "they are stored in 8 bits"

    def __init__(self, stored, transposed=False):
        several = isinstance(stored, (list, tuple))
        self.codes = [p.codes for p in stored] if several else stored.codes
        self.scales = [p.scale for p in stored] if several else stored.scale
        self.example = stored[0] if several else stored
        self.is_transposed = transposed

    @classmethod
    def recognises(cls, stored):
        items = stored if isinstance(stored, (list, tuple)) and stored else [stored]
        return all(isinstance(item, Packed) for item in items)

    @property
    def shape(self):
        outputs, inputs = self.codes[0].shape
        return (len(self.codes), *((inputs, outputs) if self.is_transposed else (outputs, inputs)))

    @property
    def dtype(self):
        return self.example.dtype

    @property
    def device(self):
        return self.example.codes.device

    @property
    def num_bytes(self):
        return sum(c.numel() + 4 * s.numel() for c, s in zip(self.codes, self.scales, strict=True))

    def read(self, expert, out=None):
        wide = (self.codes[expert].float() * self.scales[expert]).to(self.dtype)
        wide = wide.T.contiguous() if self.is_transposed else wide
        return wide if out is None else out.copy_(wide)


@pytest.fixture
def eight_bits():
    register_storage(EightBits)
    yield EightBits
    STORAGES.remove(EightBits)


def packed_case(case, layout):
    """(the case in 8 bits, the same case on the numbers that these stand for)."""
    base = case.base

    def both(w, kept="whole", transposed=False):
        stored = w.transpose(1, 2).contiguous() if transposed else w
        items = [Packed(stored)] if kept == "whole" else [Packed(w_OI) for w_OI in stored]
        packed = as_matrix(items[0] if kept == "whole" else items, transposed)
        wide = [item.wide() for item in items]
        if transposed:  # in the order of memory in which one expert is read
            wide = [w_EIO.transpose(1, 2).contiguous() for w_EIO in wide]
        return packed, as_matrix(wide[0] if kept == "whole" else wide)

    if layout in ("apart", "lists"):
        kept = "whole" if layout == "apart" else "lists"
        gates, ups = (both(half.clone(), kept) for half in base.gate_up_EGH.chunk(2, dim=1))
        first = [Apart(gate, up) for gate, up in zip(gates, ups, strict=True)]
        second = both(base.down_EHI, kept)
    else:
        turned = layout == "transposed"
        first, second = (both(w, transposed=turned) for w in (base.gate_up_EGH, base.down_EHI))
    return [
        case._replace(base=type(base)(gate_up, down, base.apply_gate, base.is_silu))
        for gate_up, down in zip(first, second, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["whole", "transposed", "apart", "lists"])
@pytest.mark.parametrize("engine", ["naive", "loop", "auto"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_packed_experts_are_those_that_they_stand_for(eight_bits, engine, layout, dtype, dropout):
    """Output and every gradient, to the bit."""
    case = make_case([3, 0, 9, 1], ("gate", "up", "down"), dtype, hidden=32, width=16, tokens=40)
    packed, wide = packed_case(case, layout)
    for name, got, wanted in zip(
        case.names, run(engine, packed, dropout), run(engine, wide, dropout), strict=True
    ):
        assert torch.equal(got, wanted), name


def test_grouped_products_of_packed_experts(eight_bits):
    """Made wide by ranges; output and every gradient, to the bit."""
    packed, wide = packed_case(make_case([3, 0, 5, 1], tokens=30), "whole")
    assert choose_engine("grouped", packed.base).name == "grouped"
    for got, wanted in zip(run("grouped", packed), run("grouped", wide), strict=True):
        assert torch.equal(got, wanted)


def test_what_no_storage_recognises_is_refused():
    with pytest.raises(drlora.ConfigError, match="kept as test_storage.Packed.*register_storage"):
        as_matrix(Packed(torch.randn(2, 4, 4)))


# A model, whose experts a quantiser has packed.


def pack(model, unpacked=None):
    """Both matrices of every experts module are packed; in `unpacked` they become what they say."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OlmoeExperts":
            for key in ("gate_up_proj", "down_proj"):
                packed = Packed(getattr(module, key).data)
                delattr(module, key)
                setattr(module, key, packed)
                if unpacked is not None:
                    unpacked.get_submodule(name).get_parameter(key).data = packed.wide()
    return model


@pytest.fixture
def models(eight_bits):
    """(packed, with the numbers that it stands for)."""
    wide = make_model()
    return pack(copy.deepcopy(wide), wide), wide


def adapted(base, **changes):
    torch.manual_seed(3)
    model = get_peft_model(base, make_settings(**changes))
    assert isinstance(model, PeftModel)
    return model


def test_training_with_growth_is_that_of_the_wide_model(models):
    packed, wide = (train(adapted(base)) for base in models)
    assert torch.equal(logits(packed), logits(wide))
    states = [drlora.adapter_state(model) for model in (packed, wide)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    codes = [p for n, p in packed.named_parameters() if n.endswith(".codes")]
    assert codes and all(p.dtype == torch.int8 and p.grad is None for p in codes)


def test_the_adapter_can_be_switched_off_and_loaded_again(models, tmp_path):
    plain = models[1](**make_batch(7)).logits
    packed = train(adapted(copy.deepcopy(models[0])))
    wanted = logits(packed)
    with packed.disable_adapter():
        torch.testing.assert_close(logits(packed), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, plain)
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(models[0], tmp_path)), wanted)


def test_nothing_is_merged_into_packed_experts(models, tmp_path):
    model = train(adapted(models[0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = logits(model)
    said = r"merged into model.layers.0.mlp.experts: they are stored in 8 bits"
    for attempt in (
        lambda: model.merge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: make_plan(model, "merged"),
    ):
        with pytest.raises(drlora.ConfigError, match=said):
            attempt()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(model), wanted)
    with pytest.raises(drlora.ConfigError, match="8 bits|as it was before"):
        make_plan(model, "peft")


def test_a_packed_model_without_its_storage_is_refused():
    with pytest.raises(drlora.ConfigError, match="gate_up_proj and down_proj, which it has not"):
        adapted(pack(make_model()))


def test_no_file_of_the_package_knows_this_storage():
    source = Path(drlora.__file__).parent
    assert not [p for p in source.rglob("*.py") if "EightBits" in p.read_text("utf-8")]


# The plain ones.


def matrices(transposed=False):
    """The same random numbers (E, O, I) in every plain storage."""
    torch.manual_seed(0)
    w = torch.randn(3, 4, 6)
    stored = w.transpose(1, 2).contiguous() if transposed else w.clone()
    whole, apart = as_matrix(stored.clone(), transposed), [h.clone() for h in w.chunk(2, dim=1)]
    return w, {
        "whole": whole,
        "list": as_matrix([one.clone() for one in stored], transposed),
        "apart": Apart(*map(as_matrix, apart)),
        "lists apart": Apart(*(as_matrix(list(half.clone())) for half in apart)),
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_plain_storages_say_the_same(transposed):
    w, found = matrices(transposed)
    for name, matrix in found.items():
        assert matrix.shape == (3, 4, 6) and matrix.dtype == w.dtype, name
        assert matrix.device == w.device and matrix.num_bytes == 4 * w.numel(), name
        assert matrix.is_plain and matrix.fixed is None, name
        for expert in range(3):
            out = torch.full((4, 6), torch.nan, dtype=torch.float64)
            assert matrix.read(expert, out) is out
            assert torch.equal(out, w[expert].double()), name
            assert torch.equal(matrix.read(expert), w[expert]), name
    assert torch.equal(found["whole"].dense(), w)
    assert all(found[name].dense() is None for name in ("list", "apart", "lists apart"))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_written_can_be_taken_back_to_the_bit(transposed):
    w, found = matrices(transposed)
    for name, matrix in found.items():
        kept = matrix.snapshot()
        matrix.write(1, torch.arange(24.0).view(4, 6))
        assert torch.equal(matrix.read(1), torch.arange(24.0).view(4, 6)), name
        assert torch.equal(matrix.read(0), w[0]) and torch.equal(matrix.read(2), w[2]), name
        matrix.restore(kept)
        assert all(torch.equal(matrix.read(expert), w[expert]) for expert in range(3)), name


def test_a_view_is_no_copy():
    stored = torch.randn(3, 4, 6)
    for matrix in (as_matrix(stored), as_matrix(list(stored))):
        assert matrix.read(2).data_ptr() == stored[2].data_ptr()
        assert [view.data_ptr() for view in matrix.views()] == [one.data_ptr() for one in stored]


def test_merging_asks_the_storage(eight_bits):
    packed, _ = packed_case(make_case([3, 2]), "whole")
    with pytest.raises(drlora.ConfigError, match="cannot be changed: they are stored in 8 bits"):
        add_update(packed.base, packed.pieces[0])
    assert choose_engine("auto", packed.base).name == "loop"
