"""DR-LoRA as a PEFT method: what users of PEFT do with an adapter."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model, plain_loop, trainable
from tiny_adapter import SETTINGS, logits, make_settings, trained

import drlora
from drlora.adapter.inject import adapted_layers


def test_the_method_is_registered():
    assert PeftType.DRLORA == "DRLORA"
    assert PeftType("DRLORA") is PeftType.DRLORA
    assert PeftType.DRLORA in list(PeftType)
    assert isinstance(trained(), PeftModel)


@pytest.mark.parametrize("changes", [{}, {"router": "train"}, {"projections": ["up", "down"]}],
                         ids=["default", "router", "up+down"])  # fmt: skip
def test_save_and_load(tmp_path, changes):
    model = trained(**changes)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    for one, other in zip(
        adapted_layers(model, "default").values(),
        adapted_layers(loaded, "default").values(),
        strict=True,
    ):
        one, other = one.drlora_adapters["default"], other.drlora_adapters["default"]
        assert one.ranks() == other.ranks()
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
    saved = PeftConfig.from_pretrained(tmp_path).to_dict()
    # Without a task PEFT writes down which class the base has.
    assert saved.pop("auto_mapping")["base_model_class"] == "OlmoeForCausalLM"
    wanted = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    assert saved == {name: value for name, value in wanted.items() if name != "auto_mapping"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_auto_class(tmp_path, low_cpu_mem_usage):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    model = trained(base=type(base).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_only_the_adapter_is_saved(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert keys and all(".drlora_adapters." in key for key in keys)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "DRLORA" and written["r_target"] == 4


def test_storage_is_exactly_the_budget():
    model = trained()
    rows = 6 * 4  # experts * r_target
    wanted = 2 * rows * ((32 + 48) + (24 + 32))  # two blocks; gate_up and down
    assert model.get_nb_trainable_parameters()[0] == wanted


def test_print_trainable_parameters(capsys):
    trained().print_trainable_parameters()
    assert "trainable params: 6,528" in capsys.readouterr().out


@pytest.mark.parametrize("router", ["frozen", "train"])
def test_disable_adapter(router):
    model = trained(router=router)
    plain, adapted = logits(make_model()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), adapted) and not torch.equal(adapted, plain)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("router", ["frozen", "train"])
def test_merge_and_unload(family, router):
    """Law 7: merged logits equal adapter logits."""
    model = trained(family, router=router)
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(make_model(family))
    assert not any("drlora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)


def test_unmerge_restores_the_base_to_the_bit():
    model = trained()
    base = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    adapted = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    model.unmerge_adapter()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    assert torch.equal(logits(model), adapted)


def test_safe_merge_refuses_nan():
    model = trained()
    layer = next(iter(adapted_layers(model, "default").values()))
    layer.drlora_adapters["default"].pools["down"].lora_B.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)


def test_two_adapters():
    model = trained()
    first = logits(model)
    model.add_adapter("second", drlora.DrLoraConfig(r_init=1, r_target=2, r_max=4, p_grow=0.5))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(make_model()), rtol=1e-5, atol=1e-5)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".second." in name for name in names)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_generation_with_and_without_cache():
    model = trained()
    ids = make_batch()["input_ids"]
    texts = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


def test_bfloat16_base_keeps_the_adapter_in_float32():
    model = trained(base=make_model().to(torch.bfloat16))
    for layer in adapted_layers(model, "default").values():
        for pool in layer.drlora_adapters["default"].pools.values():
            assert pool.lora_A.dtype == pool.lora_B.dtype == torch.float32
            assert pool.importance.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


def test_autocast():
    model = trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.train()(**make_batch())
    out.loss.backward()
    torch.testing.assert_close(out.logits.float(), logits(model, 0), rtol=0.1, atol=0.1)


def test_deep_copy():
    model = trained()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_modules_to_save(tmp_path):
    model = trained(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(
        model.base_model.model.lm_head.modules_to_save["default"].weight,
        make_model().lm_head.weight,
    )


@pytest.mark.parametrize("name", ["experts", "mlp", "layers.1", "model"])
def test_adapted_experts_are_not_trained_in_full(name):
    model, settings = make_model(), make_settings(modules_to_save=["lm_head", name])
    with pytest.raises(drlora.ConfigError, match=f"modules_to_save='{name}' matches .*experts"):
        get_peft_model(model, settings)
    assert not hasattr(model, "peft_config") and settings.experts is None
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_beside_the_adapted_ones_may_be_trained_in_full(tmp_path):
    settings = dict(experts=["model.layers.1.mlp.experts"], modules_to_save=["layers.0"])
    model = trained(**settings)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    model = trained()
    with pytest.raises(drlora.ConfigError, match="layers.0.mlp.experts is adapted"):
        model.add_adapter("b", make_settings(**settings))


def test_one_block_alone():
    name = "model.layers.1.mlp.experts"
    model = trained(experts=[name])
    assert [layer.block.experts_name for layer in adapted_layers(model, "default").values()] == [
        name
    ]


@pytest.mark.parametrize("damage", ["missing", "shape", "owner", "truncated", "other model"])
def test_adapters_that_do_not_fit_are_refused(tmp_path, damage):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.experts.drlora_adapters.pools.down."
    base, match = make_model(), "does not fit this model"
    if damage == "missing":
        del tensors[key + "lora_A"]
    elif damage == "shape":
        tensors[key + "lora_A"] = tensors[key + "lora_A"][:3].contiguous()
    elif damage == "owner":
        tensors[key + "owner"][0] = 77
        match = "rank map is damaged.*77"
    elif damage == "other model":
        base = make_model(num_hidden_layers=1)
        match = "match nothing in OlmoeForCausalLM"
    save_file(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        match = "Error while deserializing"
    with pytest.raises(Exception, match=match) as caught:
        PeftModel.from_pretrained(base, tmp_path)
    if damage != "truncated":
        assert isinstance(caught.value, drlora.DrLoraError)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "granitemoe", "phimoe"])
def test_a_trained_router_of_a_bfloat16_model_is_kept_in_float32(tmp_path, family):
    """In bfloat16 a step of 2e-5 is below the spacing of most weights, and they would not move."""
    plain = make_model(family).to(torch.bfloat16)
    model = get_peft_model(plain, drlora.DrLoraConfig(**{**SETTINGS, "router": "train"}))
    dynamics = drlora.RankDynamics(model, total_steps=8)
    routers = {id(p): p.detach().clone() for p in dynamics.routers.parameters}
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=2e-5), range(4))
    for parameter in dynamics.routers.parameters:
        assert parameter.dtype == torch.float32
        assert (parameter != routers[id(parameter)]).float().mean() > 0.9
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family).to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded), adapted)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    # Rounded to bfloat16, the router may choose another expert where two are nearly tied.
    assert torch.isclose(logits(merged), adapted, rtol=0.1, atol=0.1).float().mean() > 0.9


def test_adapters_with_different_dropout_are_not_trained_together():
    model = trained()
    model.add_adapter("other", drlora.DrLoraConfig(lora_dropout=0.3))
    model.base_model.set_adapter(["default", "other"])
    model.eval()(**make_batch())
    with pytest.raises(drlora.ConfigError, match="different lora_dropout"):
        model.train()(**make_batch())
