"""Formats of few bits: what is packed and read back, and that engines compute with it exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from op_cases import run
from torch import nn

import drlora
from drlora.ops import as_matrix, choose_engine, grouped
from drlora.ops.contract import TOLERANCES, make_case
from drlora.ops.loop import engine as loop_engine
from drlora.ops.loop.engine import working_dtype
from drlora.ops.storage import by_bitsandbytes, fp8, mxfp4, nf4
from drlora.ops.storage.four_bits import codes_between
from drlora.ops.storage.packed import FORMATS, Packed, packed_format

NAMES = ["nf4", "nf4-nested", "int8", "mxfp4", "fp8"]
# Largest relative error on normal numbers, by arithmetic of the formats, and bits a number.
ERRORS = {"nf4": 0.095, "nf4-nested": 0.097, "int8": 0.009, "mxfp4": 0.13, "fp8": 0.028}
BITS = {"nf4": 4.5, "nf4-nested": 4.14, "int8": 8.13, "mxfp4": 4.25, "fp8": 8.01}


def matrices(dtype=torch.float32, experts=3, outputs=128, inputs=256, seed=0):
    w = torch.randn(experts, outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05
    return w.to(dtype)


def test_all_formats_are_here():
    assert sorted(FORMATS) == sorted(NAMES)
    with pytest.raises(drlora.ConfigError, match="storage 'nf5' is not known; choose one of"):
        packed_format("nf5")


@pytest.mark.parametrize("name", NAMES)
def test_error_and_bits(name):
    w = matrices()
    packed = Packed.of(w, packed_format(name))
    assert packed.shape == w.shape and packed.wide().dtype == w.dtype
    assert (packed.wide() - w).norm() < ERRORS[name] * w.norm()
    assert 8 * as_matrix(packed).num_bytes / w.numel() < BITS[name] + 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_rounded_once(name, dtype):
    """In 16 bits an expert reads as it does in float32, rounded."""
    packed = Packed.of(matrices(dtype), packed_format(name))
    wide = torch.empty(packed.shape[1:])
    for expert in range(3):
        packed.kind.decode(packed.parts_of(expert), wide)
        assert torch.equal(packed.wide()[expert], wide.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_and_what_was_read_once(name):
    """Numbers that a format has are kept: packing twice changes nothing more."""
    w = matrices()
    w[1, 5] = 0
    once = Packed.of(w, packed_format(name)).wide()
    assert not once[1, 5].any() and once.isfinite().all()
    twice = Packed.of(once, packed_format(name)).wide()
    torch.testing.assert_close(twice, once, rtol=1e-3, atol=1e-6)


def naive_nf4(w_OI):
    """One number after the other: the nearest code of |number / largest of its 64|."""
    code, out = torch.tensor(nf4.CODES), torch.empty_like(w_OI)
    for row, out_row in zip(w_OI, out, strict=True):
        for first in range(0, len(row), 64):
            block = row[first : first + 64]
            scale = block.abs().max()
            nearest = (block[:, None] * (1 / scale) - code).abs().argmin(dim=1)
            out_row[first : first + 64] = code[nearest] * scale
    return out


def test_nf4_is_the_nearest_code():
    w = matrices(outputs=8, inputs=128, experts=1)
    assert torch.equal(Packed.of(w, nf4.Nf4()).wide()[0], naive_nf4(w[0]))


@pytest.mark.parametrize("bounds", [nf4.BOUNDS, mxfp4._BOUNDS], ids=["nf4", "mxfp4"])
def test_codes_are_how_many_bounds_lie_below(bounds):
    """Of numbers at, next to and between the bounds, of zeros, the largest and the smallest."""
    at = torch.tensor(bounds)
    up, down = (torch.nextafter(at, torch.full_like(at, to)) for to in (9.0, -9.0))
    some = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45, 7.0])
    numbers = torch.cat([at, up, down, -at, some, torch.randn(1024 * 1024)])
    numbers = numbers[: len(numbers) // 32 * 32].view(-1, 32)
    wanted = (numbers[..., None] > at).sum(dim=-1).to(torch.uint8)
    assert torch.equal(codes_between(numbers, bounds), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_bytes_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = matrices(dtype)
    packed = Packed.of(w, nf4.Nf4())
    for expert, w_OI in enumerate(w):
        codes, state = functional.quantize_4bit(
            w_OI.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=False
        )
        parts = packed.parts_of(expert)
        assert torch.equal(parts["codes"].view(-1), codes.view(-1))
        assert torch.equal(parts["scale"].view(-1), state.absmax)
        assert torch.equal(packed.wide()[expert], functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", list(by_bitsandbytes._ON_CPU), ids=str)
@pytest.mark.parametrize("name", ["nf4", "nf4-nested"])
def test_bitsandbytes_reads_what_torch_reads(name, dtype, monkeypatch):
    pytest.importorskip("bitsandbytes")
    assert by_bitsandbytes.filler(dtype, "cpu") is not None
    packed = Packed.of(matrices(dtype), packed_format(name))
    got = packed.wide()
    monkeypatch.setattr(nf4, "filler", lambda *_: None)
    assert torch.equal(got, packed.wide())


def test_bitsandbytes_that_reads_other_numbers_is_not_used(monkeypatch, caplog):
    """A stand-in that fills zeros."""
    kind = torch.float32
    monkeypatch.setattr(by_bitsandbytes, "find_spec", lambda _: True)
    monkeypatch.setattr(by_bitsandbytes, "import_module", lambda _: None)
    monkeypatch.setattr(by_bitsandbytes, "_on_cpu", lambda _: lambda *parts: parts[2].zero_())
    assert by_bitsandbytes.filler.__wrapped__(kind, "cpu") is None
    assert "reads other numbers than it should here" in caplog.text


def test_mxfp4_numbers_are_those_of_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = Packed.of(matrices(torch.bfloat16), mxfp4.Mxfp4())
    blocks, scales = packed.parts["blocks"], packed.parts["scales"]
    theirs = convert_moe_packed_tensors(blocks.data, scales.data)
    assert torch.equal(theirs.transpose(1, 2), packed.wide())


def test_fp8_numbers_are_codes_times_tiles():
    w = matrices(experts=1, outputs=200, inputs=300)
    packed = Packed.of(w, fp8.Fp8())
    codes, scale = packed.parts["codes"][0].float(), packed.parts["scale"][0]
    assert scale.shape == (2, 3)
    for row, column in ((0, 0), (127, 128), (199, 299)):
        wanted = codes[row, column] * scale[row // 128, column // 128]
        assert packed.wide()[0, row, column] == wanted


@pytest.mark.parametrize(("name", "width"), [("nf4", 96), ("nf4-nested", 32), ("mxfp4", 48)])
def test_rows_that_blocks_do_not_divide_are_refused(name, width):
    with pytest.raises(drlora.ConfigError, match=f"as {name}: {width} numbers a row are no mult"):
        Packed.of(torch.randn(2, 4, width), packed_format(name))


# Engines on them.


def packed_case(name, dtype, transposed):
    """(the case packed, the same case on the numbers that these stand for)."""
    case = make_case([3, 0, 9, 1], ("gate", "up", "down"), dtype, hidden=128, width=64, tokens=40)
    base, both = case.base, []
    for w in (base.gate_up_EGH, base.down_EHI):
        stored = w.transpose(1, 2).contiguous() if transposed else w
        packed = Packed.of(stored, packed_format(name))
        wide = packed.wide()
        wide = wide.transpose(1, 2).contiguous() if transposed else wide
        both.append((as_matrix(packed, transposed), as_matrix(wide)))
    (first, first_wide), (second, second_wide) = both
    kind = type(base)
    return [
        case._replace(base=kind(gate_up, down, base.apply_gate, base.is_silu))
        for gate_up, down in ((first, second), (first_wide, second_wide))
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ["naive", "loop"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_experts_are_those_that_they_stand_for(name, engine, dtype, transposed, monkeypatch):
    """Output and every gradient, to the bit, with dropout.

    Numbers are rounded in another order where scales are put on the product, and later where a
    processor multiplies in float32 alone: then they agree as engines do.
    """
    packed, wide = packed_case(name, dtype, transposed)
    is_late = name == "int8" and not transposed
    assert is_late == (packed.base.down.late_scales() is not None)
    monkeypatch.setattr(loop_engine, "PAYS_FROM", 0)
    is_other = engine == "loop" and (is_late or working_dtype(packed.leaves[0]) != dtype)
    for what, got, wanted in zip(
        packed.names, run(engine, packed, 0.3), run(engine, wide, 0.3), strict=True
    ):
        off = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert off < TOLERANCES[dtype] if is_other else torch.equal(got, wanted), what


def test_products_in_float16_take_no_late_scale(monkeypatch):
    """Codes of up to 127 in the place of small numbers would run over."""
    monkeypatch.setattr(loop_engine, "working_dtype", lambda like, saved: like.dtype)
    packed, wide = packed_case("int8", torch.float16, False)
    packed.leaves[0].data *= 0.01
    for what, got, wanted in zip(packed.names, run("loop", packed), run("loop", wide), strict=True):
        assert got.isfinite().all() and torch.equal(got, wanted), what


@pytest.mark.parametrize("budget", [1, 3 * 128 * 128 * 4, 2**28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_grouped_products_make_ranges_of_experts_wide(name, dtype, budget, monkeypatch):
    """To the bit, however many experts are wide at once."""
    monkeypatch.setattr(grouped, "WIDE_BYTES", budget)
    packed, wide = packed_case(name, dtype, False)
    assert choose_engine("grouped", packed.base).name == "grouped"
    for what, got, wanted in zip(
        packed.names, run("grouped", packed, 0.3), run("grouped", wide, 0.3), strict=True
    ):
        assert torch.equal(got, wanted), what


@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_autograd_keeps_no_wide_expert(engine):
    """What is saved for the backward pass has no matrix of an expert in it."""
    packed, _ = packed_case("nf4", torch.float32, False)
    kept = set()

    def note(tensor):
        kept.add(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(engine, packed)
    expert = {"gate_up": 2 * 64 * 128, "down": 128 * 64}
    assert kept and not kept & {n * size for n in (1, 4) for size in expert.values()}


def test_a_module_that_changes_its_dtype_keeps_its_scales():
    model = nn.Sequential(Packed.of(matrices(), nf4.Nf4()))
    before = {name: part.clone() for name, part in model[0].parts.items()}
    model.to(torch.bfloat16)
    assert model[0].dtype == torch.bfloat16 and as_matrix(model[0]).dtype == torch.bfloat16
    for name, part in model[0].parts.items():
        assert part.dtype == before[name].dtype and torch.equal(part, before[name])
    again = copy.deepcopy(model)
    assert torch.equal(again[0].wide(), model[0].wide())
    assert {"0.codes", "0.scale"} == set(model.state_dict())
