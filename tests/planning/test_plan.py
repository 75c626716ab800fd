"""`drlora plan`: what it writes fits, can be trained, and is held against what the run took.

Run: make test ARGS=tests/planning/test_plan.py
"""

import json

import pytest
import torch
from tiny_run import save_examples, save_model_folder

import drlora
import drlora.forecast.pace as pace
from drlora.cli.main import main
from drlora.errors import ConfigError
from drlora.planning.fit import changes
from drlora.planning.rates import range_test, rate_by_width
from drlora.planning.room import find_room, size_of
from drlora.runs.recipe import load_recipe

SHORT = ["training.max_steps=2", "training.warmup_steps=0", "adapter.r_init=16",
         "evaluation.exact_match=false"]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_model_folder(tmp_path / "model", num_hidden_layers=4)
    save_examples(tmp_path / "train.jsonl", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_is_written_trained_and_compared(folder, capsys):
    assert main(["plan", "model", "train.jsonl", *SHORT, "-o", "own.yaml"]) == 0
    said = capsys.readouterr().out
    assert "in all: fits" in said and "drlora train own.yaml" in said
    assert "learning rate" in said and "lora-gradient" in said
    recipe = load_recipe("own.yaml")
    assert recipe.forecast and recipe.forecast["memory_gb"] > 0.1
    assert recipe.forecast["step_seconds"] > 0
    assert recipe.training["learning_rate"] == rate_by_width(32)
    assert main(["train", "own.yaml"]) == 0
    kept = json.loads((folder / "runs/own/forecast.json").read_text())
    assert kept["planned"] == recipe.forecast
    parts = kept["memory_bytes"]
    assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k != "total"), abs=9)
    report = drlora.write_report(["runs/own"], format="md").read_text()
    assert "Memory, forecast" in report and "Time a step, forecast" in report
    assert "than measured)" in report


def test_what_does_not_fit_is_changed_the_cheapest_first(folder):
    """The process alone takes more than is given, so everything is tried."""
    words = ["plan", "model", "train.jsonl", "-o", "a.yaml", "--no-timing", "--memory", "100MB"]
    assert main([*words, *SHORT]) == 1
    recipe = load_recipe("a.yaml")
    assert recipe.forecast and "step_seconds" not in recipe.forecast
    assert recipe.training["per_device_train_batch_size"] == 1
    plain = drlora.plan("model", "train.jsonl", "c.yaml", SHORT, measures=False)
    assert plain.fits and not plain.changed
    tight = drlora.plan("model", "train.jsonl", "b.yaml", SHORT, memory="100MB", measures=False)
    assert not tight.fits and tight.changed
    # Not the whole, of which this process is nearly all, and is not the same twice.
    of_run = [made.memory.total - made.memory.process for made in (plain, tight)]
    assert of_run[0] > of_run[1]
    training = plain.recipe.training
    whole = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert recipe.training["gradient_accumulation_steps"] == whole


def test_gradients_are_kept_between_the_passes_of_a_step(folder):
    words = [*SHORT, "training.per_device_train_batch_size=1", "data.max_length=8"]
    peaks = []
    for passes in (1, 4):
        own = [*words, f"training.gradient_accumulation_steps={passes}"]
        made = drlora.plan("model", "train.jsonl", f"{passes}.yaml", own, measures=False)
        peaks.append(made.memory.step)
    assert peaks[1] > peaks[0] + made.memory.adapter / 3


def test_code_that_comes_with_the_model_runs_where_it_is_trusted(folder):
    (folder / "model" / "own_code.py").write_text(
        "from transformers import OlmoeConfig, OlmoeForCausalLM\n"
        "class OwnConfig(OlmoeConfig):\n    model_type = 'own_moe'\n"
        "class OwnModel(OlmoeForCausalLM):\n    config_class = OwnConfig\n"
    )
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "own_moe",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "own_code.OwnConfig",
            "AutoModelForCausalLM": "own_code.OwnModel",
        },
    }
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        drlora.plan("model", "train.jsonl", "a.yaml", SHORT, measures=False)
    words = [*SHORT, "trust_remote_code=true"]
    assert drlora.plan("model", "train.jsonl", "b.yaml", words, measures=False).fits
    assert main(["inspect", "model"]) == 2
    assert main(["inspect", "model", "--trust-remote-code"]) == 0


