"""A run that is resumed, lengthened, or started from another: the same run, or a plain word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from run_checks import assert_same_run, interrupt_at, lines
from tiny import make_batch, make_model, plain_loop, trainable
from tiny_run import save_all, save_examples
from tiny_trainer import SETTINGS, callback_of, dynamics_of, make_trainer

import drlora
from drlora.cli.main import main
from drlora.io.jsonl import read_lines
from drlora.trainer.trainer import RunTrainer

LONGER = "training.num_train_epochs=4"


def save_epochs(folder: Path, **training) -> Path:
    """As `save_all`, but the length is two epochs: 12 steps of 4 of the 24 examples."""
    recipe = save_all(folder)
    tree = yaml.safe_load(recipe.read_text())
    del tree["training"]["max_steps"]
    tree["training"] |= dict(num_train_epochs=2, **training)
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def cut_at(step: int, monkeypatch, recipe: Path, *overrides: str) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        assert main(["train", str(recipe), *overrides]) == 130


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def fewer(folder: Path) -> None:
    save_examples(folder / "train.jsonl", count=16)


def mended(folder: Path) -> None:
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("aaa", "aab"))


def other_held_out(folder: Path) -> None:
    save_examples(folder / "eval.jsonl", count=29, start=24)


def other_tokens(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    tree = json.loads(path.read_text())
    words = tree["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fewer, "the training data is not what .* 24 examples then, 16 now"),
        (mended, "the training data is not what .* 24 examples then and now, but with other"),
        (other_held_out, "the held-out data is not what .* 6 examples then, 5 now"),
        (other_tokens, "encoded otherwise: the tokenizer gives other tokens"),
    ],
)
def test_resume_on_changed_data_is_refused(tmp_path, monkeypatch, change, said):
    recipe = save_epochs(tmp_path)
    cut_at(7, monkeypatch, recipe)
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}
    change(tmp_path)
    with pytest.raises(drlora.ConfigError, match=said):
        main(["train", str(recipe), "--resume", "--debug"])
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}


def test_data_that_only_lie_otherwise_are_the_same(tmp_path, monkeypatch):
    """Blank lines and a byte order mark are no content."""
    recipe = save_epochs(tmp_path)
    cut_at(7, monkeypatch, recipe)
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n", 3))
    assert main(["train", str(recipe), "--resume"]) == 0
    assert result_of(tmp_path / "run")["steps"] == 12


def too_large(at: int, monkeypatch, most: int = 2):
    """A batch of more than `most` examples does not fit from step `at` on."""
    real = RunTrainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > most and self.state.global_step >= at:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", step)


def test_a_batch_found_late_makes_the_run_of_that_batch(tmp_path, monkeypatch):
    """It is found again on resume, its length too, and nothing is told twice."""
    straight, found = tmp_path / "straight", tmp_path / "found"
    small = save_epochs(straight, per_device_train_batch_size=2)
    assert main(["train", str(small)]) == 0
    recipe = save_epochs(found, auto_find_batch_size=True, per_device_train_batch_size=4)
    with monkeypatch.context() as patch:
        too_large(5, patch)
        cut_at(15, patch, recipe)
        assert {p.name for p in (found / "run" / "checkpoints").iterdir()} == {
            "checkpoint-12",
            "checkpoint-15",
        }
        assert main(["train", str(recipe), "--resume"]) == 0
    assert_same_run(found / "run", straight / "run")
    logged = [e["step"] for e in lines(found / "run" / "metrics.jsonl") if "learning_rate" in e]
    assert logged == [*range(1, 25)]
    record = json.loads((found / "run" / "run.json").read_text())
    assert (record["steps"], record["batch_size"]) == (24, 2)
    assert [(r["batch_size"], r["steps"]) for r in record["restarts"]] == [(4, 5), (3, 5)]
    assert result_of(found / "run")["restarts"] == record["restarts"]


def test_time_and_steps_are_those_of_the_whole_run(tmp_path, monkeypatch):
    recipe = save_all(tmp_path)
    cut_at(7, monkeypatch, recipe)
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-7/trainer_state.json").read_text())
    state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] = 1000.0
    path = tmp_path / "run/checkpoints/checkpoint-7"
    (path / "trainer_state.json").write_text(json.dumps(state))
    drlora.io.checkpoint.seal(path)
    assert main(["train", str(recipe), "--resume"]) == 0
    result = result_of(tmp_path / "run")
    assert result["steps"] == 12 and 1000 < result["seconds"] < 1100


def test_a_finished_run_can_be_given_more_steps(tmp_path, monkeypatch, capsys):
    recipe, run = save_all(tmp_path), tmp_path / "run"
    assert main(["train", str(recipe)]) == 0
    first, growth = result_of(run), (run / "growth.jsonl").read_text()
    assert main(["train", str(recipe), "--resume", "training.max_steps=9"]) == 2
    assert "is at step 12 already" in capsys.readouterr().err
    more = [str(run / "config.yaml"), "--resume", "training.num_train_epochs=3"]
    cut_at(15, monkeypatch, *more)
    assert "planned for 12 steps and is given 18: ranks grow as planned" in capsys.readouterr().out
    assert main(["train", str(run / "config.yaml"), "--resume"]) == 0
    second = result_of(run)
    assert (first["steps"], second["steps"]) == (12, 18) and second["ranks"] == first["ranks"]
    assert json.loads((run / "result-at-12.json").read_text()) == first
    shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    (tmp_path / "bare" / "checkpoints").mkdir()
    assert main(["train", *more, f"output_dir={tmp_path / 'bare'}", LONGER]) == 2
    assert "no whole checkpoint that it could go on from" in capsys.readouterr().err
    assert (run / "growth.jsonl").read_text() == growth and second["seconds"] > first["seconds"]
    entries = lines(run / "metrics.jsonl")
    assert [e["step"] for e in entries if e["kind"] in ("before", "after")] == [0, 12, 18]
    rates = {e["step"]: e["learning_rate"] for e in entries if "learning_rate" in e}
    # Linear from step 2 to 12, then what is left of one from 2 to 18.
    assert rates[12] == pytest.approx(0.001) and rates[13] == pytest.approx(0.01 * 6 / 16)


def test_a_run_that_was_moved_goes_on_from_any_directory(tmp_path, monkeypatch):
    recipe = save_all(tmp_path / "here")
    tree = yaml.safe_load(recipe.read_text().replace(f"{tmp_path / 'here'}/", ""))
    recipe.write_text(yaml.safe_dump(tree))
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "here")
        cut_at(7, patch, Path("recipe.yaml"))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "here" / "run", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "moved/config.yaml", "--resume"]) == 0
    assert result_of(Path("moved"))["steps"] == 12 and not (tmp_path / "here" / "run").exists()


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A finished run, and what it needs."""
    folder = tmp_path_factory.mktemp("first")
    assert main(["train", str(save_all(folder))]) == 0
    return folder


