"""Every verb from Python: what is returned, what is raised, and that nothing is printed.

Run: make test ARGS=tests/runs/test_python.py
"""

import json
import re
import signal

import pytest
import yaml
from run_checks import assert_same_run, interrupt_at
from tiny_run import save_all

import drlora
from drlora.cli.main import main
from drlora.runs.dry_run import dry_run
from drlora.runs.progress import Progress


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, and what was told meanwhile; tests only read it."""
    folder = tmp_path_factory.mktemp("python")
    told = []
    result = drlora.train(drlora.load_recipe(save_all(folder)), progress=told.append)
    return folder, result, told


def test_a_function_is_told_what_the_command_line_prints(trained, tmp_path, capsys):
    folder, _, told = trained
    capsys.readouterr()
    assert main(["train", str(folder / "recipe.yaml"), f"output_dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out

    def timeless(text):
        return re.sub(r", [\d:]+ (s|min) left", "", text)

    assert timeless(printed).startswith(timeless("".join(f"{line}\n" for line in told)))
    assert sum(line.startswith("step ") for line in told) == 10
    assert_same_run(tmp_path / "run", folder / "run")


def test_the_result_says_what_the_run_does(trained):
    folder, result, _ = trained
    found = json.loads((folder / "run" / "result.json").read_text())
    assert result.to_dict() == {"run": str(folder / "run"), **found}
    assert result.after.loss.loss == pytest.approx(found["after"]["loss"]["loss"])
    assert result.budget.spent == result.budget.stored == found["budget"]["spent"]
    assert not result.diverged and not result.interrupted


def test_nothing_is_printed_and_a_progress_hears_of_all(tmp_path, capsys):
    heard = []

    class Listening(Progress):
        def say(self, text):
            heard.append("say")

        def training_begins(self, step, of):
            heard.append(("begins", step, of))

        def step_done(self, step, of):
            heard.append(("step", step, of))

        def logged(self, step, of, logs):
            assert logs["loss"] > 0
            heard.append(("logged", step, of))

        def grew(self, grants, text):
            assert text.startswith(f"step {grants[0].step}: ")
            heard.append(("grew", grants[0].step))

        def training_ends(self):
            heard.append("ends")

    recipe = drlora.load_recipe(save_all(tmp_path), ["evaluation.exact_match=false"])
    drlora.train(recipe, progress=Listening())
    drlora.train(recipe, overwrite=True)
    drlora.evaluate(recipe.output_dir)
    drlora.inspect(recipe.model, recipe.adapter_config(), steps=12)
    drlora.export_adapter(recipe.output_dir, "peft", tmp_path / "out")
    drlora.write_report([recipe.output_dir])
    said = capsys.readouterr()
    assert said.out == ""
    assert [h for h in heard if h[0] == "step"] == [("step", n, 12) for n in range(1, 13)]
    assert [h for h in heard if h[0] == "grew"] == [("grew", n) for n in (4, 6, 8, 10)]
    assert ("begins", 0, 12) in heard and heard.count("ends") == 1 and "say" in heard
    assert [h for h in heard if h[0] == "logged"] == [("logged", n, 12) for n in range(1, 13)]


def test_ctrl_c_is_raised_and_the_run_goes_on(trained, tmp_path, monkeypatch):
    recipe = drlora.load_recipe(save_all(tmp_path))
    with monkeypatch.context() as patch:
        interrupt_at(7, patch)
        with pytest.raises(KeyboardInterrupt, match="step 7; a checkpoint is saved") as stop:
            drlora.train(recipe)
    assert isinstance(stop.value, drlora.RunInterrupted)
    assert stop.value.result.steps == 7 and stop.value.result.signal == signal.SIGINT
    result = drlora.train(recipe, resume=True)
    assert result.steps == 12
    assert_same_run(tmp_path / "run", trained[0] / "run")


@pytest.mark.filterwarnings("ignore:.*gradients that are NaN or infinite")
def test_a_run_that_diverged_is_raised_with_its_result(tmp_path):
    recipe = drlora.load_recipe(save_all(tmp_path), ["training.learning_rate=1e6"])
    with pytest.raises(drlora.DrLoraError, match="DIVERGED: ") as failure:
        drlora.train(recipe)
    assert isinstance(failure.value, drlora.RunDiverged)
    assert failure.value.result.diverged and (tmp_path / "run" / "result.json").is_file()


def test_what_is_refused(trained, tmp_path):
    folder, _, _ = trained
    recipe = drlora.load_recipe(folder / "recipe.yaml")
    for act in (drlora.train, dry_run):
        with pytest.raises(drlora.ConfigError, match="already holds a run"):
            act(recipe)
        with pytest.raises(drlora.CheckpointError, match="is finished"):
            act(recipe, resume=True)
        with pytest.raises(drlora.ConfigError, match="contradict each other"):
            act(recipe, resume=True, overwrite=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    run = tmp_path / "run"
    save_all(tmp_path)
    own = drlora.load_recipe(tmp_path / "recipe.yaml", ["training.max_steps=2", "adapter.r_init=3"])
    drlora.train(own)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(elsewhere)
    (run / "inside").mkdir()
    for act in (drlora.train, dry_run):
        with pytest.raises(drlora.CheckpointError, match="leads out of the run"):
            act(own, overwrite=True)


def test_a_recipe_of_values_is_that_of_a_file(trained):
    folder, _, _ = trained
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    before = json.dumps(tree)
    words = ["training.max_steps=5", "adapter.r_max=4"]
    recipe = drlora.load_recipe(tree, words)
    assert recipe == drlora.load_recipe(folder / "recipe.yaml", words)
    assert recipe.training["max_steps"] == 5 and recipe.adapter.r_max == 4
    assert json.dumps(tree) == before
    config = recipe.adapter_config()
    config.experts = ["changed"]
    assert recipe.adapter.experts is None


def test_a_dry_run_is_typed_and_writes_nothing(tmp_path):
    recipe = drlora.load_recipe(save_all(tmp_path))
    found = dry_run(recipe)
    assert found.recipe is recipe and found.steps == 12
    assert found.examples["train"]["used"] == 24
    assert found.model.growth.events == 5 and found.model.growth.reached_at_step == 10
    assert json.loads(json.dumps(found.to_dict()))["model"]["growth"]["reached"] is True
    short = drlora.inspect(recipe.model, recipe.adapter_config(), steps=3)
    assert "steps" in short.growth.reason and short.to_dict()["growth"]["reached"] is False
    assert not (tmp_path / "run").exists()