def test_for_a_card_that_is_not_here(folder):
    made = drlora.plan("model", "train.jsonl", "a.yaml", SHORT, gpu="T4")
    assert made.fits and "not measured" in made.step_from
    assert made.recipe.dtype == "float16" and made.recipe.training["fp16"] is True
    assert made.memory.checkpoint == made.memory.allocator == 0
    assert json.dumps(made.to_dict())


def test_what_is_given_stays(folder):
    words = [*SHORT, "training.learning_rate=0.5", "data.max_length=8",
             "training.per_device_train_batch_size=2"]  # fmt: skip
    made = drlora.plan("model", "train.jsonl", "a.yaml", words, memory="100MB", measures=False)
    assert made.recipe.training["learning_rate"] == 0.5
    assert made.recipe.data.max_length == 8
    assert made.recipe.training["per_device_train_batch_size"] == 2
    with pytest.raises(ConfigError, match="is there already"):
        drlora.plan("model", "train.jsonl", "a.yaml", words)


def test_a_range_test_takes_the_best_rate(folder):
    made = drlora.plan("model", "train.jsonl", "a.yaml", SHORT, measures=False)
    best, tried = range_test(made.recipe, 1e-3, steps=2, multiples=(1, 4))
    losses = {one.rate: one.loss for one in tried if one.loss is not None}
    assert len(tried) == 2 and best == min(losses, key=losses.__getitem__)
    # A warm-up in steps, which is longer than the test, is the same share of it.
    words = [*SHORT[2:], "training.max_steps=12", "training.warmup_steps=6", "adapter.router=train"]
    made = drlora.plan("model", "train.jsonl", "b.yaml", words, measures=False)
    best, _ = range_test(made.recipe, 1e-3, steps=4, multiples=(1,))
    assert best == 1e-3


@pytest.mark.parametrize("method", ["lora-gradient", "static", "hot"])
def test_layers_are_timed_with_the_ranks_that_data_will_place(folder, monkeypatch, method):
    """An expert without ranks would be timed without its LoRA, and is refused in training."""
    seen = []
    step = pace._step
    monkeypatch.setattr(pace, "_step", lambda m, b: seen.append(drlora.rank_map(m)) or step(m, b))
    words = [*SHORT, f"method={method}"]
    made = drlora.plan("model", "train.jsonl", "a.yaml", words)
    ranks = {r for of in seen for block in of.values() for rs in block.values() for r in rs}
    assert "not measured" not in made.step_from
    assert ranks == {made.recipe.adapter.r_target}


def test_the_rule_of_rates():
    """Ten times full fine-tuning's 5e-5 at 2000, more where models are narrower."""
    assert rate_by_width(2000) == 5e-4
    assert rate_by_width(128) == pytest.approx(4.3e-3)


def test_changes_come_in_order():
    said = [change.says for change in changes(4, 2, 512, 16, None, on_cpu=True)]
    first = [next(n for n, text in enumerate(said) if word in text)
             for word in ("2 at once", "1 at once", "computed again", "nf4", "256 tokens",
                          "r_target 8")]  # fmt: skip
    assert first == sorted(first)
    assert not any("nf4" in change.says for change in changes(1, 1, 64, 4, "int8", True))


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("900 MB", 9e8), ("16", 16e9), ("1.5g", 1.5e9)]
)
def test_sizes(text, size):
    assert size_of(text, "gpu") == size


def test_of_a_card_that_is_here_what_is_free_counts(monkeypatch):
    for name, found in (("is_available", True), ("mem_get_info", (3e9, 24e9)),
                        ("get_device_name", "a card"), ("is_bf16_supported", True)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    room = find_room()
    assert (room.name, room.memory_bytes, room.device) == ("a card", 3e9, "cuda")


def test_rooms():
    assert find_room("rtx 4090").memory_bytes == 24e9
    assert find_room("40GB").gpu is not None
    assert not find_room("t4").has_bf16
    with pytest.raises(ConfigError, match="no size such as 24GB"):
        find_room("a large one")