NEXT = ["training.max_steps=4", "evaluation.exact_match=false", "adapter.grow_every=1"]


@pytest.mark.parametrize(
    ("settings", "spent"),
    [
        (["start_from_ranks=keep"], 72),
        (["start_from_ranks=grow", "adapter.r_target=5", "adapter.p_grow=auto"], 120),
        (["start_from_ranks=again", "adapter.r_init=2", "adapter.p_grow=auto"], 72),
    ],
    ids=["keep", "grow", "again"],
)
@pytest.mark.filterwarnings("ignore:start_from_ranks 'again'")
def test_a_run_starts_from_another_one(first, tmp_path, settings, spent):
    tree = yaml.safe_load((first / "recipe.yaml").read_text())
    tree["adapter"] = dict(settle_steps=1)
    tree |= dict(start_from=str(first / "run"), output_dir=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "recipe.yaml"), *NEXT, *settings]) == 0
    before, after = result_of(first / "run"), result_of(tmp_path / "run")
    assert after["budget"]["spent"] == spent
    is_again = "start_from_ranks=again" in settings
    began = after["before"]["loss"]["loss"]
    assert (began == pytest.approx(before["after"]["loss"]["loss"], rel=1e-5)) != is_again
    if not is_again:
        for block, projections in before["ranks"].items():
            for name, ranks in projections.items():
                now = after["ranks"][block][name]
                assert all(new >= old for new, old in zip(now, ranks, strict=True))
    assert (after["ranks"] == before["ranks"]) == ("start_from_ranks=keep" in settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["start_from_ranks=grow"], "has spent its budget of 3 ranks an expert; raise"),
        (["start_from_ranks=keep", "adapter.r_init=1"], "ask for growth, but start_from_ranks is"),
        (["start_from_ranks=often"], "start_from_ranks='often' is not known"),
        (["start_from=null", "start_from_ranks=keep"], "has no effect without start_from"),
        (["adapter.r_target=2"], "makes room for 12"),
    ],
)
def test_a_start_that_contradicts_itself_is_refused(first, tmp_path, capsys, settings, said):
    tree = yaml.safe_load((first / "recipe.yaml").read_text())
    tree["adapter"] = {}
    tree |= dict(start_from=str(first / "run"), output_dir=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "recipe.yaml"), *settings]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[Path, torch.Tensor, dict]:
    """An adapter in the middle of its growth, what it computes, and its ranks."""
    folder = tmp_path_factory.mktemp("grown")
    torch.manual_seed(0)
    config = drlora.DrLoraConfig(**SETTINGS, router="train", target_modules=["q_proj"])
    model = get_peft_model(make_model(), config)
    dynamics = drlora.RankDynamics(model, 12)
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=1e-2), range(7))
    model.save_pretrained(folder)
    assert dynamics.budget()[0] < dynamics.budget()[1]
    return folder, model.eval()(**make_batch(5)).logits, drlora.rank_map(model)


