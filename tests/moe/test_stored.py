"""`packed_config`: quantised checkpoints keep their experts' bytes, or are refused by name."""

from __future__ import annotations

import json
from functools import partial

import pytest
import stored_checkpoints as files
import torch
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_class, make_model
from tiny_adapter import logits, make_settings, train
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

import drlora
from drlora.moe.stored import FORMS, quantizer
from drlora.moe.stored.refused import REFUSED
from drlora.ops.storage import as_matrix, nf4
from drlora.ops.storage.arranged import PackedPair, is_in_place
from drlora.ops.storage.packed import Packed
from drlora.runs.export import export_adapter

WIDE = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
LATENT = dict(q_lora_rank=64, kv_lora_rank=64)
INT8 = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": True,
    "llm_int8_skip_modules": ["lm_head", "gate"],
}
# What a checkpoint is -> (how it is written, its quantization_config, the storage).
KINDS = {
    "nf4": (files.bnb, files.bnb_settings(), "nf4"),
    "nested": (partial(files.bnb, nested=True), files.bnb_settings(nested=True), "nf4-nested"),
    "llm.int8": (files.llm_int8, INT8, "int8"),
    "fp8": (files.fp8_blocks, files.FP8_SETTINGS, "fp8"),
    "fp8 ue8m0": (partial(files.fp8_blocks, scale="ue8m0"), files.FP8_SETTINGS, "fp8"),
    "fp8 bytes": (partial(files.fp8_blocks, scale="bytes"), files.FP8_SETTINGS, "fp8"),
    "int8 rows": (files.int8_rows, files.compressed_settings(), "int8"),
    "mxfp4": (files.mxfp4, files.MXFP4_SETTINGS, "mxfp4"),
}
FAMILIES = ["olmoe", "qwen3_moe", "mixtral", "deepseek_v3"]
CASES = [(family, kind) for family in FAMILIES for kind in KINDS if kind != "mxfp4"]
CASES += [("gpt_oss", "mxfp4")]
NO_BNB = "ignore:bitsandbytes is not installed"


def base(family="olmoe", **changes):
    torch.manual_seed(0)
    if family == "gpt_oss":
        return make_class("GptOssForCausalLM", hidden_size=64, intermediate_size=64, **changes)
    latent = LATENT if family.startswith("deepseek") else {}
    return make_model(family, **{**WIDE, **latent, **changes})


def checkpoint(folder, family="olmoe", kind="nf4", plain=files.PLAIN, **changes):
    """(its folder as a string, what is written in it)"""
    quantise, settings, _ = KINDS[kind]
    base(family, **changes).to(torch.bfloat16).save_pretrained(folder)
    written = files.rewrite(folder, quantise, settings, plain)
    return str(folder), written


def load(name, storage=None, **settings):
    config = drlora.packed_config(name, storage)
    return AutoModelForCausalLM.from_pretrained(name, config=config, **settings)


def packed_matrices(model):
    """Full name -> the packed matrix of all experts."""
    pairs = [name for name, m in model.named_modules() if isinstance(m, PackedPair)]
    return {
        name: module
        for name, module in model.named_modules()
        if is_in_place(module) and name.rpartition(".")[0] not in pairs
    }


@pytest.mark.filterwarnings(NO_BNB)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_experts_keep_the_bytes_of_the_checkpoint(family, kind, tmp_path):
    name, written = checkpoint(tmp_path, family, kind)
    loaded = load(name, dtype=torch.bfloat16)
    found = packed_matrices(loaded)
    assert len(found) == 2 * sum(".experts" in n and n.endswith("act_fn") for n, _ in
                                 loaded.named_modules()) or family == "gpt_oss"  # fmt: skip
    assert {m.kind.name for m in found.values()} == {KINDS[kind][2]}
    here = [p.data for m in found.values() for p in m.parameters()]
    held = b"".join(bytes(p.contiguous().view(torch.uint8).flatten().tolist()) for p in here)
    for key, tensor in written.items():
        is_codes = ".experts." in key and key.endswith(("weight", "_blocks", "_scales"))
        if is_codes and not key.startswith(tuple(FORMS)) and "shared" not in key:
            assert bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) in held, key
    assert all(not p.requires_grad for m in found.values() for p in m.parameters())


