"""`drlora init`: comments stay, numbers fit, and what is written can be trained.

Run: make test ARGS=tests/runs/test_new_recipe.py
"""

import json

import pytest
import yaml
from tiny_run import save_examples, save_model_folder

import drlora
from drlora.cli.main import main
from drlora.errors import ConfigError, DataError
from drlora.io.commented import with_value, without
from drlora.recipes import FOLDER, about, recipe_names, recipe_text, resolve_recipe
from drlora.runs.new_recipe import OWN_DATA
from drlora.runs.recipe import load_recipe

TEXT = """# head
a: 1  # of a

b:
  # of c
  c: {x: 1}
  d: 2
e: 3
"""


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (["a"], "new", "a: new"),
        (["b", "d"], 1e-4, "  d: 0.0001"),
        (["b", "c", "y"], "train[:90%]", "  c: {x: 1, y: 'train[:90%]'}"),
        (["b", "f"], [1, 2], "  f: [1, 2]"),
        (["g"], True, "g: true"),
        (["h", "i"], None, "  i: null"),
    ],
)
def test_a_value_is_changed_and_comments_stay(path, value, line):
    made = with_value(TEXT, path, value)
    assert line in made.splitlines()
    comments = [text for text in TEXT.splitlines() if text.strip().startswith("#")]
    assert [text for text in made.splitlines() if text.strip().startswith("#")] == comments
    tree = yaml.safe_load(made)
    for key in path:
        tree = tree[key]
    assert tree == value


