"""DPO and KTO from the command line: the reference, resume to the bit, and what is measured."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import PeftModel
from run_checks import assert_resumed_is_straight, assert_same_run, interrupt_at, lines, losses
from safetensors.torch import load_file
from tiny_run import LETTERS, save_all
from transformers import AutoModelForCausalLM, TrainerCallback

from drlora.adapter.inject import adapted_layers
from drlora.cli.main import main
from drlora.errors import ConfigError
from drlora.ranks.starts import place_ranks
from drlora.runs.recipe import load_recipe
from drlora.runs.training import Training

WORDS = [LETTERS[i % 20 : i % 20 + 4] for i in range(16)]
PAIRS = [{"prompt": f"{w}:", "chosen": f" {w[::-1]}", "rejected": f" {w} no"} for w in WORDS]
VERDICTS = [
    {"prompt": f"{w}:", "completion": f" {w[::-1]}" if i % 2 else f" {w} no", "label": bool(i % 2)}
    for i, w in enumerate(WORDS)
]
EXAMPLES = {"dpo": PAIRS, "kto": VERDICTS}


def save_preferences(folder, objective, **changes):
    """The recipe of a run of 12 steps that learns from preferences."""
    recipe = save_all(folder, objective=objective, **changes)
    for name, rows in (("train", EXAMPLES[objective]), ("eval", EXAMPLES[objective][:6])):
        # Held-out examples that are no training examples.
        rows = rows if name == "train" else [{**row, "prompt": f"x{row['prompt']}"} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return recipe


def result_of(folder):
    return json.loads((folder / "run" / "result.json").read_text())


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_no_expert_needs_a_rank(tmp_path, objective):
    """LoRA beside the experts alone places nothing by data, so it looks at no loss."""
    adapter = {"start": "none", "target_modules": ["q_proj"], "r_init": 3, "r_max": 3}
    recipe = load_recipe(save_preferences(tmp_path, objective, adapter=adapter))
    assert recipe.adapter.start == "none" and not recipe.adapter.starts_from_data


@pytest.mark.parametrize("beside", [[], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_loss_falls_and_the_budget_is_spent(tmp_path, objective, beside, capsys):
    """With LoRA on layers beside the experts, too."""
    adapter = {"adapter": {"target_modules": beside}} if beside else {}
    recipe = save_preferences(tmp_path, objective, **adapter)
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "the reference is the base model" in capsys.readouterr().out
    assert main(["train", str(recipe)]) == 0
    result = result_of(tmp_path)
    assert result["objective"] == objective and result["verdict"] == "ok"
    before, after = (result[when]["objective"] for when in ("before", "after"))
    start = 0.6931 if objective == "dpo" else 0.5  # ln 2; half, where nothing moved yet
    assert before["loss"] == pytest.approx(start, abs=1e-3)
    assert after["loss"] < before["loss"] - 0.01
    assert after["rewards/margins"] > 0 == pytest.approx(before["rewards/margins"], abs=1e-6)
    assert result["budget"]["spent"] == result["budget"]["stored"]
    count = 6 if objective == "dpo" else 3  # of answers that are wanted
    assert result["after"]["loss"]["examples"] == count
    assert list(losses(tmp_path / "run")) == list(range(1, 13))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved and not (tmp_path / "run" / "ref").exists()
    assert any("q_proj.lora_B" in name for name in saved) == bool(beside)


@pytest.mark.parametrize(
    ("objective", "method"),
    [("dpo", "lora-all-gradient"), ("kto", "drlora-informed"), ("dpo", "hot")],
)
def test_ranks_and_rows_are_placed_by_the_objectives_loss(tmp_path, objective, method, monkeypatch):
    """Of pairs or verdicts as they are trained on; what TRL logs shows nothing of it."""
    found, tokens = [], []

    def looked_at(model, batches, *args, loss, **kwargs):
        kept = list(batches)
        found.extend(loss(model, batch) for batch in kept)
        tokens.extend(int(batch["attention_mask"].sum()) for batch in kept)
        place_ranks(model, kept, *args, loss=loss, **kwargs)

    monkeypatch.setattr("drlora.trainer.callback.place_ranks", looked_at)
    recipe = save_preferences(tmp_path, objective, method=method)
    assert main(["train", str(recipe)]) == 0
    start = 0.6931 if objective == "dpo" else 0.5
    assert [loss.item() for loss in found] == pytest.approx([start] * 4, abs=1e-3)
    assert all(loss.requires_grad for loss in found)
    result = result_of(tmp_path)
    before, after = (result[when]["objective"]["loss"] for when in ("before", "after"))
    assert result["verdict"] == "ok" and after < before - 0.01
    logged = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    assert logged[-1]["num_tokens"] == 3 * sum(tokens)  # in 3 epochs of the same 16 examples


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_resumed_run_is_the_straight_one(tmp_path, objective, monkeypatch):
    straight = save_preferences(tmp_path / "straight", objective)
    cut = save_preferences(tmp_path / "cut", objective)
    assert_resumed_is_straight(straight, cut, 8, monkeypatch)


@pytest.mark.filterwarnings("ignore:start_from_ranks 'again'")
def test_a_reference_that_is_computed_beforehand_is_that_of_the_straight_run(tmp_path, monkeypatch):
    """That of the adapter that the run began with, also when it is resumed."""
    assert main(["train", str(save_all(tmp_path / "first"))]) == 0
    from_first = {"start_from": str(tmp_path / "first" / "run")}
    settings = {"precompute_ref_log_probs": True, "learning_rate": 0.003}
    straight, cut = (
        save_preferences(tmp_path / name, "dpo", training=settings, **from_first)
        for name in ("straight", "cut")
    )
    for recipe in (straight, cut):
        tree = yaml.safe_load(recipe.read_text()) | {"start_from_ranks": "again"}
        recipe.write_text(yaml.safe_dump(tree))
    assert_resumed_is_straight(straight, cut, 8, monkeypatch)


@pytest.mark.parametrize("beside", [[], ["q_proj", "v_proj"]])
def test_a_run_that_continues_an_adapter_has_it_as_reference(tmp_path, beside, monkeypatch, capsys):
    """It is the adapter as it was, does not move, and is there again after a resume."""
    first = tmp_path / "first"
    adapter = {"adapter": {"target_modules": beside}} if beside else {}
    assert main(["train", str(save_all(first, **adapter))]) == 0
    more = dict(start_from=str(first / "run"), start_from_ranks="grow", model=str(first / "model"),
                **adapter)  # fmt: skip
    straight, cut = (save_preferences(tmp_path / n, "dpo", **more) for n in ("straight", "cut"))
    for recipe in (straight, cut):  # which is to keep the ranks that the adapter has
        recipe.write_text(recipe.read_text().replace("  r_init: 1\n", "").replace(
            "r_target: 3", "r_target: 4"))  # fmt: skip
    kept = []
    fit = Training.fit

    def watching(self):
        kept.append(self.trainer)
        fit(self)

    monkeypatch.setattr(Training, "fit", watching)
    assert main(["train", str(straight)]) == 0
    assert f"the reference is the adapter of {first / 'run'}" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_at(8, patch)
        assert main(["train", str(cut)]) == 130
    assert main(["train", str(cut), "--resume"]) == 0
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "straight" / "run")

    base = AutoModelForCausalLM.from_pretrained(first / "model")
    ids = torch.randint(3, 20, (2, 8))
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, first / "run").eval()(ids).logits
        for trainer in (kept[0], kept[-1]):
            model = trainer.model.eval()
            model.set_adapter("ref")
            torch.testing.assert_close(model(ids).logits, wanted)
            model.set_adapter("default")
            assert (model(ids).logits - wanted).abs().max() > 1e-3
    assert not (tmp_path / "straight" / "run" / "ref").exists()


class Tokens(TrainerCallback):
    """Notes what the meters hold at each optimizer step, before it is used."""

    def __init__(self):
        self.counts = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        adapter = next(iter(adapted_layers(model, "default").values())).adapter("default")
        self.counts.append(adapter.meter.num_tokens.item())


def test_routing_is_that_of_the_policy(tmp_path, monkeypatch):
    """Chosen and rejected answers with their prompts, once each; of the reference nothing."""
    recipe = save_preferences(tmp_path, "dpo", training=dict(max_steps=4, save_steps=4),
                              adapter=dict(r_init=3))  # fmt: skip
    tokens, make = Tokens(), Training._make_trainer

    def with_tokens(self):
        trainer = make(self)
        trainer.callback_handler.callbacks.insert(0, tokens)
        return trainer

    monkeypatch.setattr(Training, "_make_trainer", with_tokens)
    assert main(["train", str(recipe)]) == 0
    in_data = sum(
        2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2 for row in PAIRS
    )
    assert len(tokens.counts) == 4 and sum(tokens.counts) == in_data


def test_prompts_that_fill_the_length_are_counted(tmp_path, capsys):
    recipe = save_preferences(tmp_path, "dpo")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a" * 40, "chosen": " a", "rejected": " b"}) + "\n")
    overrides = ["data.max_length=12", "training.max_steps=12"]
    assert main(["train", str(recipe), *overrides, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"]["train"] == {"used": 16, "dropped": 1, "truncated": 16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(objective="reward"), "TRL's RewardTrainer the callback"),
        (dict(objective="orpo"), "in trl.experimental if at all"),
        (dict(objective="dop"), "known are sft, dpo, kto, grpo"),
        (dict(objective="dpo", training=dict(packing=True)), "packing is not a setting"),
        (dict(objective="sft", training=dict(beta=0.1)), "beta"),
        (
            dict(objective="grpo", reward="exact", adapter=dict(start="gradient")),
            "which objective='grpo' has not before",
        ),
        (dict(objective="dpo", training=dict(max_length=9)), "set data.max_length"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, said):
    recipe = save_all(tmp_path, **changes)
    with pytest.raises(ConfigError, match=said):
        load_recipe(recipe)


def test_evaluations_in_between_have_the_objectives_figures(tmp_path):
    recipe = save_preferences(tmp_path, "dpo", training=dict(eval_strategy="steps", eval_steps=4))
    assert main(["train", str(recipe)]) == 0
    found = [e for e in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in e]
    assert [e["step"] for e in found] == [4, 8, 12]
    assert all("eval_rewards/accuracies" in e for e in found)
    after = result_of(tmp_path)["after"]["objective"]
    assert after["loss"] == pytest.approx(found[-1]["eval_loss"])


def test_a_finished_run_is_measured_and_exported_by_the_answers_that_are_wanted(tmp_path, capsys):
    recipe = save_preferences(tmp_path, "dpo")
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == result_of(tmp_path)["after"]["loss"]
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "run"), "--format", "peft", "-o", out]) == 0


def test_pairs_without_a_prompt_and_of_messages(tmp_path, capsys):
    """The prompt is what both answers begin with."""
    recipe = save_preferences(tmp_path, "dpo", training=dict(max_steps=8, save_steps=8))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% else %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    for name, words in (("train", WORDS), ("eval", [f"x{word}" for word in WORDS[:4]])):
        ask = [{"role": "user", "content": word} for word in words]
        rows = [
            {
                "chosen": [turn, {"role": "assistant", "content": turn["content"][::-1]}],
                "rejected": [turn, {"role": "assistant", "content": "no"}],
            }
            for turn in ask
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    words = [f"chat_template={tmp_path / 'chat.jinja'}"]
    assert main(["train", str(recipe), *words]) == 0
    after = result_of(tmp_path)["after"]
    assert after["loss"]["examples"] == 4 and after["objective"]["loss"] < 0.69
    assert after["match"] is None and "prompts are messages" in str(after["notes"])
    assert [s["prompt"] for s in after["samples"]] == [f"x{word}" for word in WORDS[:4]]


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_template_that_is_missing_or_refuses_is_told_before_a_weight_is_loaded(
    tmp_path, capsys, objective
):
    tries = {"reward": "exact", "training": {"num_generations": 2}}
    recipe = save_all(tmp_path, objective=objective, **(tries if objective == "grpo" else {}))
    ask, answer = {"role": "user", "content": "a"}, [{"role": "assistant", "content": "b"}]
    row = {"chosen": [ask, *answer], "rejected": [ask, *answer]}
    row = row if objective == "dpo" else {"prompt": [ask], "completion": answer}
    for name in ("train", "eval"):
        rows = [{**row, "answers": [name]} if "prompt" in row else row] * 4
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["train", str(recipe), "--dry-run"]) == 2
    assert "has no chat template; use the tokenizer of" in capsys.readouterr().err
    (tmp_path / "no.jinja").write_text("{{ raise_exception('no users here') }}")
    assert main(["train", str(recipe), "--dry-run", f"chat_template={tmp_path / 'no.jinja'}"]) == 2
    said = capsys.readouterr().err
    assert "train.jsonl: no users here" in said and "chat_template: FILE" in said


def test_held_out_verdicts_need_a_good_answer(tmp_path, capsys):
    recipe = save_preferences(tmp_path, "kto")
    bad = [{**row, "prompt": f"y{row['prompt']}"} for row in VERDICTS if not row["label"]]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    assert main(["train", str(recipe), "--dry-run"]) == 2
    assert f"none of {len(bad)} held-out examples has a good answer" in capsys.readouterr().err


def test_verdicts_are_not_learned_as_if_all_were_good(tmp_path, capsys):
    recipe = save_all(tmp_path)
    for name in ("train", "eval"):
        text = "".join(json.dumps(row) + "\n" for row in VERDICTS)
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert main(["train", str(recipe), "--dry-run"]) == 2
    assert "Take objective: kto" in capsys.readouterr().err
    assert main(["train", str(recipe), "objective=dpo", "--dry-run"]) == 2
    assert "objective='dpo' learns from chosen and rejected" in capsys.readouterr().err