@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, k) for f, k in CASES if k.startswith("fp8") or k == "mxfp4"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_its_numbers_are_those_that_transformers_reads(family, kind, dtype, tmp_path):
    """Which makes 16 bits of all of it on a CPU."""
    name, _ = checkpoint(tmp_path, family, kind)
    loaded = load(name, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    for full, matrix in packed_matrices(loaded).items():
        wanted = plain.get_parameter(full)
        found = matrix.wide()
        found = found.transpose(1, 2) if family == "gpt_oss" else found
        assert found.dtype == dtype and torch.equal(found, wanted), full
    for full, parameter in loaded.named_parameters():
        if ".experts." not in full or full.endswith("bias"):
            assert parameter.dtype == dtype, full
            assert torch.equal(parameter.float(), plain.get_parameter(full).float()), full


@pytest.fixture
def without_bnb(monkeypatch):
    """Also where it is installed."""
    monkeypatch.setattr(quantizer, "is_bitsandbytes_available", lambda: False)


@pytest.mark.filterwarnings(NO_BNB)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_model_computes_what_its_numbers_say(family, kind, tmp_path, without_bnb):
    name, _ = checkpoint(tmp_path, family, kind)
    loaded = load(name, dtype=torch.float32)
    twin = base(family)
    left = {k: v for k, v in loaded.state_dict().items() if ".experts." not in k or "bias" in k}
    assert not twin.load_state_dict(left, strict=False).unexpected_keys
    for full, matrix in packed_matrices(loaded).items():
        wide = matrix.wide()
        twin.get_parameter(full).data = wide.transpose(1, 2) if family == "gpt_oss" else wide
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=1e-3, atol=1e-4)


def test_other_layers_are_decoded_where_bitsandbytes_is_not_installed(tmp_path, without_bnb):
    name, written = checkpoint(tmp_path, "qwen3_moe", "nf4")
    with pytest.warns(UserWarning, match="bitsandbytes is not installed, so layers other than"):
        loaded = load(name, dtype=torch.float32)
    plain, kind = base("qwen3_moe").to(torch.bfloat16), nf4.Nf4()
    for layer, other in zip(loaded.model.layers, plain.model.layers, strict=True):
        for key in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = other.self_attn.get_submodule(key).weight
            rows = weight.detach().reshape(-1, 64).float()
            wanted = kind.decode(kind.encode(rows), torch.empty_like(rows)).view(weight.shape)
            assert torch.equal(layer.self_attn.get_submodule(key).weight, wanted)


