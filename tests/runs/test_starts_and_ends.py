"""A start that fails leaves nothing behind; an end that is no success says so."""

from __future__ import annotations

import json
import os
import signal
import warnings
from functools import partial
from pathlib import Path

import pytest
from run_checks import lines
from tiny_run import save_all, save_model_folder

import drlora
import drlora.runs.train as train_module
from drlora.cli.main import main
from drlora.evaluation.evaluate import LossResult
from drlora.evaluation.measure import Measurement
from drlora.report.facts import lead
from drlora.report.read import read_run
from drlora.runs.metrics_log import MetricsLog
from drlora.runs.outcome import reasons_of_divergence
from drlora.trainer.trainer import RunTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model) -> Path:
    return save_all(tmp_path, model=str(model))


SHORT = ["training.max_steps=2", "training.warmup_steps=0", "adapter.r_init=3"]
BAD_STARTS = [
    ("training.optim=adamw_bnb_8bit", "bitsandbytes"),
    ("training.optim=no_such", "no_such is not a valid"),
    ("training.report_to=wandb", "requires wandb to be installed"),
    ("training.report_to=nowhere", "nowhere is not supported"),
    ("training.fp16=true", "training.fp16=true: on the CPU"),
    ("training.use_liger_kernel=true", "needs the package liger-kernel"),
    ("training.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
    ("training.lr_scheduler_kwargs={cycles: 2}", "unexpected keyword argument 'cycles'"),
    ("training.torch_compile_backend=none_such", "not a valid DynamoBackend"),
    ("evaluation.draw=last", "evaluation.draw='last'"),
    ("start_ranks=RANKS", "other projections: missing are"),
    ("data.eval=TEXT", "evaluation.exact_match=true needs prompt and completion"),
    ("data.eval=SEVERAL", "has several"),
    ("data.eval=ONE_CHOICE", "give every example two or more"),
    ("output_dir=FILE/run", "is a file"),
]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Data and ranks that cannot be used."""
    contents = {
        "RANKS": {"elsewhere": {"down": [1]}},
        "TEXT": {"text": "ab"},
        "SEVERAL": {"prompt": "a", "completion": "b\nc"},
        "ONE_CHOICE": {"prompt": "a", "completion": "b", "choices": ["b"]},
        "FILE": {},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: str(tmp_path / f"{name}.json") for name in contents}


@pytest.mark.parametrize(("override", "said"), BAD_STARTS)
def test_a_start_that_fails_leaves_nothing_and_the_dry_run_finds_it(
    recipe, tmp_path, capsys, monkeypatch, files, override, said
):
    monkeypatch.setattr(train_module, "load_base_model", None)  # no weights, so no measurement
    for name, path in files.items():
        override = override.replace(name, path)
    words = [str(recipe), f"output_dir={tmp_path / 'new' / 'run'}", override]
    if "data.eval" in override:
        words.append("evaluation.exact_match=true")
    for extra in ([], ["--dry-run"]):
        assert main(["train", *words, *extra]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("error: ") == 1
    assert not (tmp_path / "new").exists(), "nor the folder above it"


def test_a_folder_in_which_no_step_was_taken_is_free(recipe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel for this")

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", fail)
        with pytest.raises(RuntimeError, match="no kernel"):
            main(["train", str(recipe)])
    assert (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file()
    assert main(["train", str(recipe), *SHORT, "evaluation.exact_match=false"]) == 0
    before = [e for e in lines(run / "metrics.jsonl") if e["kind"] == "before"]
    assert len(before) == 1 and before[0]["match"] is None, "that of this run"
    assert main(["train", str(recipe)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_overwrite_replaces_a_run_and_nothing_else(recipe, tmp_path, capsys, monkeypatch):
    run, outside = tmp_path / "run", tmp_path / "outside"
    assert main(["train", str(recipe), *SHORT]) == 0
    outside.mkdir()
    (outside / "checkpoint-9").mkdir()
    (outside / "checkpoint-9" / "mine").write_text("kept")
    (run / "notes.txt").write_text("mine")
    # A start that fails replaces nothing.
    old = (run / "result.json").read_bytes()
    bad = ["training.optim=adamw_bnb_8bit", "--overwrite"]
    assert main(["train", str(recipe), *SHORT, *bad]) == 2
    assert (run / "result.json").read_bytes() == old
    assert main(["train", str(recipe), *SHORT, "--overwrite", "training.seed=7"]) == 0
    assert json.loads((run / "result.json").read_text())["seed"] == 7
    assert (run / "notes.txt").read_text() == "mine"
    # Nor does it follow a link out of the run.
    drlora.runs.rundir.shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(outside)
    capsys.readouterr()
    assert main(["train", str(recipe), *SHORT, "--overwrite"]) == 2
    assert "leads out of the run" in capsys.readouterr().err
    drlora.runs.rundir.RunDir(run).clear()
    assert (outside / "checkpoint-9" / "mine").read_text() == "kept"
    assert [p.name for p in run.iterdir() if p.name != "README.md"] == ["notes.txt"]


def test_templates_of_a_tokenizer_that_has_several_are_replaced(tmp_path):
    """transformers saves them in a folder, which is not renamed onto another."""
    run = drlora.runs.rundir.RunDir(tmp_path / "run")
    run.path.mkdir()

    def save(name, folder):
        templates = folder / "additional_chat_templates"
        templates.mkdir()
        (templates / f"{name}.jinja").write_text(name)
        (folder / "adapter_model.safetensors").write_text(name)

    for name in ("tool", "rag"):
        run.write_adapter(partial(save, name))
    assert [p.name for p in run.path.glob("*/*")] == ["rag.jinja"]
    assert run.adapter.read_text() == "rag"
    run.clear()
    assert not list(run.path.iterdir())


@pytest.mark.parametrize("content", [None, "other: 1\n"], ids=["none", "another's"])
def test_overwrite_refuses_what_is_no_run(recipe, tmp_path, capsys, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text("{}")
    if content:
        (run / "config.yaml").write_text(content)
    assert main(["train", str(recipe), "--overwrite"]) == 2
    assert "no run directory that --overwrite could replace" in capsys.readouterr().err
    assert (run / "result.json").exists()
    (run / "result.json").unlink()
    if content:  # a recipe of somebody's, say
        assert main(["train", str(recipe)]) == 2
        assert (run / "config.yaml").read_text() == content
    assert main(["train", str(recipe), "--overwrite", "--resume"]) == 2
    assert "contradict each other" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["training", "before"])
def test_sigterm_saves_a_checkpoint_as_ctrl_c_does(recipe, tmp_path, monkeypatch, capsys, where):
    on_log, measure = MetricsLog.on_log, train_module.measure

    def terminated(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs, **kwargs)
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    def terminated_first(*args):
        signal.raise_signal(signal.SIGTERM)
        return measure(*args)

    with monkeypatch.context() as patch:
        if where == "training":
            patch.setattr(MetricsLog, "on_log", terminated)
        else:
            patch.setattr(train_module, "measure", terminated_first)
        assert main(["train", str(recipe)]) == 143
    err = capsys.readouterr().err
    assert "terminated" in err and "--resume" in err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "checkpoint-4").is_dir() == (where == "training")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if where == "training":
        assert "terminated at step 4; a checkpoint is saved" in err


def test_a_diverged_run_is_no_success(recipe, tmp_path, capsys):
    """Its weights are NaN: it ends where that shows, and everything says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradients that are NaN or infinite")
        words = ["training.learning_rate=1e6", "evaluation.exact_match=false"]
        assert main(["train", str(recipe), *words]) == 3
    said, run = capsys.readouterr(), tmp_path / "run"
    assert said.err.splitlines()[-1].startswith("DIVERGED: the training loss was NaN or infinite")
    result = json.loads((run / "result.json").read_text())
    assert result["verdict"] == "diverged" and result["steps"] < 12
    assert "stopped at step" in result["diverged"][-1]
    assert "This run diverged, its adapter is not to be used" in (run / "README.md").read_text()
    assert lead(read_run(run)).startswith("This run diverged")
    assert main(["train", str(recipe), *words, "--resume"]) == 2
    assert "has diverged, there is nothing to go on from" in capsys.readouterr().err


def measured(loss: float) -> Measurement:
    return Measurement(LossResult(loss, 1.0, 1), None)


def log(*losses) -> list[dict]:
    return [{"step": n, "kind": "log", "loss": loss} for n, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("before", "after", "entries", "said"),
    [
        (2.0, 1.9, log(2.0, 1.0), None),
        (2.0, 2.0, log(2.0, 2.0), None),  # nothing learned is no divergence
        (2.0, 2.01, log(2.0, 1.0), "the held-out loss rose from 2 to 2.01"),
        (2.0, float("nan"), log(2.0, 1.0), "the held-out loss is nan"),
        (2.0, float("inf"), log(2.0, 1.0), "the held-out loss is inf"),
        (2.0, 1.0, log(2.0, None), "the training loss was NaN or infinite at step 2"),
        (2.0, 1.0, log(2.0, 0.0), "the training loss was exactly 0 at step 2"),
        (2.0, 1.0, log(2.0, 1e-9), None),
        (None, 1.0, log(2.0, 2.1, 1.9, 2.2), None),
        (None, 9.0, log(2.0, 5.0, 7.0, 8.0), "the training loss rose from 2 to 8"),
    ],
)
def test_what_divergence_is(before, after, entries, said):
    earlier = None if before is None else measured(before)
    assert reasons_of_divergence(earlier, measured(after), entries) == ((said,) if said else ())


@pytest.mark.parametrize(
    ("after", "loss", "said"),
    [
        (0.6, 0.0, None),  # a loss of 0 is what GRPO has by its making
        (0.4, 0.0, None),  # within two standard errors of 4 answers with a spread of 0.1
        (0.2, 0.0, "the held-out reward fell from 0.5 to 0.2"),
        (0.6, None, "the training loss was NaN or infinite at step 2"),
    ],
)
def test_what_divergence_is_where_answers_are_rewarded(after, loss, said):
    entries = [{**entry, "reward": 0.5} for entry in log(0.0, loss)]
    one, other = (
        Measurement(LossResult(2.0, 1.0, 4, 4), None, (), {"reward": reward, "reward_std": 0.1})
        for reward in (0.5, after)
    )
    assert reasons_of_divergence(one, other, entries) == ((said,) if said else ())


def test_home_is_written_out_in_every_path(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = recipe.read_text().replace(f"{tmp_path}/", "~/")
    assert text.count("~/") >= 3
    recipe.write_text(text)
    assert main(["train", "~/recipe.yaml", "--dry-run"]) == 0
    assert main(["train", "~/recipe.yaml", *SHORT]) == 0
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert "~" not in kept and f"output_dir: {tmp_path / 'run'}" in kept
    capsys.readouterr()
    assert main(["eval", "~/run", "--data", "~/eval.jsonl", "--json"]) == 0
    assert not os.path.exists("~")


def test_a_run_shows_what_it_is_doing(recipe, capsys):
    words = ["evaluation.loss_examples=200", "data.limits.train=99", "evaluation.exact_match=false"]
    assert main(["train", str(recipe), *words, "training.gradient_accumulation_steps=2"]) == 0
    said = capsys.readouterr().out.splitlines()
    for line in (
        "train    24 examples",
        "held out 6 examples",
        "length   12 steps of 8 examples (batch 4 x 2 accumulated), 4 epochs",
        "device   cpu",
        "measuring before training: 6 examples ...",
        "data.limits.train=99, but only 24 examples are there: all are taken",
    ):
        assert line in said, said
    assert any("evaluation.loss_examples=200, but there are 6" in line for line in said)
    assert any(s.startswith("step 2/12, epoch 0.67, loss 4") and s.endswith(" left") for s in said)
