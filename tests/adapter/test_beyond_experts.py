"""`target_modules`: PEFT's ordinary LoRA beside the experts, in the same adapter."""

from __future__ import annotations

import json
import re

import pytest
import torch
from all_classes import ALL_CLASSES, make_base
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from peft_layout import PARAMETERS, peft_factors, to_pool_layout
from safetensors.torch import load_file, save_file
from tiny import checkpoint_activations, make_batch, make_model, plain_loop, trainable
from tiny_adapter import SETTINGS, logits, make_settings, train, trained

import drlora
from drlora.adapter import linear as ordinary
from drlora.adapter.inject import adapted_layers
from drlora.adapter.linear import choose_targets
from drlora.moe.blocks import find_blocks

ATTENTION = ["q_proj", "v_proj"]
# Tiny models of these have mamba layers alone.
WITHOUT_ATTENTION = {"GraniteMoeHybridForCausalLM", "JambaForCausalLM"}
# Layers of attention that are not called like OLMoE's.
OTHER_NAMES = {
    "DbrxForCausalLM": {"norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"},
    "JetMoeForCausalLM": {"self_attention.kv_proj"},
    "MiniMaxForCausalLM": {"self_attn.output_gate", "self_attn.qkv_proj"},
    "LongcatFlashForCausalLM": {"self_attn.q_a_proj", "self_attn.o_proj"},
    "NemotronHForCausalLM": {"mixer.q_proj", "mixer.o_proj"},
    "Qwen3NextForCausalLM": {"linear_attn.out_proj", "linear_attn.in_proj_qkvz"},
    "ZayaForCausalLM": {"self_attn.qkv_proj.v_proj_current"},
}
GATED = ["gate_proj", "up_proj", "down_proj"]


