"""GRPO from the command line: rewards by name, a reward that rises, resume to the bit, refusals."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from run_checks import assert_resumed_is_straight, lines, losses
from tiny_run import save_all
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import drlora
from drlora.cli.main import main
from drlora.errors import ConfigError, DataError
from drlora.io import plugins
from drlora.runs.recipe import load_recipe
from drlora.trainer.objectives import OFF
from drlora.trainer.rewards import REWARDS, rewards_of, text_of

TRAINING = dict(num_generations=4, max_completion_length=6, per_device_eval_batch_size=4)


@pytest.fixture
def vowels():
    """A reward that is registered while a test runs: many vowels."""

    @REWARDS.register("vowels")
    def vowels(completions, **given):
        return [sum(letter in "aeiou" for letter in text_of(one)) / 6 for one in completions]

    yield vowels
    REWARDS.remove("vowels")


def save_tries(folder, reward="vowels", **changes):
    training = {**TRAINING, **changes.pop("training", {})}
    return save_all(folder, objective="grpo", reward=reward, training=training, **changes)


def result_of(folder):
    return json.loads((folder / "run" / "result.json").read_text())


def test_the_reward_rises_and_the_budget_is_spent(tmp_path, vowels, capsys):
    recipe = save_tries(tmp_path, training=dict(max_steps=24, per_device_train_batch_size=16,
                                                learning_rate=0.1))  # fmt: skip
    assert main(["train", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "by the rewards that functions give them: vowels; without a reference" in said
    assert "24 steps of 16 answers" in said
    assert main(["train", str(recipe)]) == 0
    assert "reward" in capsys.readouterr().out
    result = result_of(tmp_path)
    assert result["objective"] == "grpo" and result["verdict"] == "ok"
    before, after = (result[when]["objective"]["reward"] for when in ("before", "after"))
    assert after > before + 0.3
    logged = [e["reward"] for e in lines(tmp_path / "run" / "metrics.jsonl") if "reward" in e]
    assert len(logged) == 24 and sum(logged[-8:]) > sum(logged[:8]) + 2
    assert result["budget"]["spent"] == result["budget"]["stored"]
    assert result["after"]["loss"]["examples"] == 6, "held-out answers are measured beside it"
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0


def test_it_is_a_script_of_trl_with_our_callback(tmp_path, vowels):
    """Losses, rewards and ranks to the bit."""
    recipe = save_tries(tmp_path, evaluation=dict(before=False))
    assert main(["train", str(recipe)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    growth = drlora.DrLoraCallback()
    trainer = GRPOTrainer(
        model,
        vowels,
        args=GRPOConfig(
            str(tmp_path / "script"), max_steps=12, warmup_steps=2, learning_rate=0.01,
            per_device_train_batch_size=4, logging_steps=1, save_strategy="no", report_to="none",
            seed=42, weight_decay=0.0, use_cpu=True, disable_tqdm=True, num_generations=4,
            max_completion_length=6, router_aux_loss_coef=0.0, **OFF,
        ),
        train_dataset=Dataset.from_json(str(tmp_path / "train.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        peft_config=load_recipe(recipe).adapter_config(),
        callbacks=[growth],
    )  # fmt: skip
    trainer.train()
    logged = {e["step"]: e for e in trainer.state.log_history if "loss" in e}
    assert losses(tmp_path / "run") == {step: e["loss"] for step, e in logged.items()}
    found = [e for e in lines(tmp_path / "run" / "metrics.jsonl") if "reward" in e]
    assert [e["reward"] for e in found] == [e["reward"] for e in logged.values()]
    assert any(e["reward"] for e in found)
    assert growth.dynamics.ranks() == result_of(tmp_path)["ranks"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_resumed_run_is_the_straight_one(tmp_path, vowels, monkeypatch, beta):
    straight, cut = (
        save_tries(tmp_path / n, training=dict(beta=beta)) for n in ("straight", "cut")
    )
    assert_resumed_is_straight(straight, cut, 8, monkeypatch)
    assert not (tmp_path / "straight" / "run" / "ref").exists()


def test_rewards_that_come_along_and_those_of_a_file(tmp_path, monkeypatch, capsys):
    answers = [["ab", "b"], ["cd"]]
    exact, likeness = rewards_of(["exact", "likeness"])
    assert exact(completions=[" b\n", "x"], answers=answers, prompts=[]) == [1, 0]
    turns = [[{"role": "assistant", "content": "ab"}], [{"role": "assistant", "content": "cx"}]]
    assert likeness(completions=turns, answers=answers) == [1, 0.5]
    (think,) = rewards_of(["trl.rewards.think_format_reward"])
    assert think.__module__.startswith("trl.")

    monkeypatch.setattr(plugins, "_LOADED", {})
    (tmp_path / "own_rewards.py").write_text(
        "from drlora.trainer.rewards import REWARDS\n"
        "@REWARDS.register('own')\n"
        "def own(completions, answer, line=None, **given):\n"
        "    assert len(answer) == len(completions) and isinstance(answer[0], str)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    recipe = save_tries(tmp_path, reward=["own", "exact"], training=dict(max_steps=8, save_steps=8))
    try:
        assert main(["train", str(recipe), "--plugin", str(tmp_path / "own_rewards.py")]) == 0
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "run")]) == 0, "which needs no reward"
    finally:
        REWARDS.remove("own")
    names = {key for e in lines(tmp_path / "run" / "metrics.jsonl") for key in e}
    assert {"rewards/own/mean", "rewards/exact/mean"} <= names
    assert "own_rewards.py" in result_of(tmp_path)["plugins"]


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (dict(reward=None), ConfigError, "grpo needs a reward"),
        (dict(objective="sft", reward="exact"), ConfigError, "do not go together"),
        (dict(reward="vowls"), ConfigError, "--plugin FILE"),
        (dict(reward="trl.rewards.nothing"), ConfigError, "is not known"),
        (dict(training=dict(max_steps=-1)), ConfigError, "needs training.max"),
        (dict(training=dict(num_generations=3)), ConfigError, "divisible by num_generations"),
        (dict(training=dict(early_stopping_patience=2, eval_strategy="steps", eval_steps=2)),
         ConfigError, "no early end"),
        (dict(training=dict(max_completion_length=62)), DataError, "all 24 prompts are too long"),
        (dict(training=dict(per_device_train_batch_size=100)), DataError, "24 prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(tmp_path, changes, kind, said):
    changes = {"objective": "grpo", "reward": "exact", **changes}
    changes["training"] = {**(TRAINING if changes["objective"] == "grpo" else {}),
                           **changes.get("training", {})}  # fmt: skip
    path = save_all(tmp_path, **changes)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(kind, match=said):
        drlora.train(load_recipe(path))


def test_prompts_of_messages(tmp_path, vowels):
    """The model is asked by its template; rewards are given the text of the right answer."""
    path = save_tries(
        tmp_path, reward=["vowels", "likeness"], training=dict(max_steps=8, save_steps=8)
    )
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% else %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    for name, letters in (("train", "abcdefghijkl"), ("eval", "uvwx")):
        rows = [
            {
                "prompt": [{"role": "user", "content": letter}],
                "completion": [{"role": "assistant", "content": letter * 3}],
            }
            for letter in letters
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["train", str(path), f"chat_template={tmp_path / 'own.jinja'}"]) == 0
    after = result_of(tmp_path)["after"]
    assert after["loss"]["examples"] == 4
    assert 0 <= after["objective"]["rewards/likeness/mean"] <= 1
    assert after["objective"]["reward"] > 0
