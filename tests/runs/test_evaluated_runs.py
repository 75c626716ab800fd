"""Evaluation while a run trains: held-out loss, the best checkpoint, and an end before its time."""

from __future__ import annotations

import json
import math

import pytest
from run_checks import assert_resumed_is_straight, assert_same_run, interrupt_at, lines
from safetensors.torch import load_file
from tiny_run import save_all
from transformers import Trainer

import drlora.runs.train as train_module
import drlora.trainer.patience
from drlora.cli.main import main
from drlora.errors import ConfigError
from drlora.runs.arguments import training_arguments
from drlora.runs.recipe import load_recipe
from drlora.runs.rundir import RunDir
from drlora.trainer.patience import Patience

EACH_TWO = dict(eval_strategy="steps", eval_steps=2, save_steps=2)


def result_of(folder):
    return json.loads((folder / "run" / "result.json").read_text())


def evaluations(folder):
    entries = lines(folder / "run" / "metrics.jsonl")
    return {e["step"]: e["eval_loss"] for e in entries if "eval_loss" in e}


def end_at(step, monkeypatch):
    """No evaluation from `step` on is better than what was."""
    real = Patience.check_metric_value

    def check(self, args, state, control, value):
        if state.global_step < step:
            real(self, args, state, control, value)
        else:
            self.early_stopping_patience_counter += 1

    monkeypatch.setattr(Patience, "check_metric_value", check)


def test_held_out_loss_is_logged_and_the_last_is_that_of_the_result(tmp_path):
    assert main(["train", str(save_all(tmp_path, training=EACH_TWO))]) == 0
    found = evaluations(tmp_path)
    assert list(found) == [2, 4, 6, 8, 10, 12]
    # The Trainer means over batches, each of them weighing the same.
    assert found[12] == pytest.approx(result_of(tmp_path)["after"]["loss"]["loss"], rel=0.05)


def test_a_run_that_gets_no_better_ends_and_says_what_is_unspent(tmp_path, monkeypatch, capsys):
    end_at(6, monkeypatch)
    recipe = save_all(tmp_path, training={**EACH_TWO, "early_stopping_patience": 2})
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr().out
    result = result_of(tmp_path)
    assert result["steps"] == 8 and result["verdict"] == "ok"
    spent, stored = result["budget"]["spent"], result["budget"]["stored"]
    assert spent < stored, "an event after step 10 was still to come"
    notes = [
        "no better for 2 evaluations: ended at step 8 of 12",
        f"{spent} of the {stored} ranks of the budget are in use: the rest was to be given out "
        f"later",
    ]
    assert result["notes"] == notes and all(note in said for note in notes)
    events = lines(tmp_path / "run" / "events.jsonl")
    assert events[-1]["step"] == 8, "what is known of experts at the end"
    assert (
        main(["export", str(tmp_path / "run"), "--format", "peft", "-o", str(tmp_path / "out")])
        == 0
    )


def test_patience_is_carried_over_a_resume(tmp_path, monkeypatch):
    """A resumed run ends where the straight one ends."""
    end_at(4, monkeypatch)
    settings = {**EACH_TWO, "early_stopping_patience": 3}
    straight = save_all(tmp_path / "straight", training=settings)
    cut = save_all(tmp_path / "cut", training=settings)
    assert_resumed_is_straight(straight, cut, 6, monkeypatch)
    assert result_of(tmp_path / "cut")["steps"] == 8


@pytest.mark.parametrize(
    "training", [{"early_stopping_patience": 1}, {"load_best_model_at_end": True}]
)
def test_a_run_killed_while_it_measures_ends_as_the_straight_one(tmp_path, monkeypatch, training):
    """Its steps are over, and what evaluations have decided stands."""
    end_at(4, monkeypatch)
    one_answer = "".join(
        json.dumps({"prompt": "ab:", "completion": " zz"}) + "\n" for _ in "ab" * 12
    )
    settings = {**EACH_TWO, "save_total_limit": 3, "learning_rate": 0.1, **training}
    for name in ("straight", "cut"):
        save_all(tmp_path / name, training=settings)
        (tmp_path / name / "train.jsonl").write_text(one_answer)
    straight, cut = (tmp_path / name for name in ("straight", "cut"))
    ended = main(["train", str(straight / "recipe.yaml")])
    with monkeypatch.context() as patch:
        measure = train_module._measure_and_log

        def killed(job, training, when, *others):
            if when == "after":
                raise KeyboardInterrupt
            return measure(job, training, when, *others)

        patch.setattr(train_module, "_measure_and_log", killed)
        assert main(["train", str(cut / "recipe.yaml")]) == 130
    assert main(["train", str(cut / "recipe.yaml"), "--resume"]) == ended
    assert_same_run(cut / "run", straight / "run")
    assert result_of(cut)["notes"] == result_of(straight)["notes"] != []


