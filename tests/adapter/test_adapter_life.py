"""The life of an adapter after training: kinds of loading, moving, switching, merging, letting go.

Each test runs for an adapter on the experts alone and for one on all linear layers with a trained
router, which has every kind of tensor that an adapter file can have.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model
from tiny_adapter import logits, make_settings, train, trained
from tiny_config import tiny_config
from torch.optim.swa_utils import AveragedModel
from transformers import GptOssConfig, GptOssForCausalLM

import drlora
from drlora.adapter.inject import adapted_layers

KINDS = {
    "experts": {},
    "everything": {"target_modules": "all-linear", "router": "train"},
}
kinds = pytest.mark.parametrize("kind", KINDS)
TWICE = "Already found a `peft_config` attribute"


def adapter(kind, **changes):
    """A trained adapter of a kind; it is trained once."""
    if "base" in changes:
        return trained(**{**KINDS[kind], **changes})
    return copy.deepcopy(_trained_once(kind, json.dumps(changes)))


@functools.cache
def _trained_once(kind, changes):
    return trained(**KINDS[kind], **json.loads(changes))


def state(model, name="default"):
    return get_peft_model_state_dict(model, adapter_name=name)


def assert_same_state(one, other):
    assert one.keys() == other.keys() and one
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def base_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if ".base_layer." in k}


@kinds
def test_state_dicts_make_the_round_trip(kind):
    model = adapter(kind)
    tensors = state(model)
    assert not any("default" in key for key in tensors)
    other = get_peft_model(make_model(), copy.deepcopy(model.peft_config["default"]))
    result = set_peft_model_state_dict(other, {k: v.clone() for k, v in tensors.items()})
    assert not result.unexpected_keys
    assert_same_state(state(other), tensors)
    assert torch.equal(logits(other), logits(model))
    whole = get_peft_model(make_model(), copy.deepcopy(model.peft_config["default"]))
    whole.load_state_dict(model.state_dict())
    assert torch.equal(logits(whole), logits(model))


@kinds
def test_loading_another_state_again(kind):
    """A loaded state replaces ranks as well as weights."""
    grown = adapter(kind)
    fresh = get_peft_model(make_model(), copy.deepcopy(grown.peft_config["default"]))
    start = {k: v.clone() for k, v in state(fresh).items()}
    before = logits(fresh)
    set_peft_model_state_dict(fresh, state(grown))
    assert torch.equal(logits(fresh), logits(grown))
    set_peft_model_state_dict(fresh, start)
    assert torch.equal(logits(fresh), before)


@kinds
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_from_pretrained(tmp_path, kind, low_cpu_mem_usage, is_trainable):
    model = adapter(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_model(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded), logits(model))
    assert_same_state(state(loaded), state(model))
    wanted = model.get_nb_trainable_parameters()[0] if is_trainable else 0
    assert loaded.get_nb_trainable_parameters()[0] == wanted
    if is_trainable:
        train(loaded)
        assert not torch.equal(logits(loaded), logits(model))


@kinds
def test_auto_class_and_config(tmp_path, kind):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    model = adapter(kind, base=type(base).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(config) is drlora.DrLoraConfig
    saved, wanted = config.to_dict(), model.peft_config["default"].to_dict()
    own = {"inference_mode": None, "auto_mapping": None}  # what PEFT sets when it saves
    assert {**saved, **own} == {**wanted, **own}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@kinds
def test_an_adapter_made_on_meta_is_filled_by_loading(tmp_path, kind):
    model = adapter(kind)
    other = get_peft_model(
        make_model(), copy.deepcopy(model.peft_config["default"]), low_cpu_mem_usage=True
    )
    assert {p.device.type for n, p in other.named_parameters() if ".pools." in n} == {"meta"}
    set_peft_model_state_dict(other, state(model), low_cpu_mem_usage=True)
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    assert torch.equal(logits(other), logits(model))
    train(other)


@kinds
def test_a_whole_model_on_meta(kind):
    """As sharded loading makes it: everything on meta, then a state dict that is assigned."""
    model = adapter(kind)
    with torch.device("meta"):
        skeleton = get_peft_model(make_model(), copy.deepcopy(model.peft_config["default"]))
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    skeleton.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        if "rotary" in name:
            owner = skeleton.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.clone())
    assert torch.equal(logits(skeleton), logits(model))


@kinds
@pytest.mark.parametrize("is_trainable", [False, True])
def test_transformers_own_load_adapter(tmp_path, kind, is_trainable):
    model = adapter(kind)
    model.save_pretrained(tmp_path)
    plain = make_model()
    before = logits(plain)
    plain.load_adapter(str(tmp_path), is_trainable=is_trainable)
    assert torch.equal(logits(plain), logits(model))
    ranks = [one.adapter("default").ranks() for one in adapted_layers(plain, "default").values()]
    assert ranks == [
        one.adapter("default").ranks() for one in adapted_layers(model, "default").values()
    ]
    pools = [p for n, p in plain.named_parameters() if ".pools." in n]
    assert pools and {p.requires_grad for p in pools} == {is_trainable}
    plain.disable_adapters()
    assert torch.equal(logits(plain), before)
    plain.enable_adapters()
    for module in plain.modules():
        if isinstance(module, ModulesToSaveWrapper):  # transformers 5.23 leaves these switched off
            module.enable_adapters(True)
    assert torch.equal(logits(plain), logits(model))
    if is_trainable:
        train(plain)
        assert not torch.equal(logits(plain), logits(model))


def test_transformers_own_add_adapter(tmp_path):
    """Trained, saved and loaded without a PeftModel anywhere."""
    plain = make_model()
    before = logits(plain)
    plain.add_adapter(make_settings(target_modules=["q_proj"]))
    train(plain)
    adapted = logits(plain)
    assert not torch.equal(adapted, before)
    with pytest.warns(UserWarning, match=TWICE):
        plain.add_adapter(make_settings(), "second")
    plain.set_adapter("second")
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    plain.set_adapter("default")
    assert torch.equal(logits(plain), adapted)
    plain.delete_adapter("second")
    assert not any(".second." in key for key in plain.state_dict())
    plain.save_pretrained(tmp_path)
    other = make_model()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), adapted)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path)), adapted)


@kinds
def test_injection_without_a_peft_model(kind):
    model = adapter(kind)
    plain = inject_adapter_in_model(
        copy.deepcopy(model.peft_config["default"]), make_model(), low_cpu_mem_usage=True
    )
    # As PEFT's documentation has it: the keys of an injected model have no such prefix.
    tensors = {k.removeprefix("base_model.model."): v for k, v in state(model).items()}
    set_peft_model_state_dict(plain, tensors, low_cpu_mem_usage=True)
    assert torch.equal(logits(plain), logits(model))
    assert_same_state(state(plain), tensors)


@kinds
def test_deep_copy_and_pickle(kind):
    model = adapter(kind, options={"routing_signal": "probability"})
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = logits(model)
    for other in copies:
        assert torch.equal(logits(other), wanted)
        train(other)  # counts its own routing, on its own blocks
        assert not torch.equal(logits(other), wanted)
    assert torch.equal(logits(model), wanted)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_moves(kind, dtype):
    """The statistics stay in float32: averages of small numbers are lost in 16 bits."""
    model = adapter(kind)
    wanted = logits(model)
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    model.to(dtype)
    for layer in adapted_layers(model, "default").values():
        one = layer.adapter("default")
        assert one.frequency.dtype == torch.float32
        for pool in one.rank_pools.values():
            assert pool.lora_A.dtype == dtype and pool.importance.dtype == torch.float32
            assert pool.owner.dtype == torch.int32
    moved = logits(model)
    assert moved.dtype == dtype
    close = torch.isclose(moved.float(), wanted, rtol=tolerance, atol=tolerance)
    assert close.float().mean() > 0.95
    back = logits(model.float())
    assert torch.isclose(back, wanted, rtol=tolerance, atol=tolerance).float().mean() > 0.95
    model.train()
    train(model)


@kinds
def test_device_moves(kind):
    """To meta and back is the move that a CPU can show; everything of the adapter goes along."""
    model = adapter(kind)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = logits(model)
    model.to("meta")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    for name, buffer in make_model().named_buffers():
        model.get_base_model().get_buffer(name).copy_(buffer)
    assert torch.equal(logits(model), wanted)


@kinds
@pytest.mark.parametrize("cache", [True, False])
def test_generation(kind, cache):
    """Greedy tokens equal those of the merged model, and of a forward pass for each token."""
    model = adapter(kind)
    ids = make_batch(3)["input_ids"]
    made = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache)
    wanted = ids
    for _ in range(5):
        with torch.no_grad():
            wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, wanted)
    sums = [one.adapter("default").meter for one in adapted_layers(model, "default").values()]
    assert not any(meter.num_tokens for meter in sums)
    merged = model.merge_and_unload()
    again = merged.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache)
    assert torch.equal(again, made)


@kinds
def test_generation_takes_positional_arguments_and_beams(kind):
    model = adapter(kind)
    ids = make_batch(3)["input_ids"]
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False),
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False),
    )
    assert model.generate(ids, max_new_tokens=4, num_beams=2).shape[1] <= 16


@kinds
def test_disabled_for_good_and_enabled_again(kind):
    model = adapter(kind)
    plain, adapted = logits(make_model()), logits(model)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), plain)
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), adapted)
    train(model)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging_to_the_bit(kind, dtype):
    model = adapter(kind, base=make_model().to(dtype))
    base, adapted = base_state(model), logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert not all(torch.equal(v, base[k]) for k, v in base_state(model).items())
        model.unmerge_adapter()
        assert_same_state(base_state(model), base)
    assert torch.equal(logits(model), adapted)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged_at_all(kind, value):
    """The last projection of the last block is broken: nothing before it is left merged."""
    model = adapter(kind)
    base = base_state(model)
    layer = list(adapted_layers(model, "default").values())[-1]
    pool = layer.adapter("default").rank_pools["down"]
    pool.lora_B.data[pool.packed_index[0]] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert_same_state(base_state(model), base)
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge(safe_merge=True)
    assert_same_state(base_state(model), base)
    assert not layer.merged


@kinds
def test_merging_again_says_that_there_is_nothing_to_do(kind):
    model = adapter(kind)
    model.merge_adapter()
    merged = logits(model)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model), merged)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_the_dtype_of_the_base(tmp_path, kind, dtype):
    base, config = make_model().to(dtype), make_settings(**KINDS[kind])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.add_adapter("added", copy.deepcopy(config), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=False)
    for name in ("default", "added", "loaded"):
        dtypes = {p.dtype for n, p in model.named_parameters() if f".{name}." in n}
        assert dtypes == {dtype}, name
    assert {p.dtype for p in model.merge_and_unload().parameters()} == {dtype}


@kinds
def test_a_config_that_is_handed_over_is_the_one_that_is_used(tmp_path, kind):
    model = adapter(kind)
    model.save_pretrained(tmp_path)
    config = make_settings(**KINDS[kind])
    loaded = PeftModel.from_pretrained(make_model(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode
    assert torch.equal(logits(loaded), logits(model))


@kinds
def test_names_that_contain_one_another(tmp_path, kind):
    model = adapter(kind)
    count = len(state(model))
    for name in ("default2", "other_default", "xdefaultx", "efaul"):
        model.add_adapter(name, make_settings(**KINDS[kind]))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == count
    other = model.load_adapter(tmp_path, "another")
    assert not other.missing_keys and not other.unexpected_keys
    model.set_adapter("another")
    again = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), again)


@kinds
def test_a_merged_adapter_can_be_disabled_and_switched(kind):
    model = adapter(kind)
    base, adapted = base_state(model), logits(model)
    with torch.no_grad():
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(make_model()))
        torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.add_adapter("second", make_settings(**KINDS[kind]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert_same_state(base_state(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), adapted)


@kinds
def test_merging_one_of_two(kind):
    model = adapter(kind)
    first = logits(model)
    model.add_adapter("second", make_settings(**KINDS[kind]))
    model.set_adapter("second")
    train(model, adapter="second")
    second = logits(model)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(logits(merged), second, rtol=1e-4, atol=1e-5)
    if kind == "experts":  # a router is one adapter's, so only these can be added up
        model.base_model.set_adapter(["default", "second"])
        both = logits(model)
        assert not torch.equal(both, first) and not torch.equal(both, second)
        torch.testing.assert_close(logits(model.merge_and_unload()), both, rtol=1e-4, atol=1e-5)


def with_second_router(**changes):
    """An active adapter and another one, both with trained routers; and what each computes."""
    model = trained(router="train", **changes)
    model.add_adapter("second", make_settings(router="train", **changes))
    model.set_adapter("second")
    train(model, adapter="second", lr=5e-2)
    second = logits(model)
    model.set_adapter("default")
    return model, logits(model), second


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}])
def test_what_is_trained_in_full_is_that_of_the_merged_adapter(changes):
    model, first, second = with_second_router(**changes)
    asks = {name for name, p in model.named_parameters() if p.requires_grad}
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(logits(merged), second, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits(copy.deepcopy(model).unload()), logits(model))
    torch.testing.assert_close(logits(model), second, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), first)
    model.merge_adapter(["second"])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(logits(model), logits(make_model()))
    assert torch.equal(logits(model), first), "disabling has unmerged"
    model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert asks == {name for name, p in model.named_parameters() if p.requires_grad}


def test_two_that_train_the_same_in_full_are_not_merged_together():
    model, first, _ = with_second_router()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(drlora.ConfigError, match="'second'.*has trained .*mlp.gate in full"):
            merge(adapter_names=["default", "second"])
        assert torch.equal(logits(model), first)
    model.merge_adapter(["second"])
    with pytest.raises(drlora.ConfigError, match="cannot be merged together"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), first)


def test_an_adapter_that_is_not_there_is_not_merged():
    model = adapter("experts")
    with pytest.raises(drlora.ConfigError, match=r"no adapter 'typo'.*\['default'\]"):
        model.merge_and_unload(adapter_names=["typo"])


@kinds
def test_an_average_of_weights_computes_as_the_model_does(kind):
    """`AveragedModel` writes into the buffers of a copy, and a loop of one's own does."""
    model = get_peft_model(make_model(), make_settings(**KINDS[kind]))
    average = AveragedModel(model, avg_fn=lambda average, now, count: now)
    own = copy.deepcopy(model)
    train(model)
    for _ in range(2):  # the first one copies parameters alone
        average.update_parameters(model)
    with torch.no_grad():
        for mine, its in zip(own.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(its)
    assert torch.equal(logits(average.module), logits(model))
    assert torch.equal(logits(own), logits(model))
    merged = average.module.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("merge", [True, False])
def test_nothing_stays_behind_after_unloading(kind, merge):
    model = adapter(kind, options={"routing_signal": "probability"})
    layer = weakref.ref(next(iter(adapted_layers(model, "default").values())))
    adapted = logits(model)
    base = model.merge_and_unload() if merge else model.unload()
    del model
    gc.collect()
    assert layer() is None
    wanted = adapted if merge else logits(make_model())
    torch.testing.assert_close(logits(base), wanted, rtol=1e-4, atol=1e-5)
    assert type(base) is type(make_model())
    assert [n for n, _ in base.named_parameters()] == [
        n for n, _ in make_model().named_parameters()
    ]
    assert not hasattr(base, "peft_config")
    for module in base.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    again = get_peft_model(base, make_settings(**KINDS[kind]))
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)