def test_a_line_is_taken_out():
    assert yaml.safe_load(without(TEXT, ["b", "d"])) == {"a": 1, "b": {"c": {"x": 1}}, "e": 3}
    assert without(TEXT, ["b", "nothing"]) == TEXT
    with pytest.raises(ConfigError, match="a is no section"):
        with_value(TEXT, ["a", "b"], 1)


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_of_every_recipe_can_be_changed(name):
    """The shipped recipes are written as `with_value` reads them."""
    text = recipe_text(name)
    for key, value in yaml.safe_load(text).items():
        inside = value if isinstance(value, dict) else {None: value}
        for inner, old in inside.items():
            path = [key] if inner is None else [key, inner]
            assert yaml.safe_load(with_value(text, path, old)) == yaml.safe_load(text)
            assert with_value(text, path, "changed").count("\n") == text.count("\n")
    assert about(name).endswith(".") and "\n" not in about(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_model_folder(tmp_path / "model")
    save_examples(tmp_path / "train.jsonl", 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_for_a_model_and_data(folder, capsys):
    """Two words suffice; the dry run passes, and so does a short run of it."""
    assert main(["init", "model=model", "data.train=train.jsonl", "-o", "own.yaml"]) == 0
    said = capsys.readouterr().out
    assert "the last tenth of the data is held out" in said
    assert "the model takes 64 tokens" in said
    assert "train 180 examples" in said and "held out 20 examples" in said
    assert "length 135 steps of 4 examples, 3 epochs" in said
    assert "drlora train own.yaml --dry-run" in said
    text = (folder / "own.yaml").read_text()
    assert text.count("#") > 20 and "path/to" not in text.split("start_from")[0]
    assert main(["train", "own.yaml", "--dry-run"]) == 0
    recipe = load_recipe("own.yaml")
    assert recipe.output_dir == "runs/own" and recipe.data.max_length == 64
    assert recipe.training["max_steps"] == 135
    short = ["training.max_steps=2", "training.warmup_steps=0", "adapter.r_init=16"]
    assert main(["train", "own.yaml", *short]) == 0


def test_what_is_given_stays(folder):
    save_examples(folder / "eval.jsonl", 210, start=200)
    words = ["model=model", "data.train=train.jsonl", "data.eval=eval.jsonl", "output_dir=x",
             "training.num_train_epochs=9", "data.max_length=32", "adapter.r_max=24"]  # fmt: skip
    with pytest.raises(ConfigError, match="contradict"):
        drlora.write_recipe("a.yaml", [*words, "training.max_steps=3"])
    assert not (folder / "a.yaml").exists()
    made = drlora.write_recipe("a.yaml", words)
    assert made.recipe == load_recipe("a.yaml")
    recipe = made.recipe
    assert recipe.data.eval == "eval.jsonl" and recipe.data.splits == {}
    assert (recipe.data.max_length, recipe.output_dir, recipe.adapter.r_max) == (32, "x", 24)
    assert recipe.training["num_train_epochs"] == 9 and "max_steps" not in recipe.training
    assert json.dumps(made.to_dict())


def test_pairs_are_learned_from_as_pairs(folder):
    """With the objective that they are for, and its learning rate."""
    pairs = [{"prompt": f"{w}:", "chosen": f" {w}", "rejected": " no"} for w in ("ab", "cd", "ef")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs * 20))
    made = drlora.write_recipe("a.yaml", ["model=model", "data.train=pairs.jsonl"])
    assert made.recipe.objective == "dpo" and made.recipe.training["learning_rate"] == 1e-5
    assert any("objective dpo" in note for note in made.notes)
    found = drlora.look_at_data(made.recipe, 1).roles[0]
    assert found.examples == 54 and found.shown[0].parts[0].is_trained is False
    assert found.shown[0].trained > 0 and "preference pairs" in found.said


def test_more_examples_make_larger_steps(folder):
    save_examples(folder / "train.jsonl", 6000)
    made = drlora.write_recipe(None, ["model=model", "data.train=train.jsonl"])
    assert str(made.path) == "own-data.yaml"
    training = made.recipe.training
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert (batch, training["max_steps"]) == (48, 338)  # 5,400 examples three times


@pytest.mark.parametrize(
    ("words", "kind", "parts"),
    [
        ([], ConfigError, ["needs model", "drlora init --list"]),
        (["model=model"], ConfigError, ["needs data.train"]),
        (["model=model", "data.train=gone.jsonl"], DataError, ["gone.jsonl"]),
        (["model=gone", "data.train=train.jsonl"], ConfigError, ["model='gone'"]),
        (["model=model", "data.train=train.jsonl", "adapter.r_ini=3"], ConfigError,
         ["did you mean adapter.r_init?"]),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_no_file(folder, words, kind, parts):
    with pytest.raises(kind) as refused:
        drlora.write_recipe("a.yaml", words)
    assert all(part in str(refused.value) for part in parts)
    assert not (folder / "a.yaml").exists()


def test_a_file_is_not_written_over(folder, capsys):
    (folder / "embedded.yaml").write_text("mine")
    assert main(["init", "embedded"]) == 2
    assert "embedded.yaml is there already" in capsys.readouterr().err
    assert (folder / "embedded.yaml").read_text() == "mine"


def test_recipes_that_come_along(folder, capsys):
    assert main(["init", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == recipe_names()
    assert main(["init", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["embedded"].startswith("The embedded model")
    assert main(["init", "embedded", "training.max_steps=300", "-o", "sub/mine.yaml"]) == 0
    assert load_recipe("sub/mine.yaml").training["max_steps"] == 300
    assert main(["init", "embedded", "training.max_steps=3"]) == 2
    assert "no growth event" in capsys.readouterr().err
    made = drlora.write_recipe(name="paper/gsm8k")
    assert "hub" in made.notes[-1] and str(made.path) == "gsm8k.yaml"


def test_a_recipe_is_found_by_its_name(folder, capsys):
    """Outside of the repository; a file of that name comes first."""
    assert main(["train", "embedded", "training.max_steps=200", "--dry-run"]) == 0
    assert "dry run: nothing was written to runs/embedded" in capsys.readouterr().out
    assert resolve_recipe("embedded") == str(FOLDER / "embedded.yaml")
    (folder / "embedded").write_text("mine")
    assert resolve_recipe("embedded") == "embedded"
    assert main(["train", "embeded", "--dry-run"]) == 2
    assert "did you mean embedded?" in capsys.readouterr().err
    assert resolve_recipe("no/such.yaml") == "no/such.yaml"  # its reader says it best
    assert OWN_DATA in recipe_names()


@pytest.mark.parametrize("count", [2, 9])
def test_of_a_few_examples_one_is_held_out(folder, count):
    """A tenth of them may be none."""
    save_examples(folder / "train.jsonl", count)
    made = drlora.write_recipe("a.yaml", ["model=model", "data.train=train.jsonl"])
    assert f"train {count - 1} example{'s' * (count > 2)}" in made.notes
    assert "held out 1 example" in made.notes


def test_of_one_example_none_can_be_held_out(folder):
    save_examples(folder / "train.jsonl", 1)
    with pytest.raises(DataError, match=r"none can be held out; name data\.eval"):
        drlora.write_recipe("a.yaml", ["model=model", "data.train=train.jsonl"])
