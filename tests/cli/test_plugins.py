"""`--plugin FILE`: rules of a user's on the command line, run because the user said so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from registries import as_they_were
from tiny_run import save_all

from drlora.cli import main
from drlora.compare.packed import read_packed

RULES = """
from drlora.config.methods import METHODS, Method
from drlora.config.registry import SALIENCIES

@SALIENCIES.register("mine")
def mine(signals):
    return signals.frequency_E

METHODS.add("mine", Method("mine", "here", lambda given: {"saliency": "mine"}))
"""


@pytest.fixture(autouse=True)
def forget():
    with as_they_were():
        yield


@pytest.fixture
def rules(tmp_path) -> Path:
    path = tmp_path / "my_rules.py"
    path.write_text(RULES)
    return path


def test_a_run_by_a_rule_of_a_plugin(tmp_path, rules, capsys):
    recipe = str(save_all(tmp_path))
    assert main(["train", recipe, "adapter.saliency=mine"]) == 2
    assert "saliency='mine' is not known" in capsys.readouterr().err
    command = ["train", recipe, "--plugin", str(rules), "adapter.saliency=mine"]
    assert main([*command, "training.max_steps=4"]) == 0
    assert main([*command, "training.max_steps=8", "--resume"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    digest = hashlib.sha256(rules.read_bytes()).hexdigest()
    assert result["plugins"] == {"my_rules.py": digest}
    assert result["budget"]["spent"] == result["budget"]["stored"]


def test_a_finished_run_is_measured_exported_and_shown_without_the_plugin(tmp_path, rules, capsys):
    recipe, run = str(save_all(tmp_path)), str(tmp_path / "run")
    with as_they_were():
        assert main(["train", recipe, "--plugin", str(rules), "method=mine"]) == 0
    export = ["export", run, "--format", "peft", "-o", str(tmp_path / "out")]
    for verb in (["eval", run], ["report", run], export):
        assert main(verb) == 0, capsys.readouterr().err
    assert main(["train", f"{run}/config.yaml", "--resume"]) == 2
    assert "--plugin FILE, on the command line" in capsys.readouterr().err


def test_a_comparison_runs_plugins_in_its_processes(tmp_path, rules, capsys):
    recipe = yaml.safe_load(Path(save_all(tmp_path)).read_text())
    base = {k: recipe[k] for k in ("adapter", "training", "evaluation")}
    data = {f"data.{role}": path for role, path in recipe["data"].items()}
    data["data.test"] = data.get("data.test", recipe["data"]["eval"])
    plan = {
        "output_dir": str(tmp_path / "results"), "models": {"tiny": recipe["model"]},
        "tasks": {"one": data}, "methods": ["lora", "mine"], "seeds": [1], "base": base,
        "baselines": ["lora"],
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    words = ["compare", str(tmp_path / "plan.yaml"), "--jobs", "1", "--plugin", str(rules)]
    assert main(words) == 0, capsys.readouterr()
    cells = read_packed(tmp_path / "results").values()
    assert {cell["method"] for cell in cells} == {"lora", "mine"}
    assert all(list(cell["plugins"]) == ["my_rules.py"] for cell in cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no Python file of that name"),
        ("1 / 0", "failed: division by zero"),
        ("def", "failed: invalid syntax"),
    ],
)
def test_a_plugin_that_cannot_be_run_is_refused(tmp_path, text, message, capsys):
    path = tmp_path / "broken.py"
    if text:
        path.write_text(text)
    assert main(["env", "--plugin", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_an_option_without_a_file_is_told_by_the_verb(capsys):
    with pytest.raises(SystemExit) as end:
        main(["env", "--plugin"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("--plugin: expected one argument") == 1
    assert said.startswith("error: ") and "usage" not in said