@kinds
def test_deleting(kind):
    model = adapter(kind)
    first = logits(model)
    model.add_adapter("second", make_settings(**KINDS[kind]))
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), first)
    model.add_adapter("second", make_settings(**KINDS[kind]))
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert not any(".default." in key for key in model.state_dict())
    torch.testing.assert_close(logits(model), logits(make_model()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="missing does not exist"):
        model.delete_adapter("missing")
    model.delete_adapter("second")
    # PEFT's own PeftModel cannot be called without any adapter; the model inside can.
    assert torch.equal(logits(model.base_model.model), logits(make_model()))


def test_an_adapter_of_one_block_does_not_lose_anothers_router():
    """Which routers an adapter trains is asked of that adapter, not of the one added last."""
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    model = trained(base=make_model().to(torch.bfloat16), router="train", experts=names[:1])
    model.add_adapter("second", make_settings(router="train", experts=names[1:]))
    routers = {
        n: p.dtype for n, p in model.named_parameters() if ".gate.modules_to_save." in n
    }  # fmt: skip
    assert len(routers) == 2 and set(routers.values()) == {torch.float32}
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    logits(merged)


def test_one_trains_while_the_other_only_serves():
    model = adapter("experts")
    model.add_adapter("second", make_settings(projections=["down"], r_target=3))
    model.base_model.set_adapter(["default", "second"])
    model.base_model.set_requires_grad("default", False)
    frozen = {k: v.clone() for k, v in state(model).items() if "lora_" in k}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".second." in name for name in names)
    train(model, adapter="second")
    assert_same_state({k: v for k, v in state(model).items() if k in frozen}, frozen)


