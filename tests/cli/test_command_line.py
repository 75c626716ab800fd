"""The command line as its users expect it: help with examples, hints, JSON, dry runs, completion.

Run: make test ARGS=tests/cli/test_command_line.py
"""

import importlib.util
import json
import shlex
import subprocess
from pathlib import Path

import pytest
from tiny_run import save_all

import drlora
from drlora.cli.arguments import VERBS, make_parser
from drlora.cli.main import main
from drlora.runs.environment import describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command_line")
    save_all(folder)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    examples = [line.strip() for line in shown.splitlines() if line.startswith("  drlora ")]
    assert len(examples) >= 2 and "--json" in shown
    for example in examples:
        words = shlex.split(example)[1:]
        assert words[0] == verb
        make_parser().parse_args(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "x"], "did you mean train?"),
        (["eval", "x", "--splti", "test"], "did you mean --split?"),
        (["eval", "x", "--overwrite"], "--overwrite; it is an option of drlora train"),
        (["export", "x", "-o", "y", "--format", "lora"], "'per-expert', 'sglang')\n"),
        (["export", "x", "-o", "y", "--format", "pfet"], "did you mean peft?"),
        (["qqqq"], "invalid choice: 'qqqq'"),
        (["train"], "RECIPE.yaml"),
    ],
)
def test_misspelt_words(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_dry_run_of_a_recipe(folder, capsys, monkeypatch):
    monkeypatch.setattr("drlora.runs.train.load_base_model", None)  # no weights
    recipe = str(folder / "recipe.yaml")
    assert main(["train", recipe, "--dry-run", "training.max_steps=14"]) == 0
    shown = capsys.readouterr().out
    assert "24 examples" in shown and "dry run: nothing was written" in shown
    assert "growth over 14 steps" in shown
    assert not (folder / "run").exists()
    assert main(["train", recipe, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 12 and found["recipe"]["adapter"]["r_target"] == 3
    assert found["model"]["growth"]["reached"]
    assert main(["train", recipe, "--dry-run", "adapter.r_init=5"]) == 2
    assert "r_init <= r_target" in capsys.readouterr().err


def test_json_of_training_and_export(folder, capsys):
    run = folder / "json"
    words = [str(folder / "recipe.yaml"), f"output_dir={run}", "training.max_steps=2"]
    assert main(["train", *words, "adapter.r_init=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == str(run) and found["steps"] == 2 and found["budget"]["spent"]
    out = folder / "out"
    export = ["export", str(run), "--format", "peft", "-o", str(out), "--json"]
    assert main([*export, "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "peft" and found["output"] is None and not out.exists()
    assert main(export) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(out) and found["logits"] and out.is_dir()


def test_completion(capsys):
    """The script names verbs and options; without shtab the way to it is told."""
    has_shtab = importlib.util.find_spec("shtab") is not None
    code = main(["--print-completion", "bash"])
    said = capsys.readouterr()
    if has_shtab:
        assert code == 0 and "inspect" in said.out and "--dry-run" in said.out
        assert main(["--print-completion", "fish"]) == 2
    else:
        assert code == 2 and "drlora[completion]" in said.err


def test_without_a_verb_there_is_help(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "usage: drlora" in said and all(verb in said for verb in ("train", "report", "env"))


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"drlora {drlora.__version__}\n"


def test_the_source_of_a_checkout_is_known():
    root = Path(drlora.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert describe().source.commit == head
    assert describe().to_dict()["source"].keys() == {"commit", "dirty"}


def test_the_environment_says_what_a_report_of_a_fault_needs(capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/home/somebody/models")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"drlora", "python", "torch", "transformers", "peft", "trl"} <= set(found["versions"])
    assert found["cores"] >= 1 and found["memory_gb"] > 0 and found["vector_unit"]
    assert found["variables"]["HF_HOME"] == "(set)"
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "transformers" in said and "somebody" not in said
