"""`drlora data`: what is shown is what would be trained.

Run: make test ARGS=tests/runs/test_look.py
"""

import json

import pytest
from tiny_run import save_all, save_examples

import drlora
from drlora.cli.main import main
from drlora.errors import ConfigError
from drlora.runs.look import tokens_of
from drlora.runs.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path):
    """Three-letter words and the same backwards; one is there twice, one is too long."""
    path = save_all(tmp_path, data={"max_length": 12})
    lines = save_examples(tmp_path / "train.jsonl").read_text().splitlines()
    long = json.dumps({"prompt": "ab:", "completion": " " + "b" * 20})
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, lines[3], long]) + "\n")
    return path


def test_figures_and_parts(recipe):
    found = drlora.look_at_data(load_recipe(recipe), examples=26)
    train, held_out = found.roles
    assert (train.role, held_out.role, found.max_length) == ("train", "eval", 12)
    assert (train.examples, train.dropped, train.truncated, train.duplicates) == (26, 0, 1, 1)
    # "abc:" and " cba</s>", each letter a token; the long one is cut at 12.
    assert train.tokens == 25 * 9 + 12 and train.trained == 25 * 5 + 9
    assert "prompt and completion" in train.said
    assert train.trained_share == train.trained / train.tokens
    assert (train.lengths.shortest, train.lengths.median, train.lengths.longest) == (9, 9, 12)
    first = train.shown[0]
    assert first.where == "line 1" and (first.tokens, first.trained) == (9, 5)
    (asked, learned) = first.parts
    assert (asked.is_trained, learned.is_trained) == (False, True)
    assert asked.text == "aaa:" and learned.text == " aaa</s>"
    assert held_out.examples == 6 and held_out.duplicates == 0


def test_packed_examples_are_counted_one_by_one(recipe):
    """The same figures, in fewer rows."""
    plain = drlora.look_at_data(load_recipe(recipe)).roles[0]
    packed = load_recipe(recipe, ["training.packing=true", "data.max_length=24"])
    found = drlora.look_at_data(packed).roles[0]
    whole = drlora.look_at_data(load_recipe(recipe, ["data.max_length=24"])).roles[0]
    assert plain.rows == plain.examples == whole.rows == found.examples > found.rows
    assert (found.tokens, found.trained, found.duplicates) == (
        whole.tokens, whole.trained, whole.duplicates
    )  # fmt: skip
    assert found.lengths == whole.lengths and found.shown[0].where is None


def test_it_is_printed_with_marks(recipe, capsys):
    assert main(["data", str(recipe), "--examples", "1"]) == 0
    said = capsys.readouterr().out
    assert "26 examples, 1 cut, 1 duplicate" in said
    assert "237 tokens, 134 of them trained (56.5%)" in said
    assert "[[ " in said and "</s>]]" in said
    assert main(["data", str(recipe), "--json", "--examples", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["roles"][0]["trained_share"] == 134 / 237 and found["roles"][0]["shown"] == []
    assert main(["data", str(recipe), "--examples", "-1"]) == 2


def test_colour_takes_the_place_of_marks(recipe):
    import io

    from rich.console import Console

    from drlora.cli.look import print_data

    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    print_data(drlora.look_at_data(load_recipe(recipe), 1), console)
    said = console.file.getvalue()
    assert "[[" not in said and "\x1b[1;32m" in said


def test_what_is_not_used_is_named_once(recipe, tmp_path, capfd):
    """Though training and held-out data have it."""
    for name in ("train", "eval"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{**json.loads(line), "note": 1} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", str(recipe), f"data.eval={tmp_path / 'train.jsonl'}",
             "data.splits={train: 'train[:20]', eval: 'train[20:]'}"]  # fmt: skip
    assert main(words) == 0
    assert capfd.readouterr().err.count("columns not used: note") == 1


def test_nothing_is_written_and_faults_are_named(recipe, tmp_path):
    drlora.look_at_data(load_recipe(recipe))
    assert not (tmp_path / "run").exists()
    drlora.look_at_data(load_recipe(recipe, ["training.max_steps=1"]))  # no plan fits that
    with pytest.raises(ConfigError, match="at least 0"):
        drlora.look_at_data(load_recipe(recipe), -1)


def test_answers_of_a_preference_count_as_trained():
    row = {"chosen_ids": [3, 4], "prompt_ids": [1, 2], "rejected_ids": [5]}
    assert tokens_of(row) == ([1, 2, 3, 4, 5], [False, False, True, True, True])
    # KTO's own loss has an answer to another prompt beside.
    row = {"prompt_ids": [1], "completion_ids": [2], "KL_completion_ids": [9], "label": True}
    assert tokens_of(row) == ([1, 2], [False, True])