def test_an_epoch_that_is_broken_off_is_not_evaluated(tmp_path, monkeypatch):
    """It would count for patience, and could end the run for good."""
    end_at(2, monkeypatch)
    each_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch", "early_stopping_patience": 1}
    straight = save_all(tmp_path / "straight", training=each_epoch)
    cut = save_all(tmp_path / "cut", training=each_epoch)
    assert main(["train", str(straight)]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        assert main(["train", str(cut)]) == 130
    assert list(evaluations(tmp_path / "cut")) == []
    assert main(["train", str(cut), "--resume"]) == 0
    assert list(evaluations(tmp_path / "cut")) == list(evaluations(tmp_path / "straight"))
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "straight" / "run")


def test_where_the_best_alone_is_saved_an_interrupted_step_is_too(tmp_path, monkeypatch, capsys):
    best = {"save_strategy": "best", "metric_for_best_model": "loss"}
    recipe = save_all(tmp_path, training={**EACH_TWO, **best})
    monkeypatch.setattr(Trainer, "_determine_best_metric", lambda *_, **__: False)
    with monkeypatch.context() as patch:
        interrupt_at(8, patch)
        assert main(["train", str(recipe)]) == 130
    assert "at step 8; a checkpoint is saved" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-8").is_dir()


def test_the_best_checkpoint_is_the_adapter_and_what_it_left_is_said(tmp_path, capsys, monkeypatch):
    real = drlora.runs.training.make_trainer

    def make(*args, **kwargs):
        """Evaluations of the third are the best there are."""
        trainer = real(*args, **kwargs)
        evaluate = trainer.evaluate

        def evaluated(*a, **k):
            found = evaluate(*a, **k)
            found["eval_loss"] = 0.1 if trainer.state.global_step == 6 else 1.0
            return found

        trainer.evaluate = evaluated
        return trainer

    monkeypatch.setattr("drlora.runs.training.make_trainer", make)
    recipe = save_all(tmp_path, training={**EACH_TWO, "load_best_model_at_end": True})
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "its adapter has not spent the budget" in capsys.readouterr().out
    assert main(["train", str(recipe)]) == 0
    result = result_of(tmp_path)
    assert result["notes"][0] == "the adapter is that of step 6, the best evaluation"
    assert result["budget"]["spent"] < result["budget"]["stored"]
    assert "ranks of the budget are in use" in result["notes"][1]
    run = tmp_path / "run"
    best = run / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors"
    mine, theirs = load_file(run / "adapter_model.safetensors"), load_file(best)
    assert mine.keys() == theirs.keys()
    assert all((mine[name] == theirs[name]).all() for name in mine)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (dict(early_stopping_patience=2), "needs evaluations during training"),
        (dict(load_best_model_at_end=True), "evaluation|eval"),
        ({**EACH_TWO, "early_stopping_patience": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, training, said):
    recipe = load_recipe(save_all(tmp_path, training=training))
    with pytest.raises(ConfigError, match=said):
        training_arguments(recipe, RunDir(tmp_path / "run"))


def test_a_budget_that_layers_share_and_is_spent_is_not_called_unspent(tmp_path):
    """Each layer stores more rows than it has ranks in the mean."""
    shared = {"budget_scope": "model"}
    recipe = save_all(
        tmp_path, adapter=shared, training={**EACH_TWO, "load_best_model_at_end": True}
    )
    assert main(["train", str(recipe)]) == 0
    result = result_of(tmp_path)
    assert result["notes"] == ["the adapter is that of step 12, the best evaluation"]
    budget = result["budget"]
    planned = math.prod(budget[name] for name in ("r_target", "experts", "layers", "projections"))
    assert budget["spent"] == planned < budget["stored"]
