"""`drlora train` from a recipe to a run directory, and back from Ctrl-C to the bit."""

import json
from pathlib import Path

import pytest
import yaml
from new_process import run_python
from rich.console import Console
from run_checks import assert_same_run, interrupt_at, lines, losses
from safetensors.torch import load_file
from tiny_run import save_all

import drlora.runs.train as train_module
from drlora.cli.main import main
from drlora.cli.summary import print_summary
from drlora.evaluation.measure import measurement_from
from drlora.ranks.rank_map import Budget
from drlora.ranks.schedule import plan_growth
from drlora.runs.metrics_log import MetricsLog
from drlora.runs.outcome import TrainResult
from drlora.runs.recipe import load_recipe, recipe_from
from drlora.runs.rundir import RunDir

STEPS, EVENTS = 12, [4, 6, 8, 10]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run; tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(save_all(folder))]) == 0
    return folder


def test_the_run_directory_holds_what_the_design_says(trained):
    run = trained / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "metrics.jsonl",
        "growth.jsonl",
        "result.json",
        "checkpoints",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "checkpoint-6",
        "checkpoint-12",
    }
    assert not list(run.glob("*.tmp"))


def test_config_is_the_recipe_with_everything_filled_in(trained):
    recipe = load_recipe(trained / "recipe.yaml")
    written = yaml.safe_load((trained / "run" / "config.yaml").read_text())
    assert recipe_from(written) == recipe
    assert written["adapter"]["warmup_steps"] == 2  # the learning rate's
    assert written["adapter"]["beta"] == 0.9


def test_metrics_have_each_step_and_both_measurements(trained):
    entries = lines(trained / "run" / "metrics.jsonl")
    assert sorted(losses(trained / "run")) == list(range(1, STEPS + 1))
    before, after = (next(e for e in entries if e["kind"] == kind) for kind in ("before", "after"))
    assert (before["step"], after["step"]) == (0, STEPS)
    assert before["loss"]["target_tokens"] == after["loss"]["target_tokens"] == 6 * 5
    assert before["loss"]["loss"] != after["loss"]["loss"]
    assert before["match"]["total"] == 4


def test_the_budget_is_spent_exactly_and_unevenly(trained):
    result = json.loads((trained / "run" / "result.json").read_text())
    assert result["budget"]["spent"] == result["budget"]["stored"] == 3 * 6 * 2 * 2
    rows = [row for block in result["ranks"].values() for row in block.values()]
    assert [sum(row) for row in rows] == [3 * 6] * 4
    assert all(min(row) < max(row) for row in rows)


def test_growth_log_ends_at_the_saved_ranks(trained):
    run = trained / "run"
    grants = lines(run / "growth.jsonl")
    assert sorted({grant["step"] for grant in grants}) == EVENTS
    plan = plan_growth(load_recipe(run / "config.yaml").adapter_config(), 6, STEPS)
    # At the end of the warm-up B has had no step with a learning rate yet: that event waits.
    assert plan.event_steps == (2, *EVENTS)
    saved = load_file(run / "adapter_model.safetensors")
    for layer in (0, 1):
        ranks = [1] * 6
        for grant in grants:
            if grant["block"] == f"model.layers.{layer}.mlp":
                ranks[grant["expert"]] += grant["granted"]
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts.drlora_adapters.pools"
        for projection in ("gate_up", "down"):
            owner = saved[f"{prefix}.{projection}.owner"]
            assert [int((owner == expert).sum()) for expert in range(6)] == ranks


def test_summary_says_before_after_ranks_and_budget(trained, capsys):
    found = json.loads((trained / "run" / "result.json").read_text())
    before, after = measurement_from(found["before"]), measurement_from(found["after"])
    result = TrainResult(
        RunDir(trained / "run"),
        before,
        after,
        found["ranks"],
        Budget(**found["budget"]),
        4896,
        4896,
        12,
        1.0,
        False,
    )
    print_summary(result, Console(width=100))
    said = capsys.readouterr().out
    assert f"{before.loss.loss:.4f} -> {after.loss.loss:.4f}" in said
    assert "exact match" in said
    assert "spent 72 of 72 ranks = r_target 3 x 6 experts x 2 layers x 2 projections" in said
    row = found["ranks"]["model.layers.1.mlp"]["down"]
    assert " ".join(map(str, row)) in said


