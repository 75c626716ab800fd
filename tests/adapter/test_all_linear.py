"""`all-linear` and `all-stack` in every class: what they find, and what they must leave alone."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from all_classes import ALL_CLASSES, make_base
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import trainable
from tiny_adapter import make_settings

import drlora
from drlora import ConfigError, DrLoraConfig
from drlora.adapter.linear import choose_targets
from drlora.moe.blocks import find_blocks

# Routers that are made of linear layers, or are not recognised, and what chooses in attention.
CHOOSING = r"\.(router|mlp\.gate|ffn\.router|indexer)(\.|$)"
TOWERS = ["Llama4ForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration",
          "Qwen3OmniMoeThinkerForConditionalGeneration",
          "AriaForConditionalGeneration"]  # fmt: skip


def text_batch(model, length=12):
    vocabulary = min(getattr(model.config.get_text_config(), "vocab_size", 64), 64)
    ids = torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


@pytest.mark.parametrize("class_name", ALL_CLASSES)
def test_what_they_find_in_every_class(class_name):
    model = make_base(class_name)
    blocks = find_blocks(model)
    found = {
        wanted: choose_targets(model, make_settings(target_modules=wanted), blocks)
        for wanted in ("all-linear", "all-stack")
    }
    assert set(found["all-stack"]) <= set(found["all-linear"]) and found["all-stack"]
    assert not [name for name in found["all-linear"] if re.search(CHOOSING, f".{name}")]
    assert len({re.split(r"\.\d+\.", name)[0] for name in found["all-stack"]}) == 1
    for name in found["all-linear"]:
        kind = type(model.get_submodule(name))
        assert kind is torch.nn.Linear, f"{name} is a {kind.__name__}, which computes otherwise"


@pytest.mark.parametrize("class_name", ["DbrxForCausalLM", "HunYuanMoEV1ForCausalLM",
                                        "Gemma4ForConditionalGeneration", "ZayaForCausalLM",
                                        "JetMoeForCausalLM"])  # fmt: skip
def test_routing_stays_frozen_where_routers_are_made_of_linear_layers(class_name):
    """A trained router sends tokens elsewhere, which `router=frozen` promises not to."""
    model = get_peft_model(
        make_base(class_name), make_settings(target_modules="all-linear", router="frozen")
    )
    routers = [
        n
        for n, m in model.named_modules()
        if re.search(r"Router|Gating|Gate$", str(type(m).__name__))
    ]
    assert routers
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and any(name.startswith(f"{r}.") for r in routers)
    ]
    assert not inside


@pytest.mark.parametrize(
    ("class_name", "wanted"),
    [
        ("DbrxForCausalLM", ["router.layer"]),
        ("DbrxForCausalLM", r".*\.layer"),
        ("ZayaForCausalLM", ["down_proj"]),  # whose experts' down_proj is no layer
        ("JetMoeForCausalLM", ["router.layer"]),
    ],
)
def test_a_part_of_a_router_that_is_named_is_refused(class_name, wanted):
    with pytest.raises(ConfigError, match="which is a router or a part of one"):
        get_peft_model(make_base(class_name), make_settings(target_modules=wanted))


def test_a_linear_layer_that_computes_something_else_is_left_alone():
    """DeepSeek-V4's grouped projection: PEFT's LoRA on it fails in the first pass."""
    model = get_peft_model(
        make_base("DeepseekV4ForCausalLM"), make_settings(target_modules="all-linear")
    )
    assert torch.isfinite(model(**text_batch(model)).loss)
    with pytest.raises(
        ConfigError, match="o_a_proj, a DeepseekV4GroupedLinear and no linear layer"
    ):
        get_peft_model(
            make_base("DeepseekV4ForCausalLM"), make_settings(target_modules=["o_a_proj"])
        )


@pytest.mark.parametrize("class_name", TOWERS)
def test_a_budget_in_common_goes_to_no_tower(class_name, tmp_path):
    """What experts save would be lost there to a run on text, which no tower sees."""
    config = DrLoraConfig.for_method("lora-all-linear", r_target=8, r_max=8)
    with pytest.warns(UserWarning, match=r"linear layers outside of the stack .* get no LoRA"):
        model = get_peft_model(make_base(class_name), config)
    assert model.peft_config["default"].target_modules == "all-stack"
    layers = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert layers and not [n for n in layers if re.search("vis|audio|projector|merger", n)]
    model(**text_batch(model)).loss.backward()
    assert all(p.grad is not None for p in trainable(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(class_name), tmp_path)
    assert layers == [n for n, m in again.named_modules() if isinstance(m, LoraLayer)]


@pytest.mark.parametrize("wanted", ["all-linear", "all-stack"])
def test_layers_that_learn_nothing_are_told(wanted):
    model = get_peft_model(
        make_base("Llama4ForConditionalGeneration"), make_settings(target_modules=wanted)
    )
    dynamics = drlora.RankDynamics(model, total_steps=4)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**text_batch(model)).loss.backward()
            dynamics.before_optimizer_step()
            optimizer.step()
            dynamics.after_optimizer_step(optimizer)
            optimizer.zero_grad()
    messages = [str(one.message) for one in told]
    said = [one for one in messages if "had no gradient in the first step" in one]
    assert len(said) == (1 if wanted == "all-linear" else 0)
    assert not said or "modules of target_modules" in said[0] and "use all-stack" in said[0]


def test_a_copy_that_learns_nothing_is_told():
    """The projector of images in a run on text; the head beside it learns."""
    model = get_peft_model(
        make_base("Llama4ForConditionalGeneration"),
        make_settings(modules_to_save=["multi_modal_projector", "lm_head"]),
    )
    dynamics = drlora.RankDynamics(model, total_steps=4)
    model(**text_batch(model)).loss.backward()
    with pytest.warns(UserWarning, match="1 of the 2 modules of modules_to_save had no gradient"):
        dynamics.before_optimizer_step()


@pytest.mark.parametrize("class_name", ["Qwen3NextForCausalLM", "JambaForCausalLM"])
def test_ranks_are_placed_where_layers_have_states_instead_of_a_cache(class_name):
    config = DrLoraConfig.for_method("lora-all-linear-gradient", r_target=8, r_max=8)
    model = get_peft_model(make_base(class_name), config)
    text = model.config.get_text_config()
    text.use_cache = True
    batch = text_batch(model)
    del batch["use_cache"]
    drlora.place_ranks(model, [batch])
    assert text.use_cache is True
    r_target = model.peft_config["default"].r_target
    found = [r for ranks in drlora.rank_map(model).values() for rs in ranks.values() for r in rs]
    assert found and set(found) == {r_target}
