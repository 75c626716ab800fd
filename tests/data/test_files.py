"""Files as people have them: every kind gives the same examples, and each knows its place."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokens import byte_tokenizer

from drlora.data import encode_examples, load_examples
from drlora.data.files import load_placed
from drlora.errors import DataError
from drlora.runs.data_section import DataSection
from drlora.runs.recipe import recipe_from
from drlora.runs.roles import load_training_data

PAIRS = [{"prompt": f"p{i}", "completion": f" c{i}"} for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(path: Path, rows=PAIRS) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def table(path: Path, rows=PAIRS, **options) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_every_kind_of_file_gives_the_same(tmp_path):
    saved = datasets.Dataset.from_list(PAIRS)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "dict"))
    found = [
        load_examples(lines(tmp_path / "a.jsonl")),
        load_examples(lines(tmp_path / "a.jsonl.gz")),
        load_examples(table(tmp_path / "a.csv")),
        load_examples(table(tmp_path / "a.tsv", delimiter="\t")),
        load_examples(str(tmp_path / "saved")),
        load_examples(str(tmp_path / "dict"), split="test"),
    ]
    assert [rows.to_list() for rows in found] == [PAIRS] * len(found)


def test_a_table_is_text(tmp_path):
    """What looks like a number, a date or nothing stays what is written."""
    rows = [{"prompt": "1", "completion": "007"}, {"prompt": "NA", "completion": 'a "b"\n,c'}]
    assert load_examples(table(tmp_path / "a.csv", rows)).to_list() == rows


def test_lines_of_text(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    found = load_placed(str(tmp_path / "a.txt"))
    assert found.rows.to_list() == [{"text": "one", "line": 1}, {"text": "two", "line": 2}]
    assert found.said == "read as text: 2"
    (tmp_path / "a.txt").write_text("one\n\n \ntwo\n")
    found = load_placed(str(tmp_path / "a.txt"))
    assert found.rows.to_list() == [{"text": "one", "line": 1}, {"text": "two", "line": 4}]
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'a.txt'}: 2 blank lines skipped"
    ]
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="a.txt is empty"):
        load_placed(str(tmp_path / "a.txt"))


def test_a_list_under_a_key(tmp_path):
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps({"version": 1, "data": PAIRS}, indent=indent))
        found = load_placed(str(path))
        assert found.rows["item"][:] == [1, 2, 3, 4, 5, 6]
        assert load_examples(str(path)).to_list() == PAIRS
    # What is an example by itself is none, and neither are lines.
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": said}))
    assert load_examples(str(path))["messages"][:] == [said]
    path.write_text(json.dumps({"talk": said}))
    assert load_examples(str(path), columns={"messages": "talk"})["messages"][:] == [said]
    path.write_text("".join(json.dumps({"text": "t", "more": PAIRS}) + "\n" for _ in range(2)))
    assert load_placed(str(path)).rows["line"][:] == [1, 2]
    path.write_text(json.dumps({"data": [PAIRS[0], {**PAIRS[1], "completion": " "}]}))
    with pytest.raises(DataError, match="a.json, item 2: 'completion' must be a string that is"):
        load_placed(str(path))
    path.write_text(json.dumps({"one": PAIRS, "other": PAIRS}))
    with pytest.raises(DataError, match="has the columns 'one', 'other'"):
        load_placed(str(path))


def test_a_packed_file_that_is_none_is_refused(tmp_path):
    for name in ("a.jsonl.gz", "a.json.xz", "a.csv.bz2", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(DataError, match=f"{name}.*not really a"):
            load_placed(str(tmp_path / name))


def test_zstandard_is_read_where_it_is_installed(tmp_path):
    text = "\n" + "".join(json.dumps(row) + "\n" for row in PAIRS)
    path = tmp_path / "a.jsonl.zst"
    if importlib.util.find_spec("zstandard") is None:
        path.write_bytes(b"")
        with pytest.raises(DataError, match="a.jsonl.zst: pip install zstandard to read it"):
            load_placed(str(path))
        return
    import zstandard

    path.write_bytes(zstandard.compress(text.encode()))
    found = load_placed(str(path))
    assert found.rows["line"][:] == [2, 3, 4, 5, 6, 7]
    assert load_examples(str(path)).to_list() == PAIRS
    path.write_bytes(b"no such thing")
    with pytest.raises(DataError, match="a.jsonl.zst"):
        load_placed(str(path))
    (tmp_path / "a.csv.zst").write_bytes(zstandard.compress(b"prompt,completion\np,007\n"))
    found = load_examples(str(tmp_path / "a.csv.zst"))
    assert found.to_list() == [{"prompt": "p", "completion": "007"}]


def test_a_folder_is_told_apart_as_a_hub_data_set_is(tmp_path):
    lines(tmp_path / "d/train-0.jsonl", PAIRS[:2])
    lines(tmp_path / "d/train-1.jsonl", PAIRS[2:4])
    lines(tmp_path / "d/validation.jsonl", PAIRS[4:])
    (tmp_path / "d/README.md").write_text("what it is")
    section = DataSection(train=str(tmp_path / "d"))
    train, held_out = load_training_data(section)
    assert train.rows.select_columns(["prompt", "completion"]).to_list() == PAIRS[:4]
    assert [Path(name).name for name in train.rows["file"]] == ["train-0.jsonl"] * 2 + [
        "train-1.jsonl"
    ] * 2
    assert train.rows["row"][:] == [1, 2, 1, 2] and held_out.rows["prompt"][:] == ["p4", "p5"]
    with pytest.raises(DataError, match="no 'test' among its files; there are train, validation"):
        load_placed(str(tmp_path / "d"), split="test")


def test_a_pattern_and_a_list(tmp_path):
    lines(tmp_path / "a.jsonl", PAIRS[:2])
    lines(tmp_path / "b.jsonl", PAIRS[2:])
    table(tmp_path / "c.csv", PAIRS[:1])
    assert load_examples(str(tmp_path / "*.jsonl")).to_list() == PAIRS
    both = [str(tmp_path / "b.jsonl"), str(tmp_path / "c.csv")]
    assert load_examples(both).to_list() == [*PAIRS[2:], PAIRS[0]]
    with pytest.raises(DataError, match="no file has such a name"):
        load_examples(str(tmp_path / "*.parquet"))
    other = lines(tmp_path / "other.jsonl", [{"text": "t"}])
    with pytest.raises(DataError, match="cannot be joined|read as"):
        load_examples([both[0], other])


def test_of_several_files_a_refusal_names_the_one(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    one = lines(tmp_path / "one.jsonl", [{"messages": said}] * 2)
    other = lines(tmp_path / "other.jsonl", [{"messages": said}, {"messages": [said[0], *said]}])
    tokenizer = byte_tokenizer(
        "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(DataError, match=f"^{other}, row 2: .*too long"):
        encode_examples(load_placed([one, other]), tokenizer, 99)


def test_a_mix_follows_its_weights(tmp_path):
    one = lines(tmp_path / "one.jsonl", [{"text": f"one {i}"} for i in range(900)])
    two = lines(tmp_path / "two.jsonl", [{"text": f"two {i}"} for i in range(900)])
    mix = [{"path": one, "weight": 3}, {"path": two, "weight": 1}]
    loaded = load_placed(mix)
    found = loaded.rows
    share = sum(text.startswith("one") for text in found["text"]) / len(found)
    assert 0.7 < share < 0.8 and 1100 < len(found) < 1300
    assert len(set(found["text"])) == len(found), "none twice"
    assert found.to_list() == load_placed(mix).rows.to_list(), "always the same"
    assert f"; {len(found):,} of 1,800 by weight" in loaded.said
    for wrong in ([{"path": one, "weight": 1}, two], [{"path": one, "weight": 0}], []):
        with pytest.raises(DataError, match="give a weight above 0 to every source, or to none"):
            load_placed(wrong)
    with pytest.raises(DataError, match="is no path and no"):
        load_placed([{"file": one}])


def test_types_are_those_of_a_whole_large_file(tmp_path):
    """`datasets` takes those of the first 10 MB, where no call, no text id and no `more` is."""
    asked = {"role": "user", "content": "q" * 1500}
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": "a"}], "id": n} for n in range(7000)
    ]
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows.append({"messages": [asked, called], "id": "last", "more": 1})
    found = load_placed(lines(tmp_path / "a.jsonl", rows)).rows
    assert found[-1]["messages"][1]["tool_calls"] == [call] and found[-1]["line"] == 7001
    assert found[0]["messages"] == rows[0]["messages"]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows[-3:]}))  # of any size under a key
    under_key = load_placed(str(tmp_path / "a.json")).rows
    assert under_key["messages"][:] == found["messages"][-3:]
    assert under_key["item"][:] == [1, 2, 3]


def test_conversations_of_several_files_are_joined_whatever_keys_their_turns_have(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    called = [said[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    parts = [[{"messages": said}], [{"messages": called}], [{"conversations": shared}]]
    paths = [lines(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate(parts)]
    for order in (paths, paths[::-1]):
        assert sorted(map(str, load_examples(order)["messages"])) == sorted(
            map(str, [said, called, said])
        )
    tools = [[{"name": "f"}], json.dumps([{"name": "g"}])]
    paths = [
        lines(tmp_path / f"tools-{n}.jsonl", [{"messages": said, "tools": some}])
        for n, some in enumerate(tools)
    ]
    assert load_examples(paths)["tools"][:] == [[{"name": "f"}], [{"name": "g"}]]
    schema = pa.schema([(name, pa.large_string()) for name in PAIRS[0]])
    pq.write_table(pa.Table.from_pylist(PAIRS[:1], schema), tmp_path / "a.parquet")
    both = [str(tmp_path / "a.parquet"), lines(tmp_path / "b.jsonl", PAIRS[1:])]
    assert load_examples(both).to_list() == PAIRS


def test_what_pandas_and_editors_put_into_files(tmp_path, caplog):
    """A column of row numbers without a name, and a mark before the first letter."""
    rows = [{"": n, **pair} for n, pair in enumerate(PAIRS)]
    assert load_examples(table(tmp_path / "a.csv", rows)).to_list() == PAIRS
    assert "columns not used: Unnamed: 0" in caplog.text
    (tmp_path / "a.txt").write_text("one\ntwo\n", "utf-8-sig")
    assert load_examples(str(tmp_path / "a.txt"))["text"][:] == ["one", "two"]


def test_a_column_may_be_called_as_a_place_is(tmp_path, caplog):
    rows = [{"item": "p", "completion": " c", "line": 7}]
    found = load_placed(lines(tmp_path / "a.jsonl", rows), columns={"prompt": "item"}).rows
    assert found.to_list() == [{"prompt": "p", "completion": " c", "line": 1}]
    assert "columns not used: line of the data" in caplog.text


def test_verdicts_of_a_table(tmp_path):
    rows = [{**PAIRS[n], "label": text} for n, text in enumerate(["true", "False", "1", "0"])]
    found = load_examples(table(tmp_path / "a.csv", rows))
    assert found["label"][:] == [True, False, True, False]
    numbers = [{**PAIRS[0], "label": 1.0}, {**PAIRS[1], "label": 0}]
    assert load_examples(lines(tmp_path / "a.jsonl", numbers))["label"][:] == [True, False]
    rows[3]["label"] = "maybe"
    with pytest.raises(DataError, match="a.csv, row 4: 'label' must be true or false.*'maybe'"):
        load_examples(table(tmp_path / "a.csv", rows))


@pytest.mark.parametrize("weight", ["0.7", float("nan"), float("inf"), True, -1])
def test_a_weight_that_is_none_is_refused(tmp_path, weight):
    one = lines(tmp_path / "one.jsonl")
    with pytest.raises(DataError, match="give a weight above 0 to every source"):
        load_examples([{"path": one, "weight": weight}, {"path": one, "weight": 1}])
    with pytest.raises(DataError, match="path: 5 in a list of data must be a text"):
        load_examples([{"path": 5}])


def test_a_list_in_a_recipe(tmp_path, monkeypatch):
    lines(tmp_path / "a.jsonl", PAIRS[:2])
    lines(tmp_path / "b.jsonl", PAIRS[2:])
    monkeypatch.chdir(tmp_path)
    data = {"train": ["a.jsonl", {"path": "b.jsonl"}], "eval": "a.jsonl"}
    recipe = recipe_from({"model": "embedded", "output_dir": "run", "data": data})
    kept = recipe.resolved().data
    assert kept.train == [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl")}]
    with pytest.raises(DataError, match="share 2 examples of .*a.jsonl, the first in row 1"):
        load_training_data(kept)
    data = {"train": ["b.jsonl"], "eval": "a.jsonl"}
    recipe = recipe_from({"model": "embedded", "output_dir": "run", "data": data})
    train, held_out = load_training_data(recipe.data)
    assert (len(train.rows), len(held_out.rows)) == (4, 2)
