"""A measurement says of what it is: model, dtype, how many examples, and what could not be had."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from tiny_run import save_all

from drlora.cli.main import main
from drlora.compare.metrics import value_of
from drlora.errors import ConfigError
from drlora.runs.export import export_adapter
from drlora.runs.recipe import load_recipe

SHORT = dict(training=dict(max_steps=8, save_steps=8))


def evaluated(capsys, *words):
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["eval", *map(str, words)]) == 0
    return found, capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in bfloat16 on a base that is stored in float32."""
    folder = tmp_path_factory.mktemp("run")
    recipe = save_all(folder, dtype="bfloat16", evaluation=dict(loss_examples=200), **SHORT)
    assert main(["train", str(recipe)]) == 0
    return folder / "run"


def test_model_dtype_and_examples(run, capsys):
    found, text = evaluated(capsys, run)
    assert found["model"] == str(run.parent / "model") and found["adapter"] == "DRLORA"
    assert (found["dtype"], found["device"], found["loss"]["examples"]) == ("bfloat16", "cpu", 6)
    assert text.startswith(f"{run.parent / 'model'} with a DR-LoRA adapter, bfloat16 on cpu\n")
    assert "on 6 examples" in text


def test_the_tokens_are_those_that_the_run_learned_from(run, tmp_path, capsys):
    """Of the run's settings, `completion_only_loss: false` has the prompts' tokens too."""
    found, _ = evaluated(capsys, run)
    shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["training"]["completion_only_loss"] = False
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    again, _ = evaluated(capsys, tmp_path / "run")
    assert again["loss"]["target_tokens"] > found["loss"]["target_tokens"]


@pytest.mark.parametrize(("format", "adapter"), [("peft", "LORA"), ("merged", None)])
def test_an_export_is_measured_in_the_dtype_that_it_was_made_in(
    run, tmp_path, capsys, format, adapter
):
    assert main(["export", str(run), "--format", format, "-o", str(tmp_path / format)]) == 0
    found, text = evaluated(capsys, tmp_path / format)
    own = str(tmp_path / format) if format == "merged" else str(run.parent / "model")
    assert (found["model"], found["adapter"], found["dtype"]) == (own, adapter, "bfloat16")
    assert ("with a LoRA of PEFT's" in text) == (format == "peft")


def test_rounding_of_a_merge_on_the_command_line(run, tmp_path, capsys):
    """Stochastic by default; what it costs is printed and recorded."""
    command = ["export", str(run), "--format", "merged", "-o"]
    for name, more, wanted in (
        ("default", [], ("stochastic", 0)),
        ("seed", ["--seed", "3"], ("stochastic", 3)),
        ("nearest", ["--rounding", "nearest"], ("nearest", None)),
    ):
        assert main([*command, str(tmp_path / name), *more]) == 0
        assert f"rounding to bfloat16 ({wanted[0]})" in capsys.readouterr().out
        record = json.loads((tmp_path / name / "drlora_export.json").read_text())
        assert (record["rounding"]["mode"], record["rounding"]["seed"]) == wanted
    with pytest.raises(ConfigError, match="rounding='up' is not known"):
        export_adapter(run, "merged", tmp_path / "out", rounding="up")


def test_fewer_examples_than_asked_for(run, capsys):
    found, text = evaluated(capsys, run)
    note = "evaluation.loss_examples=200, but there are 6"
    assert found["notes"] == [note] and text.rstrip().endswith(note)
    result = json.loads((run / "result.json").read_text())
    assert result["before"]["notes"] == result["after"]["notes"] == [note]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "ab:", "completion": " ba\nab"}, "completions have several lines"),
        ({"text": "abc abc"}, "there are no prompts"),
    ],
)
def test_why_there_is_no_exact_match(run, tmp_path, capsys, record, reason):
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps(record) + "\n") * 3)
    found, text = evaluated(capsys, run, "--data", data)
    assert found["match"] is None and f"no exact match: {reason}" in found["notes"]
    assert f"no exact match: {reason}" in text


def test_training_says_it_too(run, tmp_path, capsys):
    recipe = save_all(tmp_path, evaluation=dict(loss_examples=200), **SHORT)
    assert main(["train", str(recipe)]) == 0
    (before,) = [w for w in capsys.readouterr().out.splitlines() if w.startswith("before: ")]
    assert before.endswith("; evaluation.loss_examples=200, but there are 6")


def test_what_is_forgotten(tmp_path, capsys, monkeypatch):
    """Texts beside the task: their loss before and after, as `drlora eval` finds it on them."""
    texts = tmp_path / "known.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a b {n} c d"}) + "\n" for n in range(9)))
    monkeypatch.chdir(tmp_path)
    section = dict(loss_examples=5, forgetting="known.jsonl")
    recipe = save_all(tmp_path, dtype="float32", evaluation=section, **SHORT)
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "run/result.json").read_text())
    before, after = (result[when]["forgetting"] for when in ("before", "after"))
    assert before["examples"] == after["examples"] == 5
    assert f"on other data      {before['loss']:.4f} -> {after['loss']:.4f}" in said
    assert before["loss"] != after["loss"] == value_of("forgetting", result["after"])
    assert "example_nats" not in after
    found, _ = evaluated(capsys, tmp_path / "run", "--data", str(texts))
    assert found["loss"]["loss"] == pytest.approx(after["loss"], rel=1e-6)
    refused = ["train", str(recipe), "--overwrite", "evaluation.forgetting=nowhere.jsonl"]
    assert main(refused) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    # Named from the working directory, and kept from the root: resumed anywhere, and moved along.
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["evaluation"]["forgetting"] == str(texts)
    shutil.move(tmp_path, tmp_path.with_name("elsewhere"))
    moved = tmp_path.with_name("elsewhere")
    found = load_recipe(moved / "run/config.yaml")
    assert found.evaluation.forgetting == str(moved / "known.jsonl")
