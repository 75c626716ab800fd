"""`quantise_experts`: packed models compute, train with growth, save and refuse as they should."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny import make_batch, make_class, make_model
from tiny_adapter import logits, make_settings, train
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.moe.blocks import find_blocks
from drlora.moe.fingerprint import fingerprint
from drlora.moe.quantise import quantise_experts
from drlora.ops.storage.packed import Packed

WIDE = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
NAMES = ["nf4", "nf4-nested", "int8", "mxfp4", "fp8"]


def base(family="olmoe"):
    torch.manual_seed(0)
    if family == "gpt_oss":
        return make_class("GptOssForCausalLM", hidden_size=64, intermediate_size=64)
    return make_model(family, **WIDE)


def with_packed_numbers(packed):
    """A plain model whose experts have the numbers that the packed ones stand for."""
    wide = copy.deepcopy(packed)
    for module in wide.modules():
        for key, child in list(module.named_children()):
            if isinstance(child, Packed):
                delattr(module, key)
                module.register_parameter(key, torch.nn.Parameter(child.wide()))
                module.__class__ = type(module).__mro__[1] if key == "down_proj" else type(module)
    return wide


def adapted(model, **changes):
    torch.manual_seed(3)
    found = get_peft_model(model, make_settings(**changes))
    assert isinstance(found, PeftModel)
    return found


def randomise(model):
    """LoRA's B starts at zero, and then A has no gradient."""
    torch.manual_seed(5)
    for layer in adapted_layers(model, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            owned = (pool.owner >= 0)[:, None]
            pool.lora_B.data = torch.randn(pool.lora_B.shape) * 0.1 * owned


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss"])
def test_a_packed_model_computes_what_its_numbers_say(family):
    packed = quantise_experts(base(family), "nf4")
    wide = with_packed_numbers(packed)
    torch.testing.assert_close(logits(packed), logits(wide), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(packed), logits(base(family)))
    held = {name: p for name, p in packed.named_parameters() if ".experts." in name}
    assert any(name.endswith("gate_up_proj.codes") for name in held)
    assert all(not p.requires_grad for p in held.values() if p.dtype == torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_training_with_growth_is_that_of_the_wide_model(name):
    packed = quantise_experts(base(), name)
    wide = with_packed_numbers(packed)
    # `loop` puts the scales of INT8 on products, which rounds in another order.
    engine = "grouped" if name == "int8" else "loop"
    models = [adapted(packed, engine=engine), adapted(wide, engine=engine)]
    before = logits(models[0])
    for model in models:
        train(model)
    assert not torch.equal(logits(models[0]), before)
    one, other = (drlora.adapter_state(model) for model in models)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_the_wide_model(family, name):
    """GPT-OSS keeps (E, I, O), so its sums are taken in another order."""
    packed = quantise_experts(base(family), name)
    wide = with_packed_numbers(packed)
    found = []
    for model in (adapted(packed), adapted(wide)):
        randomise(model)
        model.train()(**make_batch(0)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, gradient in found[0].items():
        error = (gradient - found[1][key]).norm()
        assert error < 1e-4 * found[1][key].norm().clamp(min=1e-9), key


def test_every_expert_that_had_rows_gets_a_gradient():
    model = adapted(quantise_experts(base(), "nf4"))
    randomise(model)
    model.train()
    model(**make_batch(0)).loss.backward()
    for layer in adapted_layers(model, "default").values():
        adapter = layer.adapter("default")
        used = adapter.meter.sum_E > 0
        for pool in adapter.rank_pools.values():
            for expert in torch.where(used)[0].tolist():
                assert pool.lora_A.grad[pool.owner == expert].any()


def test_an_adapter_is_saved_loaded_switched_off_and_taken_away(tmp_path):
    packed = quantise_experts(base(), "nf4")
    plain = logits(packed)
    model = train(adapted(packed))
    wanted = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantise_experts(base(), "nf4"), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    with pytest.raises(drlora.ConfigError, match="stored in 4 bits"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model.unload()), plain)


def test_generation_and_16_bits():
    packed = quantise_experts(base().to(torch.bfloat16), "int8")
    assert all(m.dtype == torch.bfloat16 for m in packed.modules() if isinstance(m, Packed))
    ids = make_batch(0)["input_ids"][:1, :4]
    out = adapted(packed).generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 8)


def test_packing_is_the_same_every_time():
    one, other = (quantise_experts(base(), "nf4-nested").state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def damaged(value):
    """A base with one number of one expert that is not finite."""
    model = base()
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 5] = value
    return model


@pytest.mark.parametrize(
    ("make", "storage", "message"),
    [
        (base, "nf5", "storage 'nf5' is not known"),
        (lambda: make_model("olmoe"), "nf4", "cannot be packed as nf4: .* no multiple of 64"),
        (lambda: quantise_experts(base(), "int8"), "nf4", "is packed already, as int8"),
        (lambda: torch.nn.Linear(4, 4), "nf4", "has no Mixture-of-Experts block"),
        (lambda: make_class("LongcatFlashForCausalLM"), "int8", "names no places"),
        (lambda: damaged(float("nan")), "nf4", "layers.1.mlp.experts.down_proj, expert 2.* NaN"),
        (lambda: damaged(float("-inf")), "int8", "expert 2: a matrix has .* infinite"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_left_as_it_was(make, storage, message):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(drlora.ConfigError, match=message):
        quantise_experts(model, storage)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)


# While loading.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_packed_while_loading_it_is_what_packing_in_place_gives(tmp_path, family, name, dtype):
    """Mixtral's checkpoint has experts apart, which transformers puts together first."""
    base(family).save_pretrained(tmp_path)
    config = drlora.QuantisedExperts(name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    held = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (loaded, plain)]
    assert held[0] < held[1]
    wanted, found = quantise_experts(plain, name).state_dict(), loaded.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(logits(loaded), logits(plain))


def test_a_loaded_model_trains_and_says_that_it_is_quantised(tmp_path):
    base().save_pretrained(tmp_path / "base")
    config = drlora.QuantisedExperts("nf4-nested")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    assert loaded.config.quantization_config.storage == "nf4-nested"
    model = train(adapted(loaded))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    read = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(read), logits(model))


@pytest.mark.parametrize("how", ["in place", "while loading"])
def test_a_packed_base_is_not_saved_as_a_checkpoint_that_nobody_reads(tmp_path, how):
    model = base()
    if how == "in place":
        quantise_experts(model, "int8")
    else:
        model.save_pretrained(tmp_path / "base")
        config = drlora.QuantisedExperts("int8")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    with pytest.raises(drlora.ConfigError, match="int8 are not saved as a checkpoint"):
        model.save_pretrained(tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.safetensors"))
    train(adapted(model)).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_packed_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(drlora.ConfigError, match="storage 'int3' is not known"):
        drlora.QuantisedExperts("int3")
    make_model("olmoe").save_pretrained(tmp_path / "narrow")
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    dense = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))
    dense.save_pretrained(tmp_path / "dense")
    damaged(float("inf")).save_pretrained(tmp_path / "damaged")
    for name, said in (
        ("narrow", "no multiple of 64"),
        ("dense", "has nothing to pack"),
        ("damaged", "NaN or infinite"),
    ):
        with pytest.raises(drlora.ConfigError, match=said):
            AutoModelForCausalLM.from_pretrained(
                tmp_path / name, quantization_config=drlora.QuantisedExperts("nf4")
            )


def test_an_adapter_on_another_storage_than_it_was_trained_on_says_so(tmp_path):
    train(adapted(quantise_experts(base(), "nf4"))).save_pretrained(tmp_path / "four")
    with pytest.warns(UserWarning, match="stored as nf4, .* as numbers of their own"):
        PeftModel.from_pretrained(base(), tmp_path / "four")
    with pytest.warns(UserWarning, match="stored as nf4, those of .* are stored as int8"):
        PeftModel.from_pretrained(quantise_experts(base(), "int8"), tmp_path / "four")
    train(adapted(base())).save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="stored as numbers of their own dtype, .* as nf4"):
        PeftModel.from_pretrained(quantise_experts(base(), "nf4"), tmp_path / "plain")
    PeftModel.from_pretrained(base(), tmp_path / "plain")


