"""Every MoE model class on a tiny random model of the real class.

The reference is the class's own eager forward over W + s B A, put in by `functional_call` and
differentiated by torch. It knows by itself where each class keeps its weights (`merged_parameters`)
and shares no code with the families.

What is shown of each class is a row of docs/families.json. A run fails where it shows something
else. To write the rows anew, and then the table in docs/families.md:

    DRLORA_WRITE=docs/families.json make test ARGS="-n 0 tests/moe/test_architectures.py"
    python tools/make_families.py
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from all_classes import ALL_CLASSES, DOCS, EXCEPTIONS, SETTINGS, make_base
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from tiny_config import VOCAB, tiny_config
from torch.func import functional_call

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.errors import CheckpointError
from drlora.export.plan import apply_plan, make_plan
from drlora.moe.families import family_of
from drlora.report.card import MARK
from drlora.report.read import read_run

# Folders of transformers.models with experts in them, and why none of their classes is above.
UNTESTED = {
    "diffusion_gemma": "refused: encoder and decoder have the same experts' weights",
    "doge": "refused: its experts are rows of an embedding, no matrices",
    "ernie4_5_vl_moe": "not tried: text and images have experts of their own",
    "nllb_moe": "refused: a ModuleDict of dense layers, with dropout inside",
    "switch_transformers": "refused: a ModuleDict of dense layers, with dropout inside",
    "vitpose_backbone": "refused: experts of vision layers, chosen by the data set",
}
# What a refused export says -> what the table says.
REASONS = {
    "does not hold its .* in one parameter": "experts are not one parameter a matrix",
    "has no per-expert layout": "its checkpoint keeps experts together",
    "an expert without a gate": "experts have no gate",
    "PEFT does not read back its own LoRA": "PEFT does not read its own LoRA back",
    "PEFT does not read back the per-expert layout": "PEFT's converter does not read it back",
}
SCALING = 8.0 / 4


def logits_of(model):
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(7))
    return model(input_ids=ids, use_cache=False).logits


def randomise(model):
    """LoRA's B starts at zero; give the owned rows values, as training would."""
    generator = torch.Generator().manual_seed(3)
    for layer in adapted_layers(model, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            noise = torch.randn(pool.lora_B.shape, generator=generator) * 0.2
            pool.lora_B.data = torch.where((pool.owner >= 0)[:, None], noise, 0.0)


def updates(pool, a, b, num_experts):
    """(E, O, I)"""
    owned = [pool.owner == expert for expert in range(num_experts)]
    return torch.stack([SCALING * b[rows].T @ a[rows] for rows in owned])


def whole_gate_up(experts, update):
    """(E, G, H) of what was adapted of it."""
    if "gate_up" in update or hasattr(experts, "up_proj"):
        return update.get("gate_up", update.get("up"))
    up = update["up"]
    gate = update.get("gate", torch.zeros_like(up))
    if type(experts).__name__ == "GptOssExperts":
        return torch.stack([gate, up], dim=2).flatten(1, 2)
    return torch.cat([gate, up], dim=1)


def merged_parameters(name, experts, update):
    """Full parameter name -> W + s B A, where each class keeps it."""
    gate_up, down = whole_gate_up(experts, update), update["down"]
    kind = type(experts).__name__
    if kind == "DbrxExperts":
        gate, up = gate_up.chunk(2, dim=1)
        parts = {"mlp.w1": gate, "mlp.v1": up, "mlp.w2": down.transpose(1, 2)}
        parts = {key: part.flatten(0, 1) for key, part in parts.items()}
    elif kind == "JetMoeMoE":
        parts = {"input_linear.weight": gate_up, "output_linear.weight": down}
    else:
        if getattr(experts, "is_transposed", kind == "Llama4TextExperts"):
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        parts = {"up_proj" if hasattr(experts, "up_proj") else "gate_up_proj": gate_up}
        if kind == "LongcatFlashExperts":  # rows of the zero experts, read by nothing
            missing = len(experts.gate_up_proj) - len(gate_up)
            parts["gate_up_proj"] = torch.cat([gate_up, torch.zeros_like(gate_up[:1]).expand(
                missing, -1, -1)])  # fmt: skip
        parts["down_proj"] = down
    return {f"{name}.{key}": experts.get_parameter(key) + part for key, part in parts.items()}


def check_outputs_and_gradients(model, base):
    logits = logits_of(model)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    factors, copies, merged = [], [], {}
    for layer in adapted_layers(model, "default").values():
        update = {}
        for projection, pool in layer.adapter("default").rank_pools.items():
            pair = [pool.lora_A, pool.lora_B]
            own = [factor.detach().clone().requires_grad_() for factor in pair]
            factors, copies = factors + pair, copies + own
            update[projection] = updates(pool, *own, layer.block.num_experts)
        name = layer.block.experts_name
        merged |= merged_parameters(name, base.get_submodule(name), update)

    def forward(input_ids, use_cache):
        arguments = dict(input_ids=input_ids, use_cache=use_cache)
        return functional_call(base, merged, kwargs=arguments)

    wanted = logits_of(forward)
    assert (wanted - logits_of(base)).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad((logits * probe).sum(), factors)
    for g, w in zip(got, torch.autograd.grad((wanted * probe).sum(), copies), strict=True):
        assert (g - w).norm() < 1e-4 * w.norm().clamp(min=1e-6)


def chosen_routing(base, block):
    """(E,) routing weights summed over tokens, from the router's own answer to the class itself."""
    experts, sums = base.get_submodule(block.experts_name), torch.zeros(block.num_experts)
    kind = type(experts).__name__

    def note_call(module, args, kwargs):
        index, weight = [*args, *kwargs.values()][1:3]
        for expert in range(block.num_experts):
            sums[expert] += weight[index == expert].sum()

    def note_scores(module, args, output):
        sums.add_(output[0].sum(dim=0))

    def note_sorted(module, args, output):
        _, _, weight, counts, _ = output
        for expert, part in enumerate(weight.split(counts)):
            sums[expert] += part.sum()

    if kind == "Llama4TextExperts":
        return sums, base.get_submodule(block.router_name).register_forward_hook(note_scores)
    if kind == "JetMoeMoE":
        return sums, experts.router.register_forward_hook(note_sorted)
    return sums, experts.register_forward_pre_hook(note_call, with_kwargs=True)


def check_routing(model, base):
    """In a model whose adapter is new, so that both route alike."""
    layers = adapted_layers(model, "default").values()
    noted = [(layer, *chosen_routing(base, layer.block)) for layer in layers]
    logits_of(base)
    model.train()
    for module in model.modules():  # training counts; dropout would change what is routed
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits_of(model).sum().backward()
    model.eval()
    for layer, wanted, hook in noted:
        hook.remove()
        assert wanted.sum() > 0
        meter = layer.adapter("default").meter
        torch.testing.assert_close(meter.sum_E, wanted, rtol=1e-4, atol=1e-4)
        assert meter.num_tokens.item() == 24
    model.zero_grad()


def check_growth(model):
    before = logits_of(model)
    for layer in adapted_layers(model, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            ones = [1] * layer.block.num_experts
            assert len(pool.grant(ones, step=1)) == layer.block.num_experts
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-5)


def check_save_load(model, base, folder):
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-5, atol=1e-5)
    check_card(model, folder)


