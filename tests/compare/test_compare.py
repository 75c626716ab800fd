"""`drlora compare`: every run of a plan once, whatever stops it, and a page of what came out."""

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml
from tiny_run import save_all, save_examples
from trl.trainer import sft_trainer

import drlora
import drlora.compare.cells as cells_module
import drlora.runs.train as train_module
from drlora.cli.main import main
from drlora.compare.cells import compare_cells, key_of, places, tune_cells
from drlora.compare.gains import best_baselines, gains_by_task, relative
from drlora.compare.packed import pack, read_packed, read_places
from drlora.compare.plan import Tune, load_plan, plan_from
from drlora.compare.results import Folder, read_matrix, write_result
from drlora.compare.run import _locked
from drlora.errors import CheckpointError
from drlora.runs.recipe import recipe_from

GRID = [0.01, 0.03]
SPLITS = {"train": "train[:1]", "eval": "train[1:]"}


def save_plan(folder: Path, **changes) -> Path:
    """Two methods and two seeds on the tiny model and data; 4 compared runs of 6 steps."""
    recipe = yaml.safe_load(save_all(folder).read_text())
    save_examples(folder / "test.jsonl", count=36, start=30)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    recipe["training"] |= {"max_steps": 6, "save_steps": 2, **evaluated}
    recipe["adapter"] |= {"p_grow": 1.0}
    recipe["evaluation"] |= {"before": False}
    data = {**recipe["data"], "test": str(folder / "test.jsonl")}
    plan = {
        "output_dir": str(folder / "results"),
        "models": {"tiny": recipe["model"]},
        "tasks": {"backwards": {"data": data}},
        "methods": {"lora": {"method": "lora"}, "drlora": {}},
        "seeds": [1, 2],
        "baselines": ["lora"],
        "metrics": ["loss", "exact_match"],
        "base": {key: recipe[key] for key in ("adapter", "training", "evaluation")},
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan), "utf-8")
    return path


def tuned(**changes) -> dict:
    return {"grid": {"training.learning_rate": GRID}, "seeds": [7], **changes}


def results(folder: Path) -> dict[str, dict]:
    """Key -> result of all finished cells, packed or not."""
    single = (folder / "results" / "runs" / "cells").glob("*.json")
    found = [json.loads(path.read_text()) for path in sorted(single)]
    return {**read_packed(folder / "results"), **{result["key"]: result for result in found}}