def test_an_adapter_knows_the_base_that_it_was_trained_on(tmp_path, recwarn):
    """By the bytes of packed experts; whatever they are computed in."""
    made = quantise_experts(base(), "nf4-nested")
    model = train(adapted(made))
    model.save_pretrained(tmp_path)
    found = model.peft_config["default"].recorded("fingerprint")
    assert len(found) == 64
    again = quantise_experts(base(), "nf4-nested").to(torch.bfloat16)
    assert fingerprint(again, find_blocks(again)) == found
    PeftModel.from_pretrained(again, tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    other = base()
    other.model.layers[1].mlp.experts.down_proj.data[1, 0, 0] += 1
    with pytest.warns(UserWarning, match=f"have other bytes .fingerprint {found[:12]}, here"):
        PeftModel.from_pretrained(quantise_experts(other, "nf4-nested"), tmp_path)
    plain = base()
    assert fingerprint(plain, find_blocks(plain)) is None


def held(model):
    """Name -> (dtype, bytes) of what is packed."""
    return {
        f"{name}.{key}": (part.dtype, part.detach().clone())
        for name, module in model.named_modules()
        if isinstance(module, Packed)
        for key, part in module.named_parameters()
    }


def unchanged(model, before):
    after = held(model)
    return after.keys() == before.keys() and all(
        after[key][0] == dtype and torch.equal(after[key][1], part)
        for key, (dtype, part) in before.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_casts_of_a_model_leave_what_is_packed_as_it_is(name):
    packed = quantise_experts(base(), name)
    before = held(packed)
    layers = packed.model.layers
    for cast in (layers.half, layers.bfloat16, layers.double, layers.float):
        cast()
        assert unchanged(packed, before)
    for dtype in (torch.bfloat16, torch.float32):
        assert unchanged(packed.to(dtype), before)
    assert {m.dtype for m in packed.modules() if isinstance(m, Packed)} == {torch.float32}
    in_experts = [n for n, _ in packed.named_buffers() if ".experts." in n]
    assert not in_experts  # which DDP would send each step; parameters it does not


@pytest.mark.parametrize("name", NAMES)
def test_peft_prepares_it_for_training_and_leaves_what_is_packed(name):
    """It casts parameters of 16 bits to float32: norms and routers, and no scale."""
    packed = quantise_experts(base().to(torch.bfloat16), name)
    packed.is_loaded_in_4bit = True  # what it asks for
    before, size = held(packed), sum(p.numel() * p.element_size() for p in packed.parameters())
    prepared = prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False)
    assert unchanged(prepared, before)
    experts = sum(part.numel() * part.element_size() for _, part in before.values())
    after = sum(p.numel() * p.element_size() for p in prepared.parameters())
    assert after - size == size - experts  # what is not packed is twice as large
    model = train(adapted(prepared))
    assert logits(model).isfinite().all()
