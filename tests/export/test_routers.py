"""Trained routers leave as LoRA: what PEFT makes of them, and keys by the rules of each engine."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_batch, make_class, make_model
from tiny_adapter import logits, make_settings, trained
from tiny_run import save_all

from drlora.cli.main import main
from drlora.errors import CheckpointError, ConfigError
from drlora.export import peft_lora
from drlora.export.plan import apply_plan, make_plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)
IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
FAMILIES = ["olmoe", "qwen3_moe", "mixtral", "qwen2_moe"]
# What each family's checkpoint calls its router.
GATES = dict.fromkeys(FAMILIES, "mlp.gate") | {"mixtral": "block_sparse_moe.gate"}


def moved(family="olmoe", **changes):
    """A model with a trained adapter whose routers have gone far."""
    model = trained(family, **{"router": "train", **changes})
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["peft", "per-expert"])
@pytest.mark.parametrize("attention", [False, True])
def test_peft_gives_the_adapters_logits(tmp_path, family, format, attention):
    changes = {"target_modules": ["q_proj"], "target_rank": 3} if attention else {}
    model = moved(family, **changes)
    wanted = logits(model)
    assert (wanted - logits(trained(family, router="train", **changes))).abs().max() > 0.05
    plan = make_plan(model, format, routers="exact")
    assert plan.rank >= (4 if family == "mixtral" else 6)
    assert set(plan.updates.routers.values()) == {0.0} and not plan.updates.modules
    made = apply_plan(plan, model, BATCHES, tmp_path / "out")
    assert made.difference.largest < 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["r"] == config["lora_alpha"]
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in keys)
    if (family, format) != ("qwen2_moe", "per-expert"):  # PEFT does not load that from a folder
        loaded = PeftModel.from_pretrained(make_model(family), tmp_path / "out")
        torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_as_engines_ask(tmp_path, family):
    """vLLM: no modules_to_save; llama.cpp: lora_A and lora_B alone, one rank, stored names."""
    model = moved(family)
    gate = model.get_base_model().get_submodule("model.layers.1.mlp.gate")
    after_EH, before_EH = gate.modules_to_save["default"].weight, gate.original_module.weight
    update_EH = (after_EH - before_EH).detach().clone()
    plan = make_plan(model, "per-expert", routers="exact")
    apply_plan(plan, model, BATCHES, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "gate" in config["target_modules"] and config["target_parameters"] is None
    assert config["modules_to_save"] is None
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"}
    assert {x.shape[0 if ".lora_A." in key else 1] for key, x in keys.items()} == {plan.rank}
    prefix = f"base_model.model.model.layers.1.{GATES[family]}."
    a_rH, b_Er = keys[prefix + "lora_A.weight"], keys[prefix + "lora_B.weight"]
    torch.testing.assert_close(b_Er @ a_rH, update_EH, rtol=0, atol=1e-7)
    assert torch.equal(b_Er[:, : len(b_Er)], torch.eye(len(b_Er)))
    assert any("SGLang has no LoRA on routers" in note for note in plan.notes)


@pytest.mark.parametrize("format", ["peft", "per-expert"])
def test_a_rank_that_is_too_small_keeps_the_largest_part(tmp_path, format):
    """And says what is left out; what was promised is then given exactly."""
    model = moved(r_init=2, r_target=2, r_max=2)
    gate = model.get_base_model().get_submodule("model.layers.0.mlp.gate")
    before_EH = gate.original_module.weight.detach().clone()
    update_EH = gate.modules_to_save["default"].weight.detach() - before_EH
    plan = make_plan(model, format, routers="lora")
    assert plan.rank == 2
    u, s, v = torch.linalg.svd(update_EH.double(), full_matrices=False)
    share = plan.updates.routers["model.layers.0.mlp.gate"]
    assert share == pytest.approx((s[2:].norm() / s.norm()).item()) and share > 0.1
    worst = max(plan.updates.routers.values())
    assert any("rank 2 leaves a part" in n and f"{worst:.2%}" in n for n in plan.notes)
    wanted_EH = before_EH + (u[:, :2] * s[:2] @ v[:2]).float()
    made = apply_plan(plan, model, BATCHES, tmp_path / "out")
    assert made.difference.is_rounding
    assert any("left out of the routers moves logits by" in note for note in made.notes)
    record = json.loads((tmp_path / "out" / "drlora_export.json").read_text())
    assert record["routers_as_lora"] == plan.updates.routers
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "out").merge_and_unload()
    found_EH = loaded.get_submodule("model.layers.0.mlp.gate").weight.detach()
    torch.testing.assert_close(found_EH, wanted_EH, rtol=0, atol=1e-6)


def test_what_each_format_does_by_itself():
    full, lora = (make_plan(moved(), format) for format in ("peft", "per-expert"))
    assert full.updates.modules and not full.updates.routers
    assert lora.updates.routers and not lora.updates.modules
    kept = make_plan(moved(), "per-expert", routers="full")
    assert any("engines that take LoRA alone refuse them" in note for note in kept.notes)
    with pytest.raises(ConfigError, match="leave it out"):
        make_plan(moved(), "merged", routers="lora")
    with pytest.raises(ConfigError, match="routers='all' is not known"):
        make_plan(moved(), "peft", routers="all")


def test_a_router_with_a_bias_cannot_be_lora():
    """GPT-OSS; by itself the format keeps it whole."""
    model = get_peft_model(make_class("GptOssForCausalLM"), make_settings(router="train"))
    with pytest.raises(ConfigError, match=r"has \['bias', 'weight'\].*one weight"):
        make_plan(model, "peft", routers="lora")
    assert make_plan(model, "peft").updates.modules


def test_a_wrong_router_is_found(tmp_path, monkeypatch):
    """As LoRA it is compared like every weight."""
    fill = peft_lora._fill

    def enlarged(module, factors, rank):
        fill(module, factors, rank)
        if len(factors.b[0]) == 6:  # the router's
            module.lora_B["default"].weight.data.mul_(1.05)

    monkeypatch.setattr(peft_lora, "_fill", enlarged)
    model = moved()
    plan = make_plan(model, "peft", routers="exact")
    with pytest.raises(CheckpointError, match=r"mlp\.gate is off by"):
        apply_plan(plan, model, BATCHES, tmp_path / "out")


def test_in_16_bits_routers_lose_nothing(tmp_path):
    """As LoRA beside bfloat16 weights; as weights they would be rounded."""
    model = moved(base=make_model().to(torch.bfloat16))
    plan = make_plan(model, "per-expert", routers="exact")
    made = apply_plan(plan, model, BATCHES, tmp_path / "out")
    assert made.difference.is_rounding and not any("rounding" in note for note in made.notes)


def test_the_command_line(tmp_path, capsys):
    recipe = save_all(tmp_path, adapter=dict(router="train"))
    assert main(["train", str(recipe)]) == 0
    command = ["export", str(tmp_path / "run"), "--format", "per-expert", "-o"]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "a"), "--routers", "exact", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert main([*command, str(tmp_path / "a"), "--routers", "exact"]) == 0
    printed = capsys.readouterr().out
    assert planned.splitlines()[:5] == printed.splitlines()[:5]
    assert "trained routers leave as LoRA" in printed
    assert main([*command, str(tmp_path / "b"), "--dry-run"]) == 0
    assert "trained routers leave as LoRA" in capsys.readouterr().out
