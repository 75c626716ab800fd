"""A merged model keeps its base's config.json and tokenizer files, in whatever form they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_batch, make_model
from tiny_adapter import logits, trained
from tiny_run import save_all
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drlora.cli.main import main
from drlora.export.plan import apply_plan, make_plan

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


def hub_form(folder, theta=500000.0, **more):
    """Rewrite config.json as the hub has it: the names of transformers 4."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", None) or config["num_experts"]
    config.pop("rope_parameters")
    config |= {
        "rope_theta": theta,
        "rope_scaling": None,
        "torch_dtype": config.pop("dtype"),
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return config


def merged(folder, out, dtype=torch.float32):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = trained(base=base)
    wanted = logits(model)
    made = apply_plan(make_plan(model, "merged"), model, BATCHES, out)
    return wanted, made, json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "qwen2_moe"])
def test_the_hubs_form_is_kept(tmp_path, family):
    make_model(family).save_pretrained(tmp_path / "base")
    before = hub_form(tmp_path / "base")
    wanted, made, found = merged(tmp_path / "base", tmp_path / "out")
    assert found == before and not made.notes
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert read.rope_parameters["rope_theta"] == 500000.0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)


def test_dtype_and_quantisation_are_what_changes(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    before = hub_form(tmp_path / "base", own_words="are kept")
    _, _, found = merged(tmp_path / "base", tmp_path / "out", torch.bfloat16)
    assert found == before | {"torch_dtype": "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_where_it_reads_otherwise_transformers_form_is_written(tmp_path):
    """Such as of a model whose configuration was changed after it was loaded."""
    make_model().save_pretrained(tmp_path / "base")
    hub_form(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.config.num_experts_per_tok = 3
    model = trained(base=base)
    made = apply_plan(make_plan(model, "merged"), model, BATCHES, tmp_path / "out")
    assert [n for n in made.notes if "reads otherwise (num_experts_per_tok)" in n]
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["num_experts_per_tok"] == 3 and "rope_parameters" in found


def test_tokens_of_ones_own(tmp_path):
    """Embeddings of other rows: the base's form with the new number."""
    make_model().save_pretrained(tmp_path / "base")
    before = hub_form(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 5)
    model = trained(base=base)
    apply_plan(make_plan(model, "merged"), model, BATCHES, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == before | {"vocab_size": before["vocab_size"] + 5}
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert rows == found["vocab_size"]


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}"])
def test_the_tokenizers_files(tmp_path, template):
    """The base's own, byte by byte."""
    recipe = save_all(tmp_path)
    own = tmp_path / "model" / "tokenizer_config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"of_ours": 1}))
    names = ["tokenizer.json", own.name]
    if template:
        names.append("chat_template.jinja")
        (tmp_path / "model" / names[-1]).write_text(template)
    assert main(["train", str(recipe)]) == 0
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--format", "merged", "-o", str(out)]) == 0
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_tokenizer_of_the_runs_own(tmp_path):
    """Is written; the base's is another."""
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    recipe = save_all(tmp_path, chat_template=str(tmp_path / "own.jinja"))
    assert main(["train", str(recipe)]) == 0
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--format", "merged", "-o", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0].content }}"