def check_card(model, folder):
    """Wherever a class keeps its experts, the folder tells the ranks, and has a card."""
    run = read_run(folder)
    wanted = {name: layer.adapter("default").ranks() for name, layer in
              adapted_layers(model, "default").items()}  # fmt: skip
    for rank_map in run.maps:
        for projection in rank_map.projection.split("+"):
            read = dict(zip(rank_map.blocks, rank_map.final(), strict=True))
            assert read == {name: ranks[projection] for name, ranks in wanted.items()}
    card = ModelCard.load(folder / "README.md")
    assert f"{len(wanted)} blocks of" in card.text and MARK in card.text


def check_merge(merged, wanted):
    assert not any("drlora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)


def check_export(model, base, format, folder):
    """Exported and loaded again without drlora, or why the class cannot have the format.

    `merged` uses the model up: its weights are merged then.
    """
    wanted = logits_of(model)
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(8))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    plan = None
    try:
        plan = make_plan(model, format)
        used = model if format == "merged" else copy.deepcopy(model)
        apply_plan(plan, used, batches, folder)  # compares logits itself
    except (drlora.ConfigError, CheckpointError) as error:
        assert format != "merged"
        assert format != "peft" or plan is None, "the plan did not say so"
        return next(said for reason, said in REASONS.items() if re.search(reason, str(error)))
    if format == "per-expert":  # read back above; from a folder PEFT loads it for some classes
        return "yes"
    if format == "peft":
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert loaded.peft_config["default"].peft_type == "LORA"
    else:
        loaded = type(base).from_pretrained(folder)
    difference = (logits_of(loaded.eval()) - wanted).abs().max()
    assert difference < 1e-5 * max(1, wanted.abs().max())
    return "yes"


@pytest.mark.parametrize("class_name", ALL_CLASSES)
@torch.enable_grad()
def test_model_class(class_name, tmp_path):
    with torch.no_grad():
        base = make_base(class_name)
    generates = hasattr(base, "prepare_inputs_for_generation")
    task = "CAUSAL_LM" if generates else "FEATURE_EXTRACTION"
    config = drlora.DrLoraConfig(**SETTINGS, task_type=task)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    row = description(base)
    check_routing(model, base)
    randomise(model)
    check_outputs_and_gradients(model, base)
    with torch.no_grad():
        check_growth(model)
        check_save_load(model, base, tmp_path)
        wanted = logits_of(model)
        row["exports"] = {
            format: check_export(model, base, format, tmp_path / format)
            for format in ("peft", "per-expert", "merged")
        }
        check_merge(model.get_base_model(), wanted)
    shown = ["outputs and gradients", "routing", "growth", "save and load", "merge"]
    compare_or_write(class_name, {**row, "shown": shown})


