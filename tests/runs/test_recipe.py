"""Recipes: defaults, presets, overrides, and that the resolved recipe is a recipe."""

from pathlib import Path

import pytest
import yaml

from drlora.errors import ConfigError
from drlora.io.settings import check_type, parse_yaml, split_override
from drlora.recipes import recipe_names
from drlora.runs.data_section import DataSection
from drlora.runs.recipe import load_recipe, recipe_from

MINIMAL = {
    "model": "embedded",
    "output_dir": "runs/x",
    "data": {"train": "embedded:pronunciation"},
}
RECIPES = recipe_names()


@pytest.fixture
def path(tmp_path) -> Path:
    """A minimal recipe file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def test_minimal_recipe_gets_the_published_defaults():
    recipe = recipe_from(MINIMAL)
    config = recipe.adapter_config()
    assert (config.r_init, config.r_target, config.r_max) == (8, 16, 32)
    assert (recipe.dtype, recipe.trust_remote_code) == ("auto", False)
    assert recipe.training["save_strategy"] == "steps"


def test_overrides_reach_every_section(path):
    recipe = load_recipe(
        path,
        [
            "output_dir=runs/y",
            "training.learning_rate=1e-3",
            "adapter.projections=[down]",
            "evaluation.exact_match=false",
            "data.limits.train=100",
            "data.limits.eval=5",
        ],
    )
    assert recipe.output_dir == "runs/y"
    assert recipe.training["learning_rate"] == 0.001
    assert recipe.adapter.projections == ["down"]
    assert recipe.evaluation.exact_match is False
    assert recipe.data.limits == {"train": 100, "eval": 5}


def test_preset_with_changes():
    recipe = recipe_from({**MINIMAL, "adapter": {"preset": "paper-v3", "r_max": 96}})
    config = recipe.adapter_config()
    assert (config.r_init, config.r_target, config.r_max) == (32, 64, 96)
    assert config.projections == ["up", "down"]
    assert config.router == "train"


def test_the_learning_rates_warmup_is_also_the_adapters():
    training = {"warmup_steps": 50}
    assert recipe_from({**MINIMAL, "training": training}).adapter.warmup_steps == 50
    own = {**MINIMAL, "training": training, "adapter": {"warmup_steps": 70}}
    assert recipe_from(own).adapter.warmup_steps == 70


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {"r_target": 8, "grow_every": 5, "options": {"young_a": "gradient"}},
            "both 8: adapter.grow_every=5, adapter.options.young_a='gradient' has no effect",
        ),
        ({"r_target": 8, "settle_steps": 3}, "adapter.settle_steps=3 has no effect"),
        ({"r_target": 8, "young_rows": "own"}, None),  # as without a word
        ({"r_target": 16, "grow_every": 5}, None),
        ({"r_target": 8, "r_max": 32, "grow_every": 5, "options": {"move_share": 0.1}}, None),
    ],
)
def test_settings_of_growth_that_cannot_be_are_told(caplog, adapter, said):
    load_recipe({**MINIMAL, "adapter": {"r_init": 8, "r_max": 32, **adapter}})
    assert (said in caplog.text) if said else "no effect" not in caplog.text
    caplog.clear()
    load_recipe({**MINIMAL, "adapter": {"r_init": 8, "r_max": 32, **adapter}, "method": "lora"})
    assert "ranks do not grow" not in caplog.text


def test_resolved_recipe_is_a_recipe_and_stays_as_it_is(path):
    recipe = load_recipe(path, ["adapter.preset=paper-v5", "training.max_steps=9"])
    text = yaml.safe_dump(recipe.to_dict())
    assert recipe_from(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_valid(name):
    assert load_recipe(name).output_dir == f"runs/{name.replace('paper/', 'paper/olmoe-')}"


def test_default_splits_follow_the_kind_of_source():
    embedded = DataSection("embedded:definitions")
    assert [embedded.source(role)[1] for role in ("train", "eval", "test")] == [
        "train",
        "dev",
        "test",
    ]
    files = DataSection("a.jsonl", eval="b.parquet")
    assert files.source("eval") == ("b.parquet", "train")
    hub = DataSection("org/name", splits={"test": "other"})
    assert hub.source("eval") == ("org/name", "validation")
    assert hub.source("test") == ("org/name", "other")


def test_held_out_data_must_not_be_the_training_data():
    with pytest.raises(ConfigError, match="held out"):
        DataSection("a.jsonl")
    split = DataSection("a.jsonl", splits={"train": "train[:90%]", "eval": "train[90%:]"})
    assert split.source("eval") == ("a.jsonl", "train[90%:]")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2E5", 2e5), ("1.5e-3", 1.5e-3), ("-1e2", -100.0), ("1e", "1e"),
     ("e5", "e5"), ("3", 3), ("true", True), ("[1, 2]", [1, 2])],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, value):
    read = parse_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


def test_a_key_stands_once():
    with pytest.raises(ConfigError, match="here, line 1 is not valid YAML: b is set twice"):
        parse_yaml("a: {b: 1, b: 2}", "here")


def test_mappings_may_be_merged():
    text = "base: &base {a: 1, b: 2}\nown: {<<: *base, b: 3}"
    assert parse_yaml(text, "it")["own"] == {"a": 1, "b": 3}
    with pytest.raises(ConfigError, match="b is set twice"):
        parse_yaml(text.replace("b: 3", "b: 3, b: 4"), "it")


def test_override_forms():
    assert split_override("a.b=c=d") == (["a", "b"], "c=d")
    for wrong in ("a", "=3", "a..b=3"):
        with pytest.raises(ConfigError, match="no override"):
            split_override(wrong)


@pytest.mark.parametrize(
    ("value", "wanted", "fits"),
    [
        (3, int, True),
        (True, int, False),
        (3, float, True),
        ("3", float, False),
        (None, int | None, True),
        (None, int, False),
        (["a"], list[str], True),
        ([1], list[str], False),
        ({"a": 1}, dict[str, int], True),
        (1, bool, False),
    ],
)
def test_types(value, wanted, fits):
    if fits:
        assert check_type(value, wanted, "x") == value
    else:
        with pytest.raises(ConfigError, match="x="):
            check_type(value, wanted, "x")


def test_a_whole_float_is_a_whole_number():
    steps = check_type(1000.0, int, "x")
    assert steps == 1000
    assert isinstance(steps, int)


@pytest.mark.parametrize(("value", "wanted"), [("ipo", list[str]), (0.5, list[float] | None)])
def test_one_value_is_a_list_of_it_where_only_lists_are_taken(value, wanted):
    assert check_type(value, wanted, "x") == [value]
    assert check_type(value, wanted | type(value), "x") == value
    with pytest.raises(ConfigError, match="x="):
        check_type({"a": value}, wanted, "x")


def test_an_unquoted_no_is_a_strategy_and_not_false(tmp_path):
    tree = {
        "model": "embedded",
        "output_dir": str(tmp_path),
        "data": {"train": "embedded:definitions"},
    }
    recipe = recipe_from({**tree, "training": yaml.safe_load("save_strategy: no")})
    assert recipe.training["save_strategy"] == "no"
