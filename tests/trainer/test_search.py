"""`Trainer.hyperparameter_search`: each trial is a run of its own, with a model of its own.

Run: make test-engines ARGS="-k search"
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import make_model
from tiny_trainer import SETTINGS, STEPS, dynamics_of, make_trainer

import drlora
from drlora.io.checkpoint import MANIFEST, refuse_damaged
from drlora.io.jsonl import read_lines


def new_model():
    torch.manual_seed(1)
    return get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS))


@pytest.mark.parametrize("name", ["run-{}", "rates/of {}"])
def test_each_trial_of_a_search_is_a_run_of_its_own(tmp_path, name):
    pytest.importorskip("optuna")
    found, rates = {}, [1e-2, 3e-2, 1e-2]
    trainer = make_trainer(tmp_path / "search", save_steps=4)
    trainer.model_init = new_model

    def objective(metrics):
        found[len(found)] = dynamics_of(trainer).ranks()
        return float(len(found))

    trainer.eval_dataset = trainer.train_dataset
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical(f"rate-{trial.number}",
                                                                  [rates[trial.number]])},
        objective, n_trials=len(rates), backend="optuna",
        hp_name=lambda trial: name.format(trial.number),
    )  # fmt: skip
    assert found[0] == found[2]
    logs = [tmp_path / "search" / f"growth{end}.jsonl" for end in ("-1", "-2", "")]
    first, _, third = (list(read_lines(log)) for log in logs)
    assert first and first == third and first[-1]["step"] <= STEPS
    for number in range(3):
        for step in (4, 8):
            refuse_damaged(tmp_path / "search" / name.format(number) / f"checkpoint-{step}")
    assert not list((tmp_path / "search").glob(f"checkpoint-*/{MANIFEST}"))
