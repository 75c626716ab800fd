"""Recipes and plans of large models hold together, as far as that shows without a network.

The hub's models are their config.json files (experiments/paper/models) on the meta device, its data
sets one made-up record in their own columns.
Run: make test ARGS=tests/project/test_recipes.py
"""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest

from drlora.adapter.inject import choose_blocks
from drlora.cli.main import main
from drlora.data import load_examples
from drlora.runs.loading import check_growth, load_architecture, model_on_meta
from drlora.runs.recipe import load_recipe
from experiments import estimate

ROOT = Path(__file__).parents[2]
RECIPES = [file for file in estimate.CONFIGS if file.startswith("src/")]
PLANS = [file for file in estimate.CONFIGS if file.startswith("experiments/")]
MODELS = {
    "olmoe-1b-7b": ("OlmoeForCausalLM", 6.9, 64, 8),
    "qwen1.5-moe-a2.7b": ("Qwen2MoeForCausalLM", 14.3, 60, 4),
    "llama-moe-like-3.5b": ("MixtralForCausalLM", 6.7, 16, 4),
    "qwen3-30b-a3b": ("Qwen3MoeForCausalLM", 30.5, 128, 8),
    "gpt-oss-20b": ("GptOssForCausalLM", 20.9, 32, 4),
}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# Data set -> a record in its own columns.
RECORDS = {
    "meta-math/MetaMathQA": {
        "type": "GSM_Rephrased", "query": "1 + 1?", "original_question": "?", "response": "2",
    },
    "HuggingFaceH4/CodeAlpaca_20K": {"prompt": "Reverse a list.", "completion": "x[::-1]"},
    "allenai/tulu-v3.1-mix-preview-4096-OLMoE": {"id": "1", "messages": TURNS, "source": "x"},
    "HuggingFaceH4/ultrachat_200k": {"prompt": "a", "prompt_id": "1", "messages": TURNS},
}  # fmt: skip
MEDMCQA = {
    "id": "1", "question": "Which vitamin? ", "opa": "A", "opb": "B12", "opc": "C", "opd": "D",
    "cop": 1, "choice_type": "single", "exp": None, "subject_name": "x", "topic_name": None,
}  # fmt: skip
WMT = {
    "lp": "en-de", "src": "Good day.", "mt": "Guter Tag", "ref": "Guten Tag.", "score": 0.1,
    "raw": 80.0, "annotators": 1, "domain": "news", "year": 2020,
}  # fmt: skip


def prepare():
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "experiments/paper/prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def skeleton(name):
    return model_on_meta(
        load_architecture(str(ROOT / "experiments" / "paper" / "models" / f"{name}.json"))
    )


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_published_sizes(name):
    kind, billions, experts, active = MODELS[name]
    model = skeleton(name)
    assert type(model).__name__ == kind
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == billions
    config = load_recipe(ROOT / "src/drlora/recipes/paper/gsm8k.yaml").adapter_config()
    assert {block.num_experts for block in choose_blocks(model, config)} == {experts}
    assert model.config.num_experts_per_tok == active


@pytest.mark.parametrize("file", RECIPES)
def test_recipe(file, tmp_path):
    """Its growth spends the budget, its data is read, and what it says of memory is true."""
    recipe, text = load_recipe(ROOT / file), (ROOT / file).read_text("utf-8")
    config = recipe.adapter_config()
    check_growth(skeleton(estimate.CONFIGS[file]), config, recipe.training["max_steps"])
    assert estimate.recipe_line(file) in text.splitlines()
    assert estimate.memory_gb(recipe, estimate.config_of(file)) < 0.93 * estimate.gpu_of(file).gb
    assert re.search(r"^# Needs the hub: ", text, re.M)
    assert recipe.model in text
    source, _ = recipe.data.source("train")
    assert recipe.data.source("eval") != recipe.data.source("train")
    if source in RECORDS:
        (tmp_path / "data.json").write_text(json.dumps([RECORDS[source]]))
        examples = load_examples(str(tmp_path / "data.json"), columns=recipe.data.columns)
        assert {"completion", "messages"} & set(examples.column_names)
    else:
        assert source.startswith("data/") and "experiments/paper/prepare.py" in text
    if "/paper/" in file:
        training = recipe.training
        assert (config.r_init, config.r_target, config.r_max) == (8, 16, 32)
        assert (config.p_grow, config.beta, config.gamma, config.grow_every) == (0.1, 0.9, 1.2, 200)
        assert config.projections == ["up", "down"] and config.router == "train"
        batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        assert (training["max_steps"], batch) == (3750, 48)


def test_prepared_data_is_read(tmp_path):
    made = prepare()
    ledgar = made.ledgar({"text": " The term is one year. ", "label": 1}, ["Taxes", "Terms"])
    again = made.once(made.wmt(record) for record in (WMT, {**WMT, "mt": "x"}))
    made.write(tmp_path, {"medmcqa": [made.medmcqa(MEDMCQA)], "wmt": again, "ledgar": [ledgar]})
    rows = {
        name: load_examples(str(tmp_path / f"{name}.jsonl"))
        for name in ("medmcqa", "wmt", "ledgar")
    }
    assert all(len(found) == 1 for found in rows.values())
    assert rows["medmcqa"][0]["completion"] == " B" and " B" in rows["medmcqa"][0]["choices"]
    assert rows["medmcqa"][0]["prompt"].endswith("D. D\nAnswer:")
    assert rows["wmt"][0]["prompt"].endswith("English: Good day.\nGerman:")
    assert rows["ledgar"][0] == {
        "prompt": "The term is one year.\nKind of provision:", "completion": " Terms",
    }  # fmt: skip


@pytest.mark.parametrize("file", PLANS)
def test_plan(file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["compare", file, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 126 cells done" in shown
    text = (ROOT / file).read_text("utf-8")
    assert estimate.plan_line(file) in text.splitlines()