def lora_layers(model) -> dict[str, LoraLayer]:
    """Full name in the base model -> layer with ordinary LoRA."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_loss_and_every_gradient_equal_pefts(family, rslora):
    """Law 2, with LoRA on experts and on attention at once."""
    shared = dict(lora_alpha=8.0, use_rslora=rslora, target_modules=ATTENTION)
    theirs = get_peft_model(
        make_model(family),
        LoraConfig(r=4, target_parameters=[f"experts.{p}" for p in PARAMETERS.values()], **shared),
    )
    ours = get_peft_model(
        make_model(family), drlora.DrLoraConfig(r_init=4, r_target=4, r_max=4, **shared)
    )
    layers = adapted_layers(ours, "default")
    pairs = peft_factors(theirs, 4)
    assert len(pairs) == 4
    for (block, projection), (a, b) in pairs.items():
        b.data.normal_(std=0.2)
        pool = layers[block].adapter("default").rank_pools[projection]
        a_pool, b_pool = to_pool_layout(a.data, b.data, layers[block].block.num_experts)
        pool.lora_A.data.copy_(a_pool)
        pool.lora_B.data.copy_(b_pool)
    linear = {n: m for n, m in lora_layers(theirs).items() if n.endswith(tuple(ATTENTION))}
    assert len(linear) == 4 and set(linear) == set(lora_layers(ours))
    for name, other in linear.items():
        one = lora_layers(ours)[name]
        assert one.scaling == other.scaling and one.r == other.r
        other.lora_B["default"].weight.data.normal_(std=0.2)
        for key in ("lora_A", "lora_B"):
            getattr(one, key)["default"].weight.data.copy_(getattr(other, key)["default"].weight)
    losses = []
    for model in (theirs, ours):
        out = model.train()(**make_batch())
        out.loss.backward()
        losses.append(out.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, other in linear.items():
        for key in ("lora_A", "lora_B"):
            want = getattr(other, key)["default"].weight.grad
            got = getattr(lora_layers(ours)[name], key)["default"].weight.grad
            assert (got - want).norm() / want.norm() < 1e-5, (name, key)
    for (block, projection), (a, b) in pairs.items():
        pool = layers[block].adapter("default").rank_pools[projection]
        wanted = to_pool_layout(a.grad, b.grad, layers[block].block.num_experts)
        for want, got in zip(wanted, (pool.lora_A.grad, pool.lora_B.grad), strict=True):
            assert (got - want).norm() / want.norm() < 1e-5, (block, projection)


@pytest.mark.parametrize(
    ("family", "wanted", "endings"),
    [
        ("olmoe", ATTENTION, {"q_proj", "v_proj"}),
        ("olmoe", r".*layers\.1\.self_attn\.[kv]_proj", {"k_proj", "v_proj"}),
        ("olmoe", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("qwen2_moe", "all-attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("qwen2_moe", ["shared_expert.up_proj"], {"up_proj"}),
        ("deepseek_v3", GATED, set(GATED)),
    ],
    ids=["list", "regex", "all-linear", "all-attention", "shared expert", "shared, dense layer"],
)  # fmt: skip
def test_which_layers(tmp_path, family, wanted, endings):
    """Trained, saved, loaded, merged: one adapter, one file."""
    model = trained(family, target_modules=wanted, target_rank=3)
    layers = lora_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == endings
    assert not any(".experts." in name for name in layers) and "lm_head" not in layers
    if wanted == r".*layers\.1\.self_attn\.[kv]_proj":
        assert all(".layers.1." in f".{name}" for name in layers)
    if family == "deepseek_v3":
        assert {name for name in layers if ".shared_experts." in name}
        assert {name for name in layers if "layers.0.mlp." in name}
    for layer in layers.values():
        assert layer.r["default"] == 3 and layer.lora_B["default"].weight.any()
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == wanted and written["target_rank"] == 3
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(".lora_A.weight" in key for key in keys) == len(layers)
    assert not any("default" in key for key in keys)
    loaded = PeftModel.from_pretrained(make_model(family), tmp_path)
    assert torch.equal(logits(loaded), adapted)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(make_model(family)) and not lora_layers(merged)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_name", sorted(set(ALL_CLASSES) - WITHOUT_ATTENTION))
def test_attention_is_found_in_every_class(class_name):
    """All of its layers but what chooses, whatever their names; nothing else; no tower."""
    model = make_base(class_name)
    config = make_settings(target_modules="all-attention")
    found = choose_targets(model, config, find_blocks(model))
    stacks, endings = zip(*(re.split(r"\.\d+\.", name, maxsplit=1) for name in found), strict=True)
    assert len(set(stacks)) == 1
    endings = {re.sub(r"\.\d+\.", ".", ending) for ending in endings}
    holders = r"(self_attn|self_attention|linear_attn|norm_attn_norm\.attn|mixer)\."
    assert all(re.match(holders, ending) for ending in endings), endings
    assert not any(re.search("mlp|expert|ffn|indexer", ending) for ending in endings), endings
    assert OTHER_NAMES.get(class_name, set()) <= endings


def test_a_model_without_attention_is_refused():
    model = make_base("JambaForCausalLM")
    with pytest.raises(drlora.ConfigError, match="no linear layer in a module of attention"):
        choose_targets(model, make_settings(target_modules="all-attention"), find_blocks(model))


def test_all_linear_leaves_routers_to_the_router_setting():
    model = trained("qwen2_moe", target_modules="all-linear", router="train")
    endings = {name.rpartition(".")[2] for name in lora_layers(model)}
    assert "gate" not in endings and "shared_expert_gate" in endings
    with pytest.raises(drlora.ConfigError, match="is a router or a part of one; use"):
        trained(target_modules=["mlp.gate"])


def test_unset_rank_and_scaling_are_those_of_the_experts():
    config = make_settings(target_modules=ATTENTION)
    assert (config.target_rank, config.target_alpha) == (4, 8.0)
    config = make_settings(target_modules=ATTENTION, target_rank=2)
    assert config.target_alpha / config.target_rank == config.scaling
    config = make_settings(target_modules=ATTENTION, target_rank=2, use_rslora=True)
    layers = lora_layers(get_peft_model(make_model(), config))
    for layer in layers.values():
        assert layer.scaling["default"] == pytest.approx(config.scaling)
    config = make_settings(target_modules={"v_proj", "q_proj"}, target_rank=2, target_alpha=32)
    assert config.target_modules == ["q_proj", "v_proj"]
    layers = lora_layers(get_peft_model(make_model(), config))
    assert {layer.scaling["default"] for layer in layers.values()} == {16.0}


def test_ranks_of_ordinary_layers_do_not_grow():
    model = get_peft_model(make_model(), make_settings(target_modules="all-linear"))
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    dynamics = drlora.RankDynamics(model, total_steps=8)
    before = dynamics.budget()
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=2e-2), range(8))
    assert shapes == {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert dynamics.budget()[0] > before[0] and dynamics.budget()[1] == before[1]


def test_only_the_adapter_is_trained():
    model = trained(target_modules=ATTENTION, target_rank=3)
    experts = 2 * 6 * 4 * ((32 + 48) + (24 + 32))
    attention = 2 * 2 * 3 * (32 + 32)
    assert model.get_nb_trainable_parameters()[0] == experts + attention
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".default." in name for name in names)


def test_some_experts_modules_and_all_attention():
    name = "model.layers.1.mlp.experts"
    model = trained(experts=[name], target_modules=["q_proj"])
    layers = adapted_layers(model, "default").values()
    assert [layer.block.experts_name for layer in layers] == [name]
    assert len(lora_layers(model)) == 2


def test_dropout_holds_for_ordinary_layers_too():
    model = trained(target_modules=ATTENTION, lora_dropout=0.5)
    for layer in lora_layers(model).values():
        assert layer.lora_dropout["default"].p == 0.5
    for pool in adapted_layers(model, "default").values():
        for one in pool.adapter("default").rank_pools.values():
            one.lora_B.data.zero_()
    assert torch.equal(logits(model), logits(model))
    noisy = [model.train()(**make_batch()).loss.item() for _ in range(2)]
    assert noisy[0] != noisy[1]


def test_switching_off_and_merging_hold_for_both_kinds():
    model = trained(target_modules="all-linear", router="train", modules_to_save=["lm_head"])
    plain, adapted = logits(make_model()), logits(model)
    base = {k: v.clone() for k, v in model.state_dict().items() if ".base_layer." in k}
    assert any("q_proj" in key for key in base) and any("experts" in key for key in base)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter(safe_merge=True)
    changed = [k for k, v in base.items() if not torch.equal(v, model.state_dict()[k])]
    assert set(changed) == set(base)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    assert torch.equal(logits(model), adapted)


def test_merging_twice_restores_what_was_there_before_the_first():
    model = trained(target_modules=ATTENTION)
    model.add_adapter("second", make_settings(target_modules="all-linear"))
    model.set_adapter("second")
    train(model, adapter="second")
    base = {k: v.clone() for k, v in model.state_dict().items() if ".base_layer." in k}
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    both = logits(model)
    model.unmerge_adapter()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)


def test_adapters_with_and_without_ordinary_layers_on_one_model(tmp_path):
    model = trained(target_modules=ATTENTION, target_rank=2)
    first = logits(model)
    model.add_adapter("second", make_settings(projections=["up"], target_modules="all-linear"))
    model.add_adapter("third", make_settings(projections=["down"]))
    assert torch.equal(logits(model), first)
    for name in ("second", "third"):
        model.set_adapter(name)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert names and all(f".{name}." in n for n in names)
        train(model, adapter=name)
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    assert layer.r == {"default": 2, "second": 4}
    each = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        each[name] = logits(model)
    assert torch.equal(each["default"], first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "third", adapter_name="third")
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.load_adapter(tmp_path, "default")
    for name, wanted in each.items():
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), wanted), name
    loaded.delete_adapter("second")
    assert not any(".second." in key for key in loaded.state_dict())
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    batch, gradients = make_batch(), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(make_model(), make_settings(target_modules="all-linear"))
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.data.normal_(std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            inner = model.get_base_model()
            checkpoint_activations(inner, use_reentrant=use_reentrant)
        model.train()(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1]) and any("q_proj" in n for n in gradients[0])
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "c_attn"]}, "'c_attn' matches nothing in Olmoe.*'k_proj'"),
        ({"target_modules": "q_proj"}, "'q_proj' matches nothing"),
        ({"target_modules": ["self_attn"]}, "self_attn, a OlmoeAttention and no linear layer"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, a Embedding .*modules_to_save"),
        ({"target_modules": ["q_proj", 3]}, "'q_proj', 3.* must be a list of names"),
        ({"target_modules": ["q_proj"], "target_rank": 0}, "target_rank=0 must be"),
        ({"target_modules": ["q_proj"], "target_alpha": -1}, "target_alpha=-1 must be greater"),
        ({"target_rank": 4}, "target_rank=4 has no effect without target_modules"),
        ({"use_dora": True}, "use_dora=True is not supported: DoRA divides by the norm"),
    ],
)  # fmt: skip
def test_refusals(changes, message):
    plain = make_model()
    names = [name for name, _ in plain.named_modules()]
    with pytest.raises(drlora.ConfigError, match=message):
        get_peft_model(plain, make_settings(**changes))
    assert names == [name for name, _ in plain.named_modules()]


def test_a_file_without_the_ordinary_layers_is_refused(tmp_path):
    trained(target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    extra = {"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": torch.zeros(4, 32)}
    save_file(tensors | extra, path)
    with pytest.raises(drlora.CheckpointError, match=r"k_proj.lora_A.weight is \(4, 32\) in the"):
        PeftModel.from_pretrained(make_model(), tmp_path)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(drlora.CheckpointError, match="layers.1.self_attn.q_proj.lora_B.*missing"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_lora_plus_is_pefts_own_helper():
    """PEFT's create_loraplus_optimizer takes pools and ordinary LoRA alike: B learns faster."""
    model = get_peft_model(make_model(), make_settings(target_modules=ATTENTION, router="train"))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0
    )
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert set(rates) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == pytest.approx(16e-3 if "lora_B" in name else 1e-3), name
    kinds = {"pools.down.lora_B", "q_proj.lora_B", "pools.gate_up.lora_A", "mlp.gate."}
    assert all(any(kind in name for name in rates) for kind in kinds)