@kinds
def test_saving_chosen_adapters(tmp_path, kind):
    model = adapter(kind)
    model.add_adapter("second", make_settings(**KINDS[kind]))
    model.save_pretrained(tmp_path / "some", selected_adapters=["second"])
    assert not (tmp_path / "some" / "adapter_config.json").exists()
    assert (tmp_path / "some" / "second" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="an invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


def test_status_and_names():
    model = get_peft_model(make_model(), make_settings(target_modules=["q_proj"]), "my-adapter")
    status = model.get_model_status()
    assert status.active_adapters == ["my-adapter"] and status.enabled is True
    assert status.num_adapter_layers == 4 and status.available_adapters == ["my-adapter"]
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert {layer.module_type for layer in model.get_layer_status()} == {
        "drlora.DrLoraExperts", "lora.ExactLinear"
    }  # fmt: skip
    assert any("my-adapter" in name for name, _ in model.named_parameters())


@kinds
def test_preparing_a_model_for_kbit_training(kind):
    """It freezes, goes to float32 and checkpoints; nothing in an adapter minds."""
    plain = prepare_model_for_kbit_training(
        make_model().to(torch.bfloat16),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert not any(p.requires_grad for p in plain.parameters())
    model = get_peft_model(plain, make_settings(**KINDS[kind]))
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(make_batch()["input_ids"]).requires_grad
    before = logits(model)
    assert not torch.equal(logits(train(model)), before)


@kinds
def test_input_embeddings_instead_of_ids(kind):
    model = adapter(kind)
    ids = make_batch(7)["input_ids"]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, logits(model))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_mixed_batches_are_refused(call):
    model = trained(target_modules=["q_proj"])
    ids = make_batch()["input_ids"]
    with pytest.raises(drlora.ConfigError, match="one set of adapters for a whole batch"):
        getattr(model, call)(input_ids=ids, adapter_names=["default", "__base__"])
    assert torch.equal(logits(model), logits(model))


def test_weighted_combinations_are_refused():
    model = adapter("experts")
    model.add_adapter("second", make_settings())
    with pytest.raises(drlora.ConfigError, match=r"set_adapter\(\['default', 'second'\]\) adds"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert list(model.peft_config) == ["default", "second"]


def test_conversion_to_another_start_is_refused(tmp_path):
    with pytest.raises(drlora.ConfigError, match="path_initial_model_for_weight_conversion is for"):
        adapter("experts").save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    assert not list(tmp_path.rglob("*.safetensors"))


OTHERS = {
    "wider": (dict(hidden_size=64), r"lora_A is \(24, 32\) in the file, the model has \(24, 64\)"),
    "more experts": (dict(num_experts=8), r"\(6,\) in the file, the model has \(8,\)"),
    "fewer layers": (dict(num_hidden_layers=1), "match nothing in OlmoeForCausalLM"),
    "narrower experts": (dict(intermediate_size=16), r"\(24, 48\) in .* the model has \(24, 32\)"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_another_size_is_refused(tmp_path, other, low_cpu_mem_usage):
    changes, message = OTHERS[other]
    adapter("experts").save_pretrained(tmp_path)
    with pytest.raises(drlora.DrLoraError, match=message):
        PeftModel.from_pretrained(
            make_model(**changes), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )


def test_transformers_own_load_adapter_refuses_another_size(tmp_path):
    adapter("experts").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size|shape|mismatch"):
        make_model(hidden_size=64).load_adapter(str(tmp_path))


@pytest.mark.parametrize("family", ["deepseek_v3", "granitemoe"])
def test_an_adapter_of_another_architecture_is_refused(tmp_path, family):
    trained(family).save_pretrained(tmp_path)
    with pytest.raises(drlora.ConfigError, match=f"one for '{family}', the model is a 'olmoe'"):
        PeftModel.from_pretrained(make_model(), tmp_path)
    with pytest.raises(drlora.ConfigError, match=f"one for '{family}', the model is a 'olmoe'"):
        make_model().load_adapter(str(tmp_path))


@pytest.mark.parametrize("projections", [["gate_up", "down"], ["up", "down"]])
def test_an_adapter_of_another_order_of_gate_and_up_is_refused(tmp_path, projections):
    """Shapes would fit. Factors of gate or of up alone go where these lie, in either order."""
    model = trained(projections=projections)
    config = model.peft_config["default"]
    assert config.recorded("gate_up_order") == "halves"
    gpt_oss = GptOssForCausalLM(tiny_config(GptOssConfig))
    other = get_peft_model(gpt_oss, make_settings()).peft_config["default"]
    assert other.recorded("gate_up_order") == "interleaved"
    config.note(gate_up_order="interleaved")
    model.save_pretrained(tmp_path)
    if "gate_up" not in projections:
        PeftModel.from_pretrained(make_model(), tmp_path)
        return
    with pytest.raises(drlora.ConfigError, match="trained with gate and up as interleaved"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_a_file_whose_blocks_are_named_as_in_another_layout_is_refused(tmp_path):
    """Mixtral's blocks were called block_sparse_moe before transformers 5."""
    model = trained("mixtral")
    model.peft_config["default"].experts = [
        name.replace(".mlp.", ".block_sparse_moe.") for name in model.peft_config["default"].experts
    ]
    model.save_pretrained(tmp_path)
    with pytest.raises(drlora.ConfigError, match="block_sparse_moe.experts.* match nothing"):
        PeftModel.from_pretrained(make_model("mixtral"), tmp_path)


@pytest.mark.parametrize("kind", ["router missing", "router unasked for"])
def test_a_file_and_settings_that_disagree_about_the_router_are_refused(tmp_path, kind):
    trained(router="train").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    if kind == "router missing":
        save_file({k: v for k, v in tensors.items() if ".gate." not in k}, path)
        match = "gate.weight"
    else:
        adapter("experts").save_pretrained(tmp_path)
        save_file(tensors, path)
        match = "gate.weight is .* in the file"
    with pytest.raises(Exception, match=match):
        PeftModel.from_pretrained(make_model(), tmp_path)


@kinds
def test_a_base_of_mixed_dtypes(tmp_path, kind):
    """Norms and routers in float32 beside bfloat16 weights: loaded, trained, merged."""
    base = make_model().to(torch.bfloat16)
    for name, module in base.named_modules():
        if "norm" in name or name.endswith("mlp.gate"):
            module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = logits(base)
    model = get_peft_model(base, make_settings(**KINDS[kind]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model), plain, rtol=0.05, atol=0.05)
        loss = model.train()(**make_batch()).loss
    loss.backward()
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.float32, torch.bfloat16}


def test_experts_whose_matrices_differ_in_dtype_are_refused():
    base = make_model()
    experts = base.model.layers[1].mlp.experts
    experts.down_proj.data = experts.down_proj.data.to(torch.bfloat16)
    with pytest.raises(drlora.ConfigError, match="layers.1.*float32.*bfloat16.*one dtype"):
        get_peft_model(base, make_settings())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_saved_in_16_bits_loads_into_float32(tmp_path, dtype):
    model = trained().to(dtype)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    for layer in adapted_layers(loaded, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            assert pool.lora_A.dtype == pool.importance.dtype == torch.float32
    for key, value in state(loaded).items():
        assert torch.equal(value.to(state(model)[key].dtype), state(model)[key]), key


def test_the_page_about_pefts_tests_names_tests_that_exist():
    here = Path(__file__).parents[1]
    page = (here.parent / "docs" / "peft-behaviour.md").read_text()
    named = re.findall(r"`(?:(test_\w+\.py)(?:::(\w+))?|(test_\w+))`", page)
    tests = {path.name: path for path in here.rglob("test_*.py")}
    own = [tests["test_adapter_life.py"], tests["test_beyond_experts.py"]]
    assert len(named) > 30
    for file, test, alone in named:
        sources = [tests[file]] if file else own
        text = "".join(source.read_text() for source in sources)
        assert not (test or alone) or f"def {test or alone}(" in text, (file, test or alone)