def description(base):
    """How the experts of a model differ from the common layout."""
    block = drlora.moe.blocks.find_blocks(base)[0]
    experts = base.get_submodule(block.experts_name)
    family = family_of(experts)
    weights = family.weights(experts)
    differences = {
        "transposed": any(
            part.is_transposed
            for matrix in (weights.gate_up, weights.down)
            for part in matrix.parts
        ),
        "interleaved": block.is_interleaved,
        "biases": weights.down_bias_EH is not None,
        "no gate": not block.has_gate,
        "norm after each expert": weights.post_norm is not None,
    }
    return {
        "experts": type(experts).__name__,
        "family": type(family).__name__,
        "differs": [word for word, differs in differences.items() if differs],
        "router": block.router_name is not None,
        "shared_experts": bool(block.shared_names),
    }


def compare_or_write(class_name, row):
    """What was just shown is what the documentation says; written there if asked for."""
    if path := os.environ.get("DRLORA_WRITE"):
        file = Path(path)
        said = json.loads(file.read_text()) if file.exists() else {"classes": {}}
        classes = {name: old for name, old in said["classes"].items() if name in ALL_CLASSES}
        said = {
            "transformers": transformers.__version__,
            "classes": dict(sorted({**classes, class_name: row}.items())),
            "untested": UNTESTED,
        }
        file.write_text(json.dumps(said, indent=1) + "\n")
        return
    assert json.loads((DOCS / "families.json").read_text())["classes"][class_name] == row


def test_the_table_in_the_documentation_is_up_to_date():
    said = json.loads((DOCS / "families.json").read_text())
    assert list(said["classes"]) == sorted(ALL_CLASSES)
    assert said["untested"] == UNTESTED
    spec = importlib.util.spec_from_file_location(
        "make_families", DOCS.parent / "tools" / "make_families.py"
    )
    make_families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_families)
    page = (DOCS / "families.md").read_text()
    assert page == make_families.with_tables(page, said)


def test_every_model_with_experts_is_tested_or_has_a_reason():
    """By the names of classes in transformers' source, so that a new version shows what is new."""
    experts = re.compile(r"^class \w*(Experts|MoE|SparseMLP|NaiveMoe)\(", re.MULTILINE)
    folder = Path(transformers.__file__).parent / "models"
    sources = folder.glob("*/modeling_*.py")
    with_experts = {file.parent.name for file in sources if experts.search(file.read_text())}
    tested = {getattr(transformers, name).__module__.split(".")[2] for name in ALL_CLASSES}
    assert with_experts - tested == set(UNTESTED)


@pytest.mark.parametrize("projections", [["up", "down"], ["gate", "up", "down"]], ids="+".join)
@pytest.mark.parametrize("class_name", ["GptOssForCausalLM", "NemotronHForCausalLM", *EXCEPTIONS])
def test_other_projections(class_name, projections):
    with torch.no_grad():
        base = make_base(class_name)
    config = drlora.DrLoraConfig(**SETTINGS, projections=projections)
    if class_name == "NemotronHForCausalLM" and "gate" in projections:
        with pytest.raises(drlora.ConfigError, match="mixer have no gate"):
            get_peft_model(base, config)
        return
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomise(model)
    check_outputs_and_gradients(model, base)


@pytest.mark.parametrize("class_name", EXCEPTIONS)
def test_a_trained_router_is_found_and_saved(class_name, tmp_path):
    with torch.no_grad():
        base = make_base(class_name)
    config = drlora.DrLoraConfig(**SETTINGS, router="train")
    if class_name == "JetMoeForCausalLM":
        with pytest.raises(drlora.ConfigError, match="layers.0.mlp: its router is inside"):
            get_peft_model(base, config)
        return
    model = get_peft_model(copy.deepcopy(base), config).eval()
    routers = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert len(routers) == len(adapted_layers(model, "default"))
    with torch.no_grad():
        for router in routers:
            router.add_(torch.randn_like(router) * 0.1)
        check_save_load(model, base, tmp_path)
        wanted = logits_of(model)
        check_merge(model.merge_and_unload(), wanted)


@pytest.mark.parametrize(
    ("class_name", "said"),
    [
        ("SwitchTransformersForConditionalGeneration", r"mlp.experts \(SwitchT.*not understood"),
        ("NllbMoeForConditionalGeneration", r"ffn.experts \(NllbMoeE.*not understood"),
        ("VitPoseBackbone", r"experts \(VitPoseNaiveMoe.*not understood"),
        ("DogeForCausalLM", "no Mixture-of-Experts block"),
        ("DiffusionGemmaForBlockDiffusion", r"experts \(DiffusionGemmaT.*also those of model"),
    ],
)
def test_refused_class(class_name, said):
    model_class = getattr(transformers, class_name)
    changes = {"num_experts": 4, "part_features": 8} if "VitPose" in class_name else {}
    base = model_class(tiny_config(model_class.config_class, **changes))
    config = drlora.DrLoraConfig(**SETTINGS, task_type="FEATURE_EXTRACTION")
    with pytest.raises(drlora.ConfigError, match=said):
        get_peft_model(base, config)


def test_there_are_enough():
    assert len(set(ALL_CLASSES)) == len(ALL_CLASSES) >= 30
