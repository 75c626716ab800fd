"""The data of a recipe, seen before training."""

from __future__ import annotations

import json

import datasets
import pytest
from tiny_run import save_all

from drlora.errors import DataError
from drlora.runs.look import look_at_data
from drlora.runs.recipe import load_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_data_of_a_recipe(tmp_path):
    recipe = save_all(tmp_path)
    path = tmp_path / "train.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows, rows[0], rows[1]]) + "\n")
    report = look_at_data(load_recipe(recipe), samples=2)
    train = report.roles["train"]
    assert train.source == str(path)
    assert train.said == f"read as prompt and completion: {len(rows) + 2}"
    assert (train.examples, train.used, train.dropped) == (len(rows) + 2, len(rows) + 2, 0)
    assert train.duplicates == 2
    first = json.loads(rows[0])
    sizes = [len(r["prompt"]) + len(r["completion"]) + 1 for r in map(json.loads, rows)]
    assert train.lengths[0] == min(sizes) and train.lengths[3] == max(sizes)
    assert train.share == pytest.approx((len(first["completion"]) + 1) / sizes[0], abs=0.05)
    for sample in train.samples:
        (asked, is_asked), (said, is_said) = sample.parts
        assert not is_asked and is_said and said.endswith("</s>")
        pair = {"prompt": asked, "completion": said.removesuffix("</s>")}
        assert any(pair == {k: json.loads(row)[k] for k in pair} for row in rows)
        assert sample.targets == len(said) - 3
    assert len(train.samples) == 2
    held_out = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert report.shared == sum(row in rows for row in held_out)


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    recipe = save_all(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="has the columns 'prompt'"):
        look_at_data(load_recipe(recipe))