@pytest.mark.parametrize("nested", [False, True])
def test_numbers_are_those_of_bitsandbytes(nested, tmp_path):
    """Of checkpoints that bitsandbytes itself has quantised; attention stays Linear4bit."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def quantise(name, weight):
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        wide[name] = functional.dequantize_4bit(codes, state)
        packed = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {name: codes, **packed}

    wide: dict[str, torch.Tensor] = {}
    base().to(torch.bfloat16).save_pretrained(tmp_path)
    files.rewrite(tmp_path, quantise, files.bnb_settings(nested))
    loaded = load(str(tmp_path), dtype=torch.bfloat16)
    assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    for full, matrix in packed_matrices(loaded).items():
        block = full.rpartition(".")[0]
        keys = ("gate_proj", "up_proj") if "gate_up" in full else ("down_proj",)
        for expert, found in enumerate(matrix.wide()):
            wanted = torch.cat([wide[f"{block}.{expert}.{key}.weight"] for key in keys])
            assert torch.equal(found, wanted)
    model = get_peft_model(loaded, make_settings(target_modules=["q_proj"]))
    train(model)


@pytest.mark.parametrize("nested", [False, True])
def test_one_tensor_of_all_experts(nested, tmp_path):
    """As `replace_parameter_4bit` quantises; nested scales cross experts, and are opened then."""
    left = ["lm_head", "gate", "q_proj", "k_proj", "v_proj", "o_proj"]
    config = files.bnb_settings(nested, llm_int8_skip_modules=left)
    model = base("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    written = {}
    for key, parameter in model.state_dict().items():
        is_matrix = key.endswith(("experts.gate_up_proj", "experts.down_proj"))
        written |= files.bnb(key, parameter, nested) if is_matrix else {key: parameter}
    files.replace(tmp_path, written, config)
    loaded = load(str(tmp_path), dtype=torch.bfloat16)
    for full, matrix in packed_matrices(loaded).items():
        rows = model.get_parameter(full).detach().reshape(-1, 64)
        kind = nf4.NestedNf4() if nested else nf4.Nf4()
        wide = kind.decode(kind.encode(rows), torch.empty_like(rows))
        assert torch.equal(matrix.wide(), wide.view(matrix.shape)), full
        crosses = nested and matrix.shape[1] * matrix.shape[2] % (64 * 256)
        assert matrix.kind.name == ("nf4" if crosses or not nested else "nf4-nested")


@pytest.mark.filterwarnings("ignore:experts were rounded twice", NO_BNB)
@pytest.mark.parametrize(("family", "kind", "storage"), [
    ("olmoe", "fp8", "nf4"), ("gpt_oss", "mxfp4", "nf4"), ("olmoe", "nf4", "int8"),
])  # fmt: skip
def test_another_storage_than_that_of_the_checkpoint_rounds_twice(family, kind, storage, tmp_path):
    name, _ = checkpoint(tmp_path, family, kind)
    with pytest.warns(UserWarning, match=f"rounded twice: .*, they are packed as {storage}"):
        loaded = load(name, storage, dtype=torch.bfloat16)
    kept = packed_matrices(load(name, dtype=torch.bfloat16))
    for full, matrix in packed_matrices(loaded).items():
        assert matrix.kind.name == storage
        wide = kept[full].wide().float()
        assert (matrix.wide().float() - wide).norm() < 0.12 * wide.norm()
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize(("form", "weights"), [
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    ("float-quantized", {"type": "float"}),
])  # fmt: skip
def test_compressed_tensors_are_decoded_by_transformers_and_packed_again(
    form, weights, family, tmp_path
):
    pytest.importorskip("compressed_tensors")
    settings = files.compressed_settings(form, **weights)
    base(family).to(torch.bfloat16).save_pretrained(tmp_path)
    files.rewrite(tmp_path, files.compressed(form, settings), settings)
    with pytest.warns(UserWarning, match="keeps them in compressed-tensors, .* as nf4"):
        loaded = load(str(tmp_path), "nf4", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        plain = AutoModelForCausalLM.from_pretrained(
            tmp_path,
            dtype=torch.bfloat16,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
    for full, matrix in packed_matrices(loaded).items():
        wanted = Packed.of(plain.get_parameter(full), nf4.Nf4())
        assert torch.equal(matrix.wide(), wanted.wide())
    weight = loaded.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, plain.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.filterwarnings(NO_BNB)
@pytest.mark.parametrize(("family", "kind"), [("olmoe", "nested"), ("gpt_oss", "mxfp4"),
                                              ("deepseek_v3", "fp8")])  # fmt: skip
def test_an_adapter_on_it_is_saved_and_loaded(family, kind, tmp_path):
    name, _ = checkpoint(tmp_path / "base", family, kind)
    loaded = load(name, dtype=torch.float32)
    model = train(get_peft_model(loaded, make_settings()))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["record"]
    assert record["storage"] == KINDS[kind][2]
    again = PeftModel.from_pretrained(load(name, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    with pytest.raises(drlora.ConfigError, match="are not saved as a checkpoint"):
        load(name).save_pretrained(tmp_path / "packed")
    with pytest.raises(drlora.ConfigError, match="is packed already"):
        drlora.quantise_experts(load(name), "int8")


@pytest.mark.filterwarnings(NO_BNB)
@pytest.mark.parametrize(("family", "kind", "form"), [
    ("olmoe", "nested", "merged"), ("gpt_oss", "mxfp4", "merged"), ("deepseek_v3", "fp8", "merged"),
    ("qwen3_moe", "nf4", "per-expert"), ("mixtral", "fp8", "peft")])  # fmt: skip
def test_an_adapter_on_it_is_exported(family, kind, form, tmp_path):
    """Also where nothing but the checkpoint says that it is quantised."""
    name, _ = checkpoint(tmp_path / "base", family, kind)
    model = train(get_peft_model(load(name, dtype=torch.float32), make_settings()))
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "record": {**said["record"], "storage": None}}))
    found = export_adapter(tmp_path / "adapter", form, tmp_path / "out", model=name)
    assert found.difference.is_rounding
    if form == "merged":
        assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    config.write_text(json.dumps(said))
    with pytest.raises(drlora.ConfigError, match="is quantised itself|for the format merged"):
        export_adapter(
            tmp_path / "adapter", form, tmp_path / "other", model=name, merge_into="original"
        )


@pytest.mark.parametrize(("family", "kind"), [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8")])
def test_a_checkpoint_that_transformers_decoded_is_told_of_once(family, kind, tmp_path, recwarn):
    name, _ = checkpoint(tmp_path, family, kind)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), make_settings())
    model.add_adapter("second", make_settings())
    (warning,) = [w for w in recwarn if issubclass(w.category, UserWarning)]
    said = str(warning.message)
    assert said.startswith(f"the checkpoint keeps its experts in {kind}, and transformers made bfl")
    assert "0.00 GB instead of 0.00 GB. Load it with config=drlora.packed_config(name)" in said
    get_peft_model(load(name), make_settings())
    assert len([w for w in recwarn if issubclass(w.category, UserWarning)]) == 1


@pytest.mark.filterwarnings(NO_BNB)
def test_experts_that_a_checkpoint_left_in_16_bits_stay_so(tmp_path):
    plain = (*files.PLAIN, "layers.0.mlp.experts")
    name, _ = checkpoint(tmp_path, "olmoe", "nf4", plain)
    with pytest.warns(UserWarning, match="experts stand in 16 bits in this checkpoint in 2 places"):
        loaded = load(name, dtype=torch.bfloat16)
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, torch.nn.Parameter)
    assert is_in_place(loaded.model.layers[1].mlp.experts.down_proj)
    assert torch.equal(loaded.model.layers[0].mlp.experts.down_proj,
                       base().to(torch.bfloat16).model.layers[0].mlp.experts.down_proj)  # fmt: skip


@pytest.mark.filterwarnings(NO_BNB)
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral"])
def test_a_router_in_few_bits_is_refused(family, tmp_path):
    plain = [part for part in files.PLAIN if part not in (".gate.weight", "router")]
    name, _ = checkpoint(tmp_path, family, "nf4", plain)
    with pytest.raises(drlora.ConfigError, match=r"gate.weight: the router is in nf4, .*16-bit"):
        load(name)


SAID = "load the model's 16-bit checkpoint"


@pytest.mark.filterwarnings(NO_BNB)
@pytest.mark.parametrize(("changes", "message"), [
    ({"blocksize": 128}, f"{{'blocksize': 128}}, expected is .*; {SAID}"),
    ({"quant_type": "fp4"}, f"{{'quant_type': 'fp4'}}, .*; {SAID}"),
    ({"shape": (64, 64, 1)}, f"says the shape .*, expected are 2 dimensions; {SAID}"),
    ({"shape": (128, 32)}, "blocks cross rows; .*int8"),
])  # fmt: skip
def test_matrices_that_are_otherwise_than_they_should_be(changes, message, tmp_path):
    base().to(torch.bfloat16).save_pretrained(tmp_path)
    files.rewrite(tmp_path, partial(files.bnb, changes=changes), files.bnb_settings())
    with pytest.raises(drlora.ConfigError, match=message):
        load(str(tmp_path))


@pytest.mark.filterwarnings(NO_BNB)
def test_a_checkpoint_that_lacks_experts_is_not_filled_with_random_numbers(tmp_path):
    name, written = checkpoint(tmp_path)
    left = {key: value for key, value in written.items() if "layers.1.mlp.experts" not in key}
    files.replace(tmp_path, left, files.bnb_settings())
    with pytest.raises(drlora.ConfigError, match="has no experts for model.layers.1.mlp.experts"):
        load(name)
    (lost,) = [key for key in written if key.endswith("1.mlp.experts.3.up_proj.weight.absmax")]
    written.pop(lost)
    files.replace(tmp_path, written, files.bnb_settings())
    with pytest.raises(drlora.ConfigError, match="its experts have .* expected are as many"):
        load(name)


@pytest.mark.parametrize(("settings", "message"), [
    (None, r"is not quantised; .*QuantisedExperts\('nf4'\)"),
    (files.bnb_settings(bnb_4bit_quant_type="fp4"), f"bnb_4bit_quant_type='fp4'.*{SAID}"),
    (files.bnb_settings(bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage='bfloat16'"),
    ({**files.FP8_SETTINGS, "weight_block_size": [1, 32]}, r"weight_block_size=\[1, 32\], .*128"),
    ({**files.FP8_SETTINGS, "weight_block_size": None}, r"weight_block_size=None"),
    ({**files.FP8_SETTINGS, "expert_dtype": "fp4"}, "expert_dtype='fp4'"),
    (files.compressed_settings(symmetric=False), "one scale a row and no zero point"),
    (files.compressed_settings("pack-quantized", num_bits=4), "name the storage .*, 'nf4'"),
    (files.compressed_settings("pack-quantized"), "name the storage .*, 'nf4'"),
    ({"quant_method": "newest"}, r"not known \(quant_method 'newest'\).*QuantisedExperts"),
    *[({"quant_method": m}, rf"is quantised with {n} .*16-bit checkpoint with")
      for m, n in REFUSED.items()],
])  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_name_before_it_is_read(settings, message, tmp_path):
    base().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = {**json.loads(path.read_text()), "quantization_config": settings}
    path.write_text(json.dumps(written))
    with pytest.raises(drlora.ConfigError, match=message):
        drlora.packed_config(str(tmp_path))


def test_all_methods_of_transformers_are_known():
    """A new one is either kept or refused by name."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    own = {"drlora_experts", "drlora_stored"}
    assert not AUTO_QUANTIZER_MAPPING.keys() - own - FORMS.keys() - REFUSED.keys()


def test_models_without_experts_that_can_be_kept(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    dense = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))
    dense.save_pretrained(tmp_path)
    files.rewrite(tmp_path, files.fp8_blocks, files.FP8_SETTINGS)
    with pytest.raises(drlora.ConfigError, match="packed_config has nothing to keep"):
        load(str(tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(drlora.ConfigError, match="storage 'int3' is not known"):
        drlora.packed_config(config, "int3")
    assert as_matrix(torch.zeros(1, 2, 2)).is_plain
    assert make_batch()["input_ids"].shape == (2, 12)
