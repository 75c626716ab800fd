"""The realistic model: a dense model's weights in a mixture computes what the dense model does."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from drlora.export.choices import ROUNDINGS

SCRIPTS = Path(__file__).parents[2] / "experiments" / "realistic"
if not SCRIPTS.is_dir():
    pytest.skip("this source distribution came without experiments/", allow_module_level=True)


def script(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"realistic_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, check, merges = script("build"), script("check"), script("merges")
IDS = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mixture(dense):
    torch.manual_seed(1)
    model = MixtralForCausalLM(build.mixtral_config(dense.config, 4)).eval()
    build.fill(model, dense.state_dict(), seed=0)
    model.tie_weights()
    return model


def test_experts_without_noise_are_the_dense_model(dense, monkeypatch):
    monkeypatch.setattr(build, "NOISE", 0.0)
    with torch.no_grad():
        wanted, found = dense(IDS).logits, mixture(dense)(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_with_noise_experts_differ_a_little(dense):
    experts = mixture(dense).model.layers[1].mlp.experts
    for stack in (experts.gate_up_proj, experts.down_proj):
        spread = ((stack[0] - stack[1]).std() / stack.std()).item()
        assert spread == pytest.approx(build.NOISE * 2**0.5, rel=0.1)


def test_the_check_plants_each_kind_of_defect():
    """Every format meets a dropped expert, and every way of merging one that does nothing."""
    cases = {(format, defect) for format, _, defect in check.CASES}
    assert {(format, "a dropped expert") for format in ("peft", "per-expert", "merged")} <= cases
    roundings = {rounding for _, rounding, defect in check.CASES if defect == "nothing merged"}
    assert roundings == {"nearest", "stochastic"}


def test_merges_are_compared_with_both_kinds_of_rounding():
    """And the run of a seed can be planned."""
    assert set(merges.MODES) == set(ROUNDINGS)
    recipe = merges.recipe("embedded", 240, 3, Path("somewhere"))
    assert recipe.to_dict()["training"]["seed"] == 3 and recipe.dtype == "bfloat16"
