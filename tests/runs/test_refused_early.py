"""What TRL, a template or a method says against a recipe is said before any weight is loaded.

Run: make test ARGS=tests/runs/test_refused_early.py
"""

from __future__ import annotations

import json
import logging

import pytest
import yaml
from tiny import make_class
from tiny_run import make_tokenizer, save_all

from drlora.cli.main import main
from drlora.runs.recipe import load_recipe

PAIR = {"prompt": "ab:", "chosen": " ba", "rejected": " no"}
VERDICT = {"prompt": "ab:", "completion": " ba"}


def save(folder, objective="sft", **changes):
    """A recipe whose model has no weights."""
    path = save_all(folder, objective=objective, **changes)
    if objective != "sft":
        row = PAIR if objective == "dpo" else VERDICT
        for name in ("train", "eval"):
            rows = [{**row, "prompt": f"{name[0]}{letter}:"} for letter in "abcdefghijkl"]
            if objective == "kto":
                rows = [{**one, "label": bool(n % 2)} for n, one in enumerate(rows)]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "model" / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize(
    ("objective", "training", "said"),
    [
        ("sft", dict(loss_type="x"), "loss_type='x' is none that SFTTrainer"),
        ("sft", dict(activation_offloading=True), "this run is on the CPU"),
        ("dpo", dict(loss_type=["x"]), "loss_type='x' is none that DPOTrainer"),
        ("dpo", dict(f_divergence_type="x"), "f_divergence_type='x' is none"),
        ("dpo", dict(loss_type=["nca_pair"], f_divergence_type="forward_kl"), "only supported for"),
        ("dpo", dict(loss_type=["aot"], use_weighting=True), "WPO-style weighting"),
        ("kto", dict(loss_type="x"), "loss_type='x' is none that KTOTrainer"),
    ],
)
def test_what_trl_refuses(tmp_path, capsys, objective, training, said):
    path = save(tmp_path, objective, training=training)
    for more in (["--dry-run"], []):
        assert main(["train", str(path), *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "training"),
    [
        ("sft", dict(label_smoothing_factor=0.1)),
        ("dpo", dict(precompute_ref_log_probs=True)),
        ("dpo", dict(loss_type=["sigmoid", "bco_pair"], loss_weights=[1, 1])),
        ("kto", dict(loss_type="apo_zero_unpaired")),
    ],
)
def test_what_is_fit_is_found_fit(tmp_path, objective, training, recwarn, caplog):
    """And the rehearsal says nothing that training will say again."""
    path = save(tmp_path, objective, training=training)
    with caplog.at_level(logging.WARNING):
        assert main(["train", str(path), "--dry-run"]) == 0
    assert not [w for w in recwarn if "meta" in str(w.message)]
    assert not [r for r in caplog.records if r.name.startswith("trl")]


def test_reference_log_probabilities_beforehand_and_label_smoothing_train(tmp_path):
    for name, objective, training in (
        ("dpo", "dpo", dict(precompute_ref_log_probs=True)),
        ("sft", "sft", dict(label_smoothing_factor=0.1)),
    ):
        path = save(
            tmp_path / name, objective, training=dict(max_steps=8, save_steps=8, **training)
        )
        make_class("OlmoeForCausalLM", vocab_size=len(make_tokenizer())).save_pretrained(
            tmp_path / name / "model"
        )
        assert main(["train", str(path)]) == 0


@pytest.mark.parametrize("column", ["images", "image", "audio"])
def test_what_is_seen_or_heard_is_refused_with_a_way_out(tmp_path, capsys, column):
    path = save(tmp_path)
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"prompt": "a", "completion": "b", column: ["x.png"]}) + "\n"
    )
    assert main(["train", str(path), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"has '{column}' beside" in said and "TRL's (SFTTrainer with the model's proc" in said


def test_a_model_that_sees_is_refused_with_a_way_out(tmp_path, capsys):
    path = save(tmp_path)
    make_class("Qwen3VLMoeForConditionalGeneration").config.save_pretrained(tmp_path / "model")
    assert main(["train", str(path), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "gives no causal language model" in said and "trained from a script" in said


def test_what_a_method_decides_is_told_once(tmp_path, capfd):
    path = save(tmp_path)
    tree = yaml.safe_load(path.read_text())
    tree["adapter"]["options"] = {"layer_floor": 0.5, "rank_per": "expert"}
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "decides" not in capfd.readouterr().err
    assert main(["train", str(path), "method=adalora", "--dry-run"]) == 0
    said = capfd.readouterr().err
    assert said.count("method adalora decides") == 1
    assert "adapter.r_init is 5 instead of 1" in said
    assert "adapter.options.layer_floor=0.5 has no effect and is left out" in said
    assert "adapter.options.rank_per is 'projection', not 'expert'" in said
    capfd.readouterr()
    recipe = load_recipe(path, ["method=drlora"])
    assert recipe.adapter.r_init == 1 and "decides" not in capfd.readouterr().err
