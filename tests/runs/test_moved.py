"""Runs and exports work from any working directory, and after they were moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from tiny_run import save_all

from drlora.cli.main import main
from drlora.io.places import Place, from_root

LENGTH = dict(training=dict(max_steps=8, save_steps=4))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project with a model, data, a run by relative paths, and its exports."""
    project = tmp_path_factory.mktemp("there") / "project"
    project.mkdir()
    recipe = save_all(project, **LENGTH)
    text = recipe.read_text().replace(f"{project}{os.sep}", "")
    assert str(project) not in text
    recipe.write_text(text)
    before = os.getcwd()
    os.chdir(project)
    try:
        assert main(["train", recipe.name]) == 0
        for format in ("peft", "merged"):
            assert main(["export", "run", "--format", format, "-o", f"out/{format}"]) == 0
    finally:
        os.chdir(before)
    return project


def evaluated(capsys, folder: Path, *more: str) -> dict:
    capsys.readouterr()
    assert main(["eval", str(folder), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory that has nothing to do with the run."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.fixture
def moved(made, elsewhere) -> Path:
    """The whole project in another place, and none where it was."""
    there = elsewhere / "moved"
    shutil.copytree(made, there)
    hidden = made.with_name("hidden")
    made.rename(hidden)
    yield there
    hidden.rename(made)


def test_a_run_and_its_exports_from_another_working_directory(made, elsewhere, capsys):
    wanted = evaluated(capsys, made / "run")
    assert wanted["model"] == str(made / "model") and wanted["dtype"] == "float32"
    for format in ("peft", "merged"):
        found = evaluated(capsys, made / "out" / format)
        assert found["loss"]["loss"] == pytest.approx(wanted["loss"]["loss"], rel=1e-5)
        assert main(["export", str(made / "run"), "--format", format, "-o", format]) == 0
    for folder in ("peft", made / "run", made / "run" / "checkpoints" / "checkpoint-8"):
        AutoPeftModelForCausalLM.from_pretrained(folder)  # its base is named from the root on


def test_a_project_that_was_moved(moved, capsys):
    wanted = evaluated(capsys, moved / "run")
    assert wanted["model"] == str(moved / "model")
    for format in ("peft", "merged"):
        found = evaluated(capsys, moved / "out" / format)
        assert found["loss"]["loss"] == pytest.approx(wanted["loss"]["loss"], rel=1e-5)
    assert main(["export", str(moved / "run"), "--format", "peft", "-o", "again"]) == 0


def test_a_run_that_was_moved_alone(made, elsewhere, capsys):
    """Its model and data are where they were, by paths from the root on."""
    wanted = evaluated(capsys, made / "run")
    shutil.copytree(made / "run", elsewhere / "alone")
    text = (elsewhere / "alone" / "config.yaml").read_text()
    for name in ("model", "run", "train.jsonl", "eval.jsonl"):
        text = text.replace(f": {name}\n", f": {made / name}\n")
    (elsewhere / "alone" / "config.yaml").write_text(text)
    assert evaluated(capsys, elsewhere / "alone")["loss"] == wanted["loss"]


def test_resume_after_a_move(moved, capsys):
    run = moved / "run"
    for name in ("result.json", "adapter_model.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    assert main(["train", str(run / "config.yaml"), "--resume"]) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == 8
    assert str(moved.parent / "elsewhere") == os.getcwd() and not os.listdir()


def test_an_export_whose_run_is_gone(made, elsewhere, capsys):
    """It finds its own base all the same, and says what it misses."""
    shutil.copytree(made / "out" / "peft", elsewhere / "peft")
    (made / "run").rename(made / "gone")
    try:
        assert main(["eval", str(elsewhere / "peft")]) == 2
        assert f"is not in {made / 'run'} any more" in capsys.readouterr().err
        found = evaluated(capsys, elsewhere / "peft", "--data", str(made / "eval.jsonl"))
    finally:
        (made / "gone").rename(made / "run")
    assert found["model"] == str(made / "model")


def test_the_base_that_an_export_names_wins_over_the_runs(made, elsewhere, capsys):
    out = elsewhere / "peft"
    shutil.copytree(made / "out" / "peft", out)
    shutil.copytree(made / "model", elsewhere / "other")
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(elsewhere / "other")
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert evaluated(capsys, out)["model"] == str(elsewhere / "other")
    named = str(made / "model")
    assert evaluated(capsys, out, "--model", named)["model"] == named
    assert main(["eval", str(out), "--model", str(elsewhere / "no-such")]) == 2
    assert "no-such" in capsys.readouterr().err


def test_an_export_of_an_earlier_version(made, elsewhere, capsys):
    """It has relative paths, and does not say where it was written."""
    out = made / "out" / "peft"
    names = ("drlora_export.json", "adapter_config.json")
    texts = {name: (out / name).read_text() for name in names}
    wanted = evaluated(capsys, out)
    try:
        for name, text in texts.items():
            values = json.loads(text.replace(f"{made}{os.sep}", ""))
            values.pop("output", None)
            (out / name).write_text(json.dumps(values))
        assert evaluated(capsys, out) == wanted
    finally:
        for name, text in texts.items():
            (out / name).write_text(text)


@pytest.mark.parametrize(
    ("written", "folder", "name", "there", "wanted"),
    [
        ("/a/runs/x", "b/runs/x", "/a/models/m", "b/models/m", "b/models/m"),
        ("/a/runs/x", "b/x", "/a/models/m", "b/models/m", None),
        ("/a/x", "b/y", "/a/x/tokenizer", "b/y/tokenizer", "b/y/tokenizer"),
        ("runs/x", "b/runs/x", "models/m", "b/models/m", "b/models/m"),
        ("runs/x", "b/runs/x", "org/name", None, None),
        ("/a/runs/x", "b/runs/x", "models/m", "b/models/m", None),
        (None, "b/out/x", "models/m", "b/models/m", "b/models/m"),
        (None, "b/out/x", "models/m", None, None),
    ],
)  # fmt: skip
def test_what_a_stored_path_means(tmp_path, written, folder, name, there, wanted):
    if there:
        (tmp_path / there).mkdir(parents=True)
    found = Place.of(tmp_path / folder, written).find(name)
    assert found == (str(tmp_path / wanted) if wanted else name)


def test_a_stored_path_is_from_the_root_where_something_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert from_root("models") == str(tmp_path / "models")
    (tmp_path / "embedded").mkdir()
    for name in ("org/models", "", "embedded"):
        assert from_root(name) == name == Place.of(tmp_path / "run", None).find(name)