def test_a_continued_adapter_computes_the_same(grown):
    folder, logits, ranks = grown
    for change in ({}, dict(r_target=6, r_max=12), dict(r_target=6, r_max=12, lora_alpha=3.0)):
        config = drlora.DrLoraConfig(
            **{**SETTINGS, **change}, router="train", target_modules=["q_proj"], target_rank=4,
            target_alpha=8.0,
        )  # fmt: skip
        model = drlora.continue_adapter(make_model(), folder, config, ranks="grow")
        torch.testing.assert_close(model.eval()(**make_batch(5)).logits, logits)
        assert drlora.rank_map(model) == ranks
        pools = [p for p in model.modules() if hasattr(p, "birth")]
        assert not any(p.importance.any() or p.birth.any() for p in pools), "a new run's statistics"


@pytest.mark.parametrize(
    "change",
    [dict(lora_alpha=16.0), dict(lora_alpha=16.0, use_rslora=True), dict(target_alpha=2.0)],
)
def test_a_continued_adapter_computes_the_same_whatever_the_scaling(grown, change):
    folder, logits, _ = grown
    config = drlora.DrLoraConfig(
        **{**SETTINGS, **change}, router="train", target_modules=["q_proj"], target_rank=4
    )
    model = drlora.continue_adapter(make_model(), folder, config, ranks="grow")
    torch.testing.assert_close(model.eval()(**make_batch(5)).logits, logits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(target_rank=3), "target_rank=3, but the LoRA on target_modules in .* has rank"),
        (dict(start="routing"), "start='routing' .* place what a new adapter begins with"),
        (dict(options={"start_a": "gradient"}), "options.start_a='gradient' place"),
    ],
)
def test_settings_that_an_adapter_cannot_be_continued_with(grown, change, said):
    config = drlora.DrLoraConfig(
        **{**SETTINGS, "router": "train", "target_modules": ["q_proj"], **change}
    )
    base = make_model()
    with pytest.raises(drlora.ConfigError, match=said):
        drlora.continue_adapter(base, grown[0], config, ranks="grow")
    assert not hasattr(base, "peft_config")


def test_ranks_given_out_again_keep_the_strongest_directions(grown):
    folder, logits, _ = grown
    config = dict(router="train", target_modules=["q_proj"], target_rank=4, target_alpha=8.0)
    enough = drlora.DrLoraConfig(**{**SETTINGS, "r_init": 8, "r_target": 9, "r_max": 9}, **config)
    model = drlora.continue_adapter(make_model(), folder, enough, ranks="again")
    torch.testing.assert_close(model.eval()(**make_batch(5)).logits, logits, rtol=1e-4, atol=1e-5)
    few = drlora.DrLoraConfig(**{**SETTINGS, "r_init": 1}, **config)
    with pytest.warns(UserWarning, match="the experts keep [0-9.]+% of their squared update"):
        model = drlora.continue_adapter(make_model(), folder, few, ranks="again")
    assert {r for b in drlora.rank_map(model).values() for row in b.values() for r in row} == {1}