def test_a_young_row_of_b_takes_the_step_of_its_group():
    """Growth under LoRA+: the first step of an Adam is the learning rate, B's is ratio times it."""
    ratio, rate = 4, 1e-3
    model = get_peft_model(make_model(), make_settings())
    optimizer = create_loraplus_optimizer(
        model, torch.optim.Adam, lr=rate, loraplus_lr_ratio=ratio, eps=1e-30
    )
    dynamics = drlora.RankDynamics(model, total_steps=8)
    event = dynamics.event_steps[1]  # at the first one, after step 1, nothing is known yet
    plain_loop(model, dynamics, optimizer, range(event))
    pools = [
        pool for layer in adapted_layers(model, "default").values()
        for pool in layer.adapter("default").rank_pools.values()
    ]  # fmt: skip
    young = [pool.birth == event for pool in pools]
    before = [pool.lora_B.detach().clone() for pool in pools]
    plain_loop(model, dynamics, optimizer, range(event, event + 1))
    steps = torch.cat([
        (pool.lora_B.detach() - old)[rows].abs().flatten()
        for pool, old, rows in zip(pools, before, young, strict=True)
    ])  # fmt: skip
    steps = steps[steps > 0]
    assert len(steps) > 100
    torch.testing.assert_close(steps, torch.full_like(steps, rate * ratio), rtol=1e-3, atol=0)


