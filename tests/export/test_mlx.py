"""The format mlx: names, shapes, and what mlx-lm's arithmetic makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_batch, make_model
from tiny_adapter import logits, trained

from drlora.errors import ConfigError
from drlora.export.plan import apply_plan, make_plan

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
FAMILIES = {
    "olmoe": "mlp", "qwen3_moe": "mlp", "qwen2_moe": "mlp", "mixtral": "block_sparse_moe",
}  # fmt: skip
BESIDE = {"router": "train", "target_modules": ["q_proj"], "target_rank": 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_the_adapters_updates(tmp_path, family):
    """lora_b @ lora_a of each expert, and (lora_a @ lora_b)^T of each linear layer."""
    model, block = trained(family, **BESIDE), FAMILIES[family]
    plan = make_plan(model, "mlx")
    updates = plan.updates
    apply_plan(plan, model, BATCHES, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = [f"{block}.gate", *(f"{block}.switch_mlp.{p}_proj" for p in ("down", "gate", "up"))]
    assert config["lora_parameters"]["keys"] == [*names, "self_attn.q_proj"]
    assert config["num_layers"] == 2 and config["lora_parameters"]["scale"] == 1.0
    assert config["lora_parameters"]["rank"] == plan.rank
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    assert size == plan.weight_bytes
    for layer in range(2):
        place = f"model.layers.{layer}."

        def delta(leaf, place=place):
            return tensors[f"{place}{leaf}.lora_b"] @ tensors[f"{place}{leaf}.lora_a"]

        gate_up = updates.experts[f"{place}mlp.experts.gate_up_proj"]
        down = updates.experts[f"{place}mlp.experts.down_proj"]
        found = [delta(f"{block}.switch_mlp.{p}_proj") for p in ("gate", "up")]
        for expert in range(len(down.a)):
            wanted = gate_up.b[expert] @ gate_up.a[expert]
            both = torch.cat([part[expert] for part in found])
            torch.testing.assert_close(both, wanted, rtol=0, atol=1e-6)
            wanted = down.b[expert] @ down.a[expert]
            own = delta(f"{block}.switch_mlp.down_proj")[expert]
            torch.testing.assert_close(own, wanted, rtol=0, atol=1e-6)
        for leaf, name in ((f"{block}.gate", "mlp.gate"), ("self_attn.q_proj",) * 2):
            factors = updates.linears[place + name]
            a, b = (tensors[f"{place}{leaf}.lora_{x}"] for x in "ab")
            assert a.shape[1] == b.shape[0] == plan.rank
            torch.testing.assert_close((a @ b).T, factors.b[0] @ factors.a[0], rtol=0, atol=1e-6)


def test_what_it_has_no_place_for():
    with pytest.raises(ConfigError, match="trained in full.*merged"):
        make_plan(trained("olmoe", modules_to_save=["lm_head"]), "mlx")


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_gives_the_adapters_logits(tmp_path, family):
    """Where mlx-lm is installed; its classes take the configuration in the form of the hub."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    make_model(family).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    if family == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    path.write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": None}))
    model = trained(family, **BESIDE)
    wanted = logits(model).numpy()
    apply_plan(make_plan(model, "mlx"), model, BATCHES, tmp_path / "out")
    loaded, _ = utils.load_model(tmp_path / "base")
    plain = np.array(loaded(mx.array(IDS.numpy())))
    assert np.abs(plain - wanted).max() > 0.05
    adapted = utils.load_adapters(loaded, str(tmp_path / "out"))
    adapted.eval()
    found = np.array(adapted(mx.array(IDS.numpy())))
    assert np.abs(found - wanted).max() < 1e-4