def grants_of(folder: Path) -> list[dict]:
    return list(read_lines(folder / "growth.jsonl"))


def assert_tells_of_the_ranks(folder: Path, trainer) -> None:
    """The ranks at the start and the log's grants are the ranks of now; no step comes twice."""
    ranks = {block: [2] * 6 for block in dynamics_of(trainer).ranks()}
    grants = grants_of(folder)
    for grant in grants:
        ranks[grant["block"]][grant["expert"]] += grant["granted"]
        assert ranks[grant["block"]][grant["expert"]] == grant["rank"]
    assert ranks == {b: found["down"] for b, found in dynamics_of(trainer).ranks().items()}
    steps = [grant["step"] for grant in grants]
    assert steps == sorted(steps)


def test_train_called_twice_erases_nothing(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    first = grants_of(tmp_path)
    trainer.train()
    assert first and grants_of(tmp_path)[: len(first)] == first
    assert_tells_of_the_ranks(tmp_path, trainer)
    events = [e["step"] for e in read_lines(tmp_path / "events.jsonl")]
    assert events == sorted(events) and events[-1] == 16
    make_trainer(tmp_path, save_strategy="no").train()  # another run into the same folder
    assert list(read_lines(tmp_path / "growth-1.jsonl"))[: len(first)] == first


def test_a_smaller_batch_of_the_trainer_goes_on_and_says_so(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no", auto_find_batch_size=True,
                           per_device_train_batch_size=4)  # fmt: skip
    real = trainer.training_step

    def step(model, inputs, *args):
        if len(inputs["input_ids"]) > 3 and trainer.state.global_step >= 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return real(model, inputs, *args)

    trainer.training_step = step
    with pytest.warns(UserWarning, match="did not fit at step 4: transformers begins again"):
        trainer.train()
    assert_tells_of_the_ranks(tmp_path, trainer)
    assert callback_of(trainer).log_start == 4
    owned, stored = dynamics_of(trainer).budget()
    assert owned == stored and max(g["step"] for g in grants_of(tmp_path)) <= 4 + 8


def test_young_rows_of_a_second_call_have_the_clock_of_their_optimizer(tmp_path):
    """transformers keeps the optimizer, whose count goes on."""
    trainer = make_trainer(tmp_path, save_strategy="no", settings=dict(r_target=6))
    trainer.train()
    # Ranks are free again, so that growth goes on.
    for pool in dynamics_of(trainer)._pools():
        pool.release(torch.nonzero(pool.owner == 0)[1:, 0], step=0)
    trainer.train()
    births = torch.cat([pool.birth for pool in dynamics_of(trainer)._pools()])
    optimizer = trainer.optimizer.optimizer
    count = int(next(iter(optimizer.state.values()))["step"])
    assert count == 16 and 8 < births.max() <= 16


@pytest.mark.parametrize("steps", [10, 6])
def test_resume_with_another_length_keeps_the_plan_of_growth(tmp_path, steps):
    make_trainer(tmp_path).train()
    wanted = [(g["step"], g["granted"]) for g in grants_of(tmp_path)]
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = make_trainer(tmp_path, max_steps=steps)
    checkpoint = str(tmp_path / "checkpoint-4")
    if steps < 8:
        with pytest.raises(drlora.ConfigError, match="last growth event after step 7, and now"):
            resumed.train(resume_from_checkpoint=checkpoint)
        return
    with pytest.warns(UserWarning, match="planned for 8 steps and now has 10"):
        resumed.train(resume_from_checkpoint=checkpoint)
    got = [(g["step"], g["granted"]) for g in grants_of(tmp_path)]
    assert {step for step, _ in got} == {step for step, _ in wanted}
    assert sum(granted for _, granted in got) == sum(granted for _, granted in wanted)