def test_settings_of_a_recipe_reach_the_ordinary_layers():
    from drlora.runs.recipe import make_adapter_config

    for wanted in ("all-linear", ["q_proj"]):
        config = make_adapter_config({**SETTINGS, "target_modules": wanted, "target_rank": 2})
        assert config.target_modules == wanted and config.target_rank == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TypedStorage:UserWarning",
                            "ignore:TorchaoLoraLinear was instantiated:UserWarning")  # fmt: skip
@pytest.mark.parametrize("targets", [None, ATTENTION], ids=["experts", "attention too"])
def test_quantised_attention_beside_the_experts(targets, tmp_path):
    """Like the model with the rounded weights: torchao's int8 weights, where it is installed."""
    quantization = pytest.importorskip("torchao.quantization")

    def adapted(dequantise=False):
        base = make_model()
        linear = [
            module for name, module in base.named_modules()
            if "self_attn." in name and isinstance(module, torch.nn.Linear)
        ]  # fmt: skip
        quantization.quantize_(
            base, quantization.Int8WeightOnlyConfig(), filter_fn=lambda m, _: m in linear
        )
        assert len(linear) == 8 and {m.weight.qdata.dtype for m in linear} == {torch.int8}
        for module in linear if dequantise else []:
            module.weight = torch.nn.Parameter(module.weight.dequantize())
        torch.manual_seed(0)
        return get_peft_model(base, make_settings(target_modules=targets))

    model, twin = adapted(), adapted(dequantise=True)
    for each in (model, twin):
        for index, parameter in enumerate(trainable(each)):
            torch.manual_seed(index)
            parameter.data.normal_(std=0.1)
        each.train()(**make_batch()).loss.backward()
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    for one, other in zip(trainable(model), trainable(twin), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm()

    model = adapted()
    before = logits(model)
    train(model).save_pretrained(tmp_path)
    assert not torch.equal(logits(model), before)
    loaded = PeftModel.from_pretrained(adapted().unload(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    if targets is None:  # with LoRA on them, PEFT would have to quantise the sum anew
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"((\w+\.?)+)+!", "takes more than .* repetitions inside repetitions"),
        (r"(.*\w)*\d*!", "takes more than"),
        ("(", "is no regular expression"),
        ("[a-", "is no regular expression"),
    ],
)
def test_a_pattern_that_never_ends_or_is_none_is_refused(pattern, said, monkeypatch):
    monkeypatch.setattr(ordinary, "LONGEST_MATCH_SECONDS", 0.5)
    model = make_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(drlora.ConfigError, match=said):
        get_peft_model(model, drlora.DrLoraConfig(target_modules=pattern))
    assert [name for name, _ in model.named_modules()] == names
