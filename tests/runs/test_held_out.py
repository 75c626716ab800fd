"""Held-out examples: apart from the training data, drawn, and named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import yaml
from byte_tokens import byte_tokenizer
from tiny_run import save_all, save_examples, save_model_folder

import drlora
from drlora.cli.main import main
from drlora.data import encode_examples, load_examples
from drlora.data.files import load_placed
from drlora.data.slices import rows_of
from drlora.evaluation.draw import drawn
from drlora.evaluation.measure import EvaluationSection
from drlora.ranks.rank_map import read_rank_map
from drlora.runs.data_section import DataSection
from drlora.runs.held_out import evaluation_notes
from drlora.runs.roles import load_source, load_training_data
from drlora.runs.run_record import held_out_record

STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
)
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BAD = {"messages": [{"role": "system", "content": "s"}, *GOOD["messages"]]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path) -> str:
    return str(save_examples(tmp_path / "data.jsonl", count=40))


def link(data: str) -> str:
    other = Path(data).with_name("link.jsonl")
    other.symlink_to(data)
    return str(other)


@pytest.mark.parametrize(
    ("splits", "shared"),
    [
        (dict(train="train[:90%]"), 36),
        (dict(train="train[:50%]", eval="train[40%:]"), 4),
        (dict(train="train[:10]", eval="train[-31:]"), 1),
        (dict(train="train[:4]+train[10:12]", eval="train[11:13]"), 1),
        (dict(train="train[:4]", eval="train[4:8]", test="train[7:9]"), 1),
        (dict(train="train[:4]", eval="train[4:8]", test="train[:1]"), 1),
    ],
)
def test_splits_that_overlap_are_refused(data, splits, shared):
    with pytest.raises(drlora.DataError, match=rf"share {shared} example.*data.jsonl, the first"):
        load_training_data(DataSection(train=data, splits=splits))


@pytest.mark.parametrize("name", [str, link, lambda data: data.replace("/data", "/./data")])
def test_one_file_under_two_names_is_one(data, name):
    with pytest.raises(drlora.DataError, match="share 40 examples"):
        load_training_data(
            DataSection(train=data, eval=f"{name(data)}", splits={"eval": "train[:]"})
        )


def test_splits_that_touch_are_fine(data):
    for splits in (
        dict(train="train[:90%]", eval="train[90%:]"),
        dict(train="train[:10]", eval="train[20:]", test="train[10:20]"),
        dict(train="train[:10]", eval="train[20:]", test="train[20:]"),
    ):
        train, held_out = load_training_data(DataSection(train=data, splits=splits))
        assert not set(train.rows["line"]) & set(held_out.rows["line"])
    # What limits leave apart is apart.
    load_training_data(DataSection(train=data, splits={"eval": "train[20:]"}, limits={"train": 20}))


def test_a_copy_of_the_training_data_is_told(tmp_path, capsys):
    """Whatever file it is in, and however it is written there."""
    recipe = save_all(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    mixed = [
        {"id": 1, **rows[3]},
        {**rows[5], "id": 2},
        {"prompt": "zz", "completion": "z", "id": 3},
    ]
    (tmp_path / "copy.json").write_text(json.dumps(mixed, indent=1))
    words = [str(recipe), f"data.eval={tmp_path / 'copy.json'}", "--dry-run"]
    assert main(["train", *words]) == 0
    assert (
        "2 of the 3 held-out examples can be found in the training data" in capsys.readouterr().out
    )
    (tmp_path / "copy.json").write_text(json.dumps(mixed[2:]))
    assert main(["train", *words]) == 0
    assert "word for word" not in capsys.readouterr().out


def test_the_splits_of_a_hub_data_set_are_told_apart(monkeypatch):
    whole = datasets.Dataset.from_list([{"text": str(i)} for i in range(20)])
    sizes = datasets.splits.SplitDict()
    sizes.add(datasets.splits.SplitInfo("train", num_examples=20))

    def load_dataset(source, config, split):
        ((_, rows),) = rows_of(split, {"train": 20})
        found = whole.select(rows)
        found.info.splits = sizes
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = dict(train="train[:50%]", eval="train[9:]")
    with pytest.raises(drlora.DataError, match="share 1 example .*the first in row 10"):
        load_training_data(DataSection(train="some/data", splits=splits))
    load_training_data(DataSection(train="some/data", splits=dict(splits, eval="train[10:]")))


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("train[:200%", "cannot be read"),
        ("train[40:50]", "'train\\[40:50\\]'"),
        ("train[x:]", "read"),
    ],
)
def test_a_split_that_cannot_be_is_refused(data, split, said):
    with pytest.raises(drlora.DataError, match=said):
        load_examples(data, split=split)


def test_held_out_examples_are_drawn_and_the_draw_is_kept(data):
    section = DataSection(train="embedded:kinds", eval=data, limits={"eval": 20})
    _, held_out = load_training_data(section)
    again = load_source(section, *section.source("eval"), 20)
    assert held_out.rows["line"] == again.rows["line"] == [row + 1 for row in drawn(40, 20)]
    assert held_out.rows["line"] != list(range(1, 21)) and len(set(held_out.rows["line"])) == 20
    assert load_source(section, "embedded:kinds", "train", 5).rows["line"] == [1, 2, 3, 4, 5]
    encoded = encode_examples(held_out, byte_tokenizer(), 20)
    evaluation = EvaluationSection(loss_examples=8, exact_match_examples=5)
    record = held_out_record(encoded, evaluation)
    lines = [held_out.rows["line"][row] for row in drawn(20, 5)]
    assert record["exact_match"] == {"examples": 5, "of": 20, "draw": "random", "line": lines}
    assert record["loss"]["example"] == [row + 1 for row in drawn(20, 8)]
    assert drawn(40, 5, "front") == [0, 1, 2, 3, 4] and drawn(3, 5) == [0, 1, 2]
    assert drawn(10_000, 2000) == sorted(set(drawn(10_000, 2000)))
    assert 4500 < sum(drawn(10_000, 2000)) / 2000 < 5500, "spread over all"


def test_what_is_asked_for_and_not_there_is_said(data):
    raw = load_placed(data)
    examples = encode_examples(raw, byte_tokenizer(), 20)
    (note,) = evaluation_notes(examples, EvaluationSection(loss_examples=200))
    assert note == "evaluation.loss_examples=200, but there are 40"
    assert not evaluation_notes(examples, EvaluationSection())
    solved = datasets.Dataset.from_list([{"prompt": "a", "completion": "b\nc"}])
    examples = encode_examples(solved, byte_tokenizer(), 20)
    (note,) = evaluation_notes(examples, EvaluationSection())
    assert note == "no exact match: completions have several lines"


def conversations(folder: Path, name: str) -> str:
    """61 conversations, of which the template refuses the last; blank lines do not count as any."""
    rows = [*[GOOD] * 60, BAD]
    path = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif name.startswith("list"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "split", "place"),
    [
        ("lines.jsonl", "train", "line 63"),
        ("lines.json", "train", "line 63"),
        ("list.json", "train[50:]", "item 61"),
        ("rows.parquet", "train[-2:]", "row 61"),
    ],
)
def test_an_error_about_an_example_names_its_file_and_line(tmp_path, name, split, place):
    path = conversations(tmp_path, name)
    with pytest.raises(drlora.DataError, match=f"{name}, {place}: .*no system turn"):
        encode_examples(load_source(None, path, split, None), byte_tokenizer(STRICT), 50)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json"])
def test_a_byte_order_mark_is_read(tmp_path, name):
    rows = [{"prompt": "a b", "completion": "b c", "id": 1}, {"prompt": "b", "completion": "c"}]
    text = json.dumps(rows) if name == "list.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = load_examples(str(tmp_path / name))
    assert found.to_list() == [{k: r[k] for k in ("prompt", "completion")} for r in rows]


def test_a_byte_order_mark_before_settings_and_ranks(tmp_path):
    recipe = save_all(tmp_path)
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert drlora.runs.recipe.load_recipe(recipe).training["max_steps"] == 12
    ranks = tmp_path / "ranks.json"
    ranks.write_bytes(b"\xef\xbb\xbf" + b'{"a": {"down": [1]}}')
    assert read_rank_map(ranks) == {"a": {"down": [1]}}


def test_memory_of_a_dry_run_is_that_of_its_batches(tmp_path, capsys):
    recipe = save_all(tmp_path, model=str(save_model_folder(tmp_path / "one", num_hidden_layers=1)))
    found = {}
    for batch in (1, 4):
        words = ["--dry-run", "--json", f"training.per_device_train_batch_size={batch}"]
        assert main(["train", str(recipe), *words]) == 0
        found[batch] = json.loads(capsys.readouterr().out)["model"]["memory_gb"]
    assert found[1]["tokens"] == 9 and found[4]["tokens"] == 36  # `<s>abc: cba</s>`, no <s> here
    # What experts work in is there once, whatever the batch.
    assert 2 < found[4]["activations"] / found[1]["activations"] <= 4
    assert main(["train", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 MoE block\n" in said and "36 tokens" in said


def test_paths_in_a_recipe_are_the_working_directorys(tmp_path, monkeypatch):
    recipe = save_all(tmp_path / "here")
    tree = yaml.safe_load(recipe.read_text().replace(f"{tmp_path / 'here'}/", ""))
    monkeypatch.chdir(tmp_path / "here")
    found = drlora.runs.recipe.recipe_from(tree)
    assert found.model == "model" and found.data.train == "train.jsonl"
    kept = found.resolved()
    assert kept.model == str(tmp_path / "here/model")
    assert kept.data.train == str(tmp_path / "here/train.jsonl")
    assert kept.output_dir == str(tmp_path / "here/run") and kept.resolved() == kept
    names = drlora.runs.recipe.recipe_from(
        {**tree, "model": "some/model", "data": {"train": "a/b"}}
    )
    assert names.resolved().model == "some/model" and names.resolved().data.train == "a/b"