def times(folder: Path) -> dict[str, float]:
    """How long each finished cell took, which is another number when it is run again."""
    return {key: result["wall_seconds"] for key, result in results(folder).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a plan that was run with tuning; tests that change it put it back."""
    folder = tmp_path_factory.mktemp("compare")
    loss_only = {"evaluation": {"exact_match": False}}
    plan = save_plan(folder, tune=tuned(settings=loss_only))
    assert main(["compare", str(plan), "--jobs", "2"]) == 0
    return folder


def test_each_run_leaves_one_result_with_what_it_was_made_of(finished):
    found = results(finished)
    stages = [result["stage"] for result in found.values()]
    assert (stages.count("tune"), stages.count("compare")) == (4, 4)
    assert {r["method"] for r in found.values()} == {"lora", "drlora"}
    assert {(r["model"], r["task"]) for r in found.values()} == {("tiny", "backwards")}
    for key, result in found.items():
        assert result["key"] == key
        assert set(result["source"]) == {"commit", "dirty"}
        assert set(result["contents"]) == {"model", "tokenizer", "data"}
        assert result["seed"] in ([7] if result["stage"] == "tune" else [1, 2])
        assert result["trainable_parameters"] == result["stored_parameters"] > 0
        assert result["recipe"]["training"]["max_steps"] == result["steps"] == 6
        assert result["peak_memory_bytes"] > 50 * 2**20
        assert result["wall_seconds"] > result["seconds"] > 0
        assert [step for step, _ in result["curve"]] == [1, 2, 3, 4, 5, 6]
        held_out = dict(result["held_out_curve"])
        assert list(held_out) == [2, 4, 6]
        assert held_out[6] == pytest.approx(result["after"]["loss"]["loss"], rel=1e-3)
        after, items = result["after"], result["items"]
        assert result["before"] is None
        nats = sum(items["loss_centinats"]) / 100
        assert nats == pytest.approx(
            after["loss"]["loss"] * after["loss"]["target_tokens"], abs=0.1
        )
        if result["stage"] == "tune":  # as its settings say
            assert after["match"] is None and items["is_correct"] == ""
        else:
            assert "samples" not in after["match"]
            assert len(items["is_correct"]) == after["match"]["total"]
            assert items["is_correct"].count("1") == after["match"]["correct"]
        assert {"drlora", "torch", "python"} <= result["versions"].keys()
        assert {"processor", "vectors", "cores"} <= result["machine"].keys()
        ranks = [r for block in result["ranks"].values() for row in block.values() for r in row]
        assert sum(ranks) == 3 * len(ranks)
        assert (set(ranks) == {3}) == (result["method"] == "lora")
    left = [p.relative_to(finished / "results") for p in (finished / "results").rglob("*.json")]
    assert not left, "finished cells are packed"


def test_methods_are_compared_at_the_best_of_their_grid(finished):
    found = list(results(finished).values())
    for method in ("lora", "drlora"):
        own = [result for result in found if result["method"] == method]
        tried = {
            result["tuned"]["training.learning_rate"]: result["after"]["loss"]["loss"]
            for result in own
            if result["stage"] == "tune"
        }
        assert sorted(tried) == GRID
        best = min(tried, key=tried.__getitem__)
        for result in own:
            if result["stage"] == "compare":
                assert result["recipe"]["training"]["learning_rate"] == best
                assert result["after"]["loss"]["target_tokens"] == 6 * 5
            held_out = Path(result["recipe"]["data"]["eval"]).name
            assert held_out == ("test.jsonl" if result["stage"] == "compare" else "eval.jsonl")


def test_a_finished_plan_runs_nothing_again(finished, capsys):
    before, page = times(finished), (finished / "results" / "README.md").read_bytes()
    figures = (finished / "results" / "figures.svg").read_bytes()
    assert main(["compare", str(finished / "plan.yaml")]) == 0
    assert "8 of 8 cells done" in capsys.readouterr().out
    assert times(finished) == before
    assert (finished / "results" / "README.md").read_bytes() == page
    assert figures == (finished / "results" / "figures.svg").read_bytes()


def test_from_python_it_says_how_it_stands_and_prints_nothing(finished, capsys):
    told = []
    plan = finished / "plan.yaml"
    found = drlora.run_comparison(plan, progress=told.append)
    assert found.done == found.total == len(found.matrix.cells) and found.failed == 0
    assert told == [f"{found}; {found.pool.jobs} at once, {found.pool.threads} threads each"]
    assert str(found) == f"{found.total} of {found.total} cells done, 0 failed"
    assert found.page.is_file() and found.estimate() == "nothing is left to run"
    more = drlora.run_comparison(plan, ["seeds=[1, 2, 3]"], dry_run=True)
    assert more.page is None and more.done < more.total
    assert capsys.readouterr().out == ""
    assert main(["compare", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))


def test_the_page_has_every_value_and_figure(finished):
    text = (finished / "results" / "README.md").read_text()
    compared = [r for r in results(finished).values() if r["stage"] == "compare"]
    losses = [r["after"]["loss"]["loss"] for r in compared if r["method"] == "drlora"]
    assert len(losses) == 2
    assert f"| drlora | {compared[0]['trainable_parameters']:,} | {sum(losses) / 2:.4f} ±" in text
    assert text.count("items ±") == 2  # loss and exact match
    assert "4 of 4 compared runs" in text and "No run failed" in text
    assert "Gain over `lora`" in text and "seeds 1, 2" in text
    for part in text.split("](")[1:]:
        assert (finished / "results" / part.partition(")")[0]).stat().st_size > 1000


def test_a_changed_setting_makes_new_cells_only_where_it_matters(finished, capsys):
    plan = str(finished / "plan.yaml")
    assert main(["compare", plan, "--dry-run"]) == 0
    assert "nothing is left to run" in capsys.readouterr().out
    # A setting that only one method has.
    assert main(["compare", plan, "methods={lora: {method: lora}, drlora: {method: drlora, "
                 "adapter.gamma: 0.5}}", "--dry-run"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "4 cells to run" in said and "4 of 8 cells done" in said and "2 wait" in said
    # What does not change a result, and another name for the same method.
    assert main(["compare", plan, "base.training.logging_steps=2", "base.training.save_steps=3",
                 "methods={plain: {method: lora}, drlora: {}}",
                 "baselines=[plain]", "--dry-run"]) == 0  # fmt: skip
    assert "nothing is left to run" in capsys.readouterr().out
    # One more seed.
    assert main(["compare", plan, "seeds=[1, 2, 3]", "--dry-run"]) == 0
    assert "2 cells to run" in capsys.readouterr().out
    # Other data in the same file.
    text = (finished / "test.jsonl").read_text()
    try:
        (finished / "test.jsonl").write_text(text + text.splitlines()[0] + "\n")
        assert main(["compare", plan, "--dry-run"]) == 0
        assert "4 cells to run" in capsys.readouterr().out
    finally:
        (finished / "test.jsonl").write_text(text)


@pytest.mark.parametrize("kind", ["folder", "pattern", "saved", "template"])
def test_a_run_is_known_by_the_contents_of_all_that_it_names(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    template, changes = tmp_path / "t.jinja", {}

    def write(text):
        template.write_text(text if kind == "template" else "t")
        text = "x" if kind == "template" else text
        rows = [{"prompt": text, "completion": "b"}] * 2
        if kind == "saved":
            datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "part.jsonl").write_text(lines)

    source = str(folder / "*.jsonl") if kind == "pattern" else str(folder)
    if kind == "template":
        changes = {"chat_template": str(template)}
    tree = {"model": "embedded", "output_dir": "-", "data": {"train": source, "splits": SPLITS}}
    recipe = recipe_from({**tree, **changes})
    write("a")
    one = key_of(recipe)
    assert key_of(recipe) == one
    write("other")
    assert key_of(recipe) != one


def test_a_place_finds_its_result_when_settings_have_other_names(finished, capsys, monkeypatch):
    """A key is made of names of settings; the page of a plan must outlive these."""
    page = (finished / "results" / "README.md").read_bytes()
    monkeypatch.setattr(cells_module, "key_of", lambda recipe: f"{id(recipe):012x}")
    assert main(["compare", str(finished / "plan.yaml"), "--only-page"]) == 0
    assert "8 of 8 cells done" in capsys.readouterr().out
    assert (finished / "results" / "README.md").read_bytes() == page


@pytest.mark.parametrize("is_other", [False, True])
def test_results_stay_known_where_their_data_are_not_at_hand(finished, capsys, is_other):
    """As those of a task whose data may not be committed; other data are other runs still."""
    held_out = finished / "test.jsonl"
    text = held_out.read_text()
    try:
        held_out.unlink()
        if is_other:
            train = finished / "train.jsonl"
            kept = train.read_text()
            train.write_text(kept + kept.splitlines()[0] + "\n")
        assert main(["compare", str(finished / "plan.yaml"), "--dry-run"]) == 0
        assert ("nothing is left to run" in capsys.readouterr().out) == (not is_other)
    finally:
        held_out.write_text(text)
        if is_other:
            train.write_text(kept)


def test_packing_again_changes_no_byte_and_a_kill_loses_nothing(finished, tmp_path):
    names = ("cells.jsonl.gz", "items.jsonl.gz")
    kept = {name: (finished / "results" / name).read_bytes() for name in names}
    known = read_packed(finished / "results")
    for number, one in enumerate(known.values()):  # another order of arrival
        write_result(tmp_path / "single" / f"{9 - number}-{one['key']}.json", one)
    placed = read_places(finished / "results")
    for keep in (3, 8):  # killed after three had come in
        for path in sorted((tmp_path / "single").iterdir())[keep:]:
            path.rename(tmp_path / path.name)
        pack(tmp_path / "again", tmp_path / "single", placed)
        for path in tmp_path.glob("*.json"):
            path.rename(tmp_path / "single" / path.name)
    assert not list((tmp_path / "single").iterdir())
    assert {name: (tmp_path / "again" / name).read_bytes() for name in names} == kept
    (tmp_path / "again" / "items.jsonl.gz").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="again are damaged"):
        read_packed(tmp_path / "again")


def test_results_of_before_are_read_and_compressed_when_they_are_packed(finished, tmp_path):
    known, places = (read(finished / "results") for read in (read_packed, read_places))
    kept = (finished / "results" / "cells.jsonl.gz").read_bytes()
    (tmp_path / "cells.jsonl").write_bytes(gzip.decompress(kept))
    shutil.copy(finished / "results" / "items.jsonl.gz", tmp_path)
    assert read_packed(tmp_path) == known and read_places(tmp_path) == places
    pack(tmp_path, tmp_path / "single", {**places, "one more": "place"})
    assert not (tmp_path / "cells.jsonl").exists()
    assert read_packed(tmp_path) == known and "one more" in read_places(tmp_path)


def test_runs_of_another_plan_count_where_they_are_the_same(finished, tmp_path, capsys):
    tree = yaml.safe_load((finished / "plan.yaml").read_text())
    tree |= {"output_dir": str(tmp_path / "own"), "also": [str(finished / "results")]}
    tree["methods"] = {"renamed": {"method": "lora"}, "slow": {"adapter": {"gamma": 0.3}}}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tree | {"baselines": ["renamed"]}))
    assert main(["compare", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 of 8 cells done" in said and said.count("done    ") == 4
    assert not (tmp_path / "own").exists()
    path.write_text(yaml.safe_dump(tree | {"also": [str(tmp_path / "nowhere")]}))
    assert main(["compare", str(path), "--dry-run"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_failed_cell_is_recorded_and_the_rest_go_on(tmp_path, capsys):
    missing = {
        "data.train": str(tmp_path / "missing.jsonl"),
        "data.eval": str(tmp_path / "eval.jsonl"),
        "data.test": str(tmp_path / "test.jsonl"),
    }
    plan = save_plan(tmp_path, seeds=[1], methods=["lora"])
    tree = yaml.safe_load(plan.read_text())
    tree["tasks"]["nowhere"] = missing
    plan.write_text(yaml.safe_dump(tree))
    assert main(["compare", str(plan), "--jobs", "2"]) == 1
    assert [result["task"] for result in results(tmp_path).values()] == ["backwards"]
    (file,) = (tmp_path / "results" / "failed").iterdir()
    failure = json.loads(file.read_text())
    assert failure["task"] == "nowhere" and "no such file" in failure["error"]
    assert "missing.jsonl: no such file" in (tmp_path / "results" / "README.md").read_text()
    # It is not tried again by itself, but on request.
    before = times(tmp_path), file.stat().st_mtime_ns
    assert main(["compare", str(plan)]) == 1
    assert before == (times(tmp_path), file.stat().st_mtime_ns)
    assert main(["compare", str(plan), "--retry-failed"]) == 1
    assert before[0] == times(tmp_path) and before[1] < file.stat().st_mtime_ns
    # Once the data is there it is another cell.
    save_examples(tmp_path / "missing.jsonl", count=20)
    assert main(["compare", str(plan)]) == 0
    assert len(results(tmp_path)) == 2 and before[0].items() <= times(tmp_path).items()


def test_killed_and_started_again_it_repeats_nothing(tmp_path):
    plan = save_plan(tmp_path, seeds=[1, 2, 3])
    script = [sys.executable, "-m", "drlora", "compare", str(plan), "--jobs", "1"]
    process = subprocess.Popen(script, env=os.environ, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(times(tmp_path)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = times(tmp_path)
    assert 2 <= len(before) < 6
    assert main(["compare", str(plan), "--jobs", "2"]) == 0
    after = times(tmp_path)
    assert len(after) == 6 and before.items() <= after.items()


def test_methods_see_the_same_batches_in_the_same_order(tmp_path, monkeypatch):
    plan = load_plan(save_plan(tmp_path, methods=["lora", "static", "drlora"]))
    seen: list[list] = []

    class Watching(sft_trainer.DataCollatorForLanguageModeling):
        def __call__(self, features, return_tensors=None):
            batch = super().__call__(features, return_tensors)
            seen[-1].append(batch["input_ids"].tolist())
            return batch

    monkeypatch.setattr(sft_trainer, "DataCollatorForLanguageModeling", Watching)
    for cell in compare_cells(plan, dict.fromkeys(places(plan), {})):
        seen.append([])
        train_module.train(replace(cell.recipe, output_dir=str(tmp_path / cell.name)))
    # 6 optimizer steps; the ranks of `static` are placed by batches of its own.
    steps = [batches[-6:] for batches in seen]
    assert steps[0] == steps[1] == steps[2]
    assert steps[3] == steps[4] == steps[5] != steps[0]


def test_two_at_once_in_one_folder_are_refused(tmp_path, capsys):
    plan = save_plan(tmp_path)
    with _locked(Folder(tmp_path / "results")):
        assert main(["compare", str(plan)]) == 2
    assert "another drlora compare is running" in capsys.readouterr().err
    assert not results(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": [1]}, "did you mean seeds"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"seeds": None}, "seeds is missing"),
        ({"baselines": ["lorra"]}, "did you mean baselines.lora"),
        ({"metrics": ["los"]}, "did you mean metrics.loss"),
        ({"methods": ["lora", "lora"]}, "stands there twice"),
        ({"methods": {"lora": {"metod": "lora"}}}, "did you mean methods.lora.method"),
        ({"methods": {"lora": {"training.learning_rat": 1}}}, "training.learning_rate"),
        ({"base": {"adapter": {"gama": 1}}}, "did you mean adapter.gamma"),
        (
            {"methods": {"lora": {"method": "lora-plus", "adapter.options.b_lr_ratio": 4}}},
            "methods.lora: adapter.options.b_lr_ratio=4 is not used",
        ),
        (
            {
                "base": {"method": "lora-plus"},
                "methods": {"lora": {"adapter.options.b_lr_ratio": 4}},
            },
            "method='lora-plus' sets it to 16.0",
        ),
        ({"split": "train"}, "split='train' is not known"),
        (
            {"tasks": {"x": {"data": {"train": "a.jsonl", "eval": "b.jsonl"}}}},
            "name other data as data.test",
        ),
        ({"development": ["backwards"], "confirmation": ["backwards"]}, "each task once"),
        ({"tune": tuned(seeds=[1])}, "share [1]"),
        ({"tune": tuned(split="test")}, "tune on another one"),
        ({"tune": tuned(grid={"training.learning_rate": 1e-3})}, "a list of values"),
        ({"tune": tuned(metrik="loss")}, "did you mean tune.metric"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused(tmp_path, changes, said, capsys):
    plan = save_plan(tmp_path, **changes)
    assert main(["compare", str(plan), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_plans_in_the_repository_can_be_read():
    for path in (Path(__file__).parents[2] / "experiments").glob("*.yaml"):
        plan = load_plan(path)
        if plan.tune:
            points = {place: plan.tune.points() for place in places(plan)}
            cells = tune_cells(plan, points)
            assert len({cell.key for cell in cells}) == len(cells)


def test_confirmation_tasks_may_have_seeds_of_their_own():
    plan = plan_from(
        {
            "name": "x",
            "output_dir": "x",
            "models": ["embedded"],
            "tasks": ["embedded:kinds", "embedded:definitions"],
            "methods": ["lora"],
            "seeds": [1, 2],
            "development": ["kinds"],
            "confirmation": ["definitions"],
            "confirmation_seeds": [3],
            "base": {"training.max_steps": 400},
        }
    )
    assert plan.groups() == {"Development tasks": ["kinds"], "Confirmation tasks": ["definitions"]}
    chosen = {("embedded", task, "lora"): {} for task in plan.tasks}
    cells = compare_cells(plan, chosen)
    assert sorted((c.task, c.seed) for c in cells) == [
        ("definitions", 3), ("kinds", 1), ("kinds", 2)
    ]  # fmt: skip
    assert {c.recipe.data.source("eval") for c in cells} == {
        ("embedded:kinds", "test"),
        ("embedded:definitions", "test"),
    }


def loss_result(cell, loss: float) -> dict:
    """What a run of the cell would leave, as far as tuning reads it."""
    return {
        "after": {"loss": {"loss": loss, "perplexity": 1.0, "target_tokens": 1}, "match": None},
        "items": {"loss_centinats": [1], "is_correct": ""},
        "recipe": cell.recipe.to_dict(),
    }


def walk(plan, folder: Folder, loss_at) -> tuple[list[float], object]:
    """The learning rates tried, in the order in which they come up, and the choice."""
    tried: list[float] = []
    while True:
        matrix = read_matrix(plan, folder)
        todo = [cell for cell in matrix.tune if cell.key not in matrix.results]
        if not todo:
            return tried, matrix.choices[matrix.tune[0].place]
        for cell in todo:
            rate = cell.tuned["training.learning_rate"]
            tried.append(rate)
            write_result(folder.cell_file(cell), loss_result(cell, loss_at(rate)))


@pytest.mark.parametrize(
    ("loss_at", "tried", "chosen", "at_edge"),
    [
        # Best between two that are worse.
        (lambda rate: abs(math.log2(rate / 0.02)), [0.02, 0.04, 0.01], 0.02, []),
        # Walks down until one is worse.
        (lambda rate: abs(math.log2(rate / 0.005)), [0.02, 0.04, 0.01, 0.005, 0.0025], 0.005, []),
        # Upwards, and a diverged run ends it.
        (lambda rate: 1 / rate if rate < 0.1 else math.nan, [0.02, 0.04, 0.08, 0.16], 0.08, []),
        # No further than allowed, and then marked.
        (lambda rate: rate, [0.02, 0.04, 0.01, 0.005, 0.0025], 0.0025, ["training.learning_rate"]),
        # If all diverge, there is no direction.
        (lambda _: math.nan, [0.02, 0.04], 0.02, ["training.learning_rate"]),
    ],
)
def test_a_grid_goes_on_past_the_end_at_which_the_best_lies(
    tmp_path, loss_at, tried, chosen, at_edge
):
    grid = {"training.learning_rate": [0.02, 0.04]}
    plan = load_plan(save_plan(tmp_path, methods=["lora"], tune=tuned(grid=grid, extend=3)))
    found, choice = walk(plan, Folder(tmp_path / "results"), loss_at)
    assert found == tried
    assert choice.settings == {"training.learning_rate": chosen}
    assert choice.at_edge == at_edge
    assert len(choice.means) == len(tried)


def test_lists_of_words_flags_and_whole_numbers_are_extended_only_where_it_makes_sense():
    tune = Tune({"r": [2, 4], "word": ["a", "b"]}, seeds=[7], extend=5)
    tried = tune.points()
    assert tune.beyond(tried, {"r": 4, "word": "a"}, "r") == [{"r": 8, "word": "a"}]
    assert tune.beyond(tried, {"r": 2, "word": "a"}, "r") == [{"r": 1, "word": "a"}]
    lower = [*tried, {"r": 1, "word": "a"}]
    assert tune.beyond(lower, {"r": 1, "word": "a"}, "r") == []  # 0.5 is no whole number
    assert (
        Tune({"x": [0.0, 1.0]}, [7], extend=5).beyond([{"x": 0.0}, {"x": 1.0}], {"x": 0.0}, "x")
        == []
    )


def test_the_best_baseline_is_chosen_for_each_task_and_gains_are_also_in_per_cent(tmp_path):
    losses = {
        ("one", "lora"): {1: 2.0, 2: 2.0},
        ("one", "static"): {1: 3.0, 2: 3.0},
        ("one", "drlora"): {1: 1.9, 2: 1.7},
        ("two", "lora"): {1: 9.0, 2: 9.0},
        ("two", "static"): {1: 8.0, 2: 8.0},
        ("two", "drlora"): {1: 8.8, 2: 8.8},
    }
    path = save_plan(tmp_path, methods=["lora", "static", "drlora"], baselines=["lora", "static"])
    tree = yaml.safe_load(path.read_text())
    (task,) = tree["tasks"].values()
    shorter = {"data": {**task["data"], "limits": {"train": 20}}}
    path.write_text(yaml.safe_dump(tree | {"tasks": {"one": task, "two": shorter}}))
    plan, folder = load_plan(path), Folder(tmp_path / "results")
    for cell in read_matrix(plan, folder).compare:
        loss = losses[cell.task, cell.method][cell.seed]
        write_result(folder.cell_file(cell), loss_result(cell, loss))
    matrix = read_matrix(plan, folder)
    best = best_baselines(matrix, "loss", "tiny", ["one", "two"])
    assert best == {"one": "lora", "two": "static"}
    gains = gains_by_task(matrix, "loss", "tiny", best, "drlora")
    assert gains["one"] == pytest.approx({1: 0.1, 2: 0.3})
    assert gains["two"] == pytest.approx({1: -0.8, 2: -0.8})
    shares = relative(matrix, "loss", "tiny", best, "drlora")
    assert shares["one"] == pytest.approx({1: 5.0, 2: 15.0})
    assert shares["two"] == pytest.approx({1: -10.0, 2: -10.0})
    # A baseline that lacks a seed is no best one, however good it was on the other.
    first = {seed: value for seed, value in losses["two", "static"].items() if seed == 1}
    for cell in matrix.compare:
        if (cell.task, cell.method) == ("two", "static") and cell.seed not in first:
            folder.cell_file(cell).unlink()
    assert best_baselines(read_matrix(plan, folder), "loss", "tiny", ["two"]) == {"two": "lora"}