def test_eval_repeats_what_training_measured(trained, capsys):
    assert main(["eval", str(trained / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    after = json.loads((trained / "run" / "result.json").read_text())["after"]
    assert found["loss"]["loss"] == pytest.approx(after["loss"]["loss"], rel=1e-6)
    assert found["match"] == after["match"]


def test_eval_on_other_data_and_another_split(trained, capsys):
    run = str(trained / "run")
    assert main(["eval", run, "--json", "--split", "train"]) == 0
    by_role = json.loads(capsys.readouterr().out)
    assert main(["eval", run, "--json", "--data", str(trained / "train.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out) == by_role
    assert by_role["loss"]["target_tokens"] == 24 * 5


def test_a_second_run_in_the_same_directory_is_refused(trained, capsys):
    before = (trained / "run" / "metrics.jsonl").read_bytes()
    assert main(["train", str(trained / "recipe.yaml")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", str(trained / "recipe.yaml"), "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err
    assert (trained / "run" / "metrics.jsonl").read_bytes() == before


def test_resumed_after_ctrl_c_equals_a_straight_run(trained, tmp_path, monkeypatch, capsys):
    recipe = save_all(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(7, patch)
        assert main(["train", str(recipe)]) == 130
    run = tmp_path / "run"
    said = capsys.readouterr()
    assert "interrupted at step 7" in said.err
    assert f"drlora train {run / 'config.yaml'} --resume" in said.err
    assert (run / "checkpoints" / "checkpoint-7").is_dir()
    assert not (run / "result.json").exists()
    assert {grant["step"] for grant in lines(run / "growth.jsonl")} == {4, 6}

    # The same thread count as here, so that float sums have the same order.
    command = ["-m", "drlora", "train", str(run / "config.yaml"), "--resume"]
    assert "checkpoint-7" in run_python(command, run.parent / "printed.txt")
    assert_same_run(run, trained / "run")


def test_resumed_after_a_crash_it_writes_nothing_twice(trained, tmp_path, monkeypatch):
    recipe = save_all(tmp_path)
    on_log = MetricsLog.on_log

    def crashing(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs, **kwargs)
        if state.global_step == 9:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "on_log", crashing)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["train", str(recipe)])
    run = tmp_path / "run"
    assert RunDir(run).newest_checkpoint().name == "checkpoint-6"
    assert max(grant["step"] for grant in lines(run / "growth.jsonl")) == 8
    assert main(["train", str(recipe), "--resume"]) == 0
    assert_same_run(run, trained / "run")
    steps = [entry["step"] for entry in lines(run / "metrics.jsonl") if "loss" in entry]
    assert steps == [0, *range(1, STEPS + 1), STEPS]


def test_interrupted_before_the_first_step_it_starts_again(trained, tmp_path, monkeypatch, capsys):
    recipe = save_all(tmp_path)

    def press(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Training, "fit", press)
        assert main(["train", str(recipe)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["train", str(recipe), "--resume"]) == 0
    assert_same_run(tmp_path / "run", trained / "run")


def test_interrupted_after_the_last_step_it_only_measures(trained, tmp_path, monkeypatch, capsys):
    recipe = save_all(tmp_path, training={"max_steps": 11})  # not the end of an epoch
    assert main(["train", str(recipe), f"output_dir={tmp_path / 'straight'}"]) == 0

    measure = train_module._measure_and_log

    def press(job, model, kind, *rest):
        if kind == "after":
            raise KeyboardInterrupt
        return measure(job, model, kind, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_measure_and_log", press)
        assert main(["train", str(recipe)]) == 130
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-11").is_dir()
    assert main(["train", str(recipe), "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_checkpoint_that_was_cut_off_is_passed_over(trained):
    run = RunDir(trained / "run")
    assert run.newest_checkpoint().name == "checkpoint-12"
    weights = run.checkpoints / "checkpoint-12" / "optimizer.pt"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[: len(whole) // 2])
        assert run.newest_checkpoint().name == "checkpoint-6"
    finally:
        weights.write_bytes(whole)


def test_resume_with_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    recipe = save_all(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        assert main(["train", str(recipe)]) == 130
    capsys.readouterr()
    assert main(["train", str(recipe), "training.learning_rate=0.1", "--resume"]) == 2
    assert "training.learning_rate was 0.01, now 0.1" in capsys.readouterr().err
