"""What a user can get wrong ends before training, with one message and exit code 2."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_run import make_tokenizer, save_all, save_model_folder

from drlora.cli.main import main

GOOD = {"prompt": "ab:", "completion": " ba"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder that the tests share and do not change."""
    return save_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """A folder with a recipe that works."""
    save_all(tmp_path, model=str(model))
    return tmp_path


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """Calls the CLI and returns its message, after checking that it is one, and nothing was run."""

    def no_training(*arguments, **settings):
        raise AssertionError("training was started")

    monkeypatch.setattr("drlora.runs.training.make_trainer", no_training)

    def call(*arguments: str) -> str:
        code = main(["train", str(folder / "recipe.yaml"), *arguments])
        return the_message(code, capsys)

    return call


def the_message(code: int, capsys) -> str:
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.err.startswith("error: ")
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err
    assert "before:" not in said.out, "nothing was measured"
    return said.err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown settings, with the nearest known one
        ("adapter.r_targt=4", ["adapter.r_targt", "did you mean adapter.r_target?", "gamma"]),
        ("training.max_step=4", ["training.max_step ", "did you mean training.max_steps?"]),
        ("seed=3", ["seed", "did you mean training.seed?"]),
        ("dta.train=x", ["dta", "did you mean data?"]),
        ("data.splits.dev=dev", ["data.splits.dev", "eval, test, train"]),
        ("evaluation.batchsize=3", ["did you mean evaluation.batch_size?"]),
        # values of the wrong kind
        ("training.learning_rate=fast", ["training.learning_rate='fast'", "a number"]),
        ("training.max_steps=1.5", ["training.max_steps=1.5", "a whole number"]),
        ("adapter.use_rslora=2", ["adapter.use_rslora=2", "true or false"]),
        ("adapter.router=free", ["router='free'", "'frozen', 'train'"]),
        ("adapter.preset=paper-v9", ["preset='paper-v9'", "paper-v5"]),
        ("adapter.projections=[gate_up, up]", ["projections=['gate_up', 'up']", "choose one of"]),
        ("dtype=int8", ["dtype='int8'", "bfloat16"]),
        ("training.lr_scheduler_type=sawtooth", ["sawtooth"]),
        ("training.per_device_train_batch_size=0", ["per_device_train_batch_size=0", "at least 1"]),
        ("adapter=3", ["adapter=3", "section"]),
        ("data.max_length=100000", ["data.max_length=100000", "64", "lower it"]),
        ("training", ["'training'", "key=value"]),
        ("training.max_steps=[", ["training.max_steps=[", "not valid YAML"]),
        # contradictions
        ("training.num_train_epochs=2", ["max_steps=12", "num_train_epochs=2", "keep one"]),
        ("training.output_dir=x", ["training.output_dir", "top of the recipe"]),
        ("data.eval=null", ["held out", "data.eval", "data.splits"]),
        # ranks out of order
        ("adapter.r_init=5", ["r_init=5", "r_target=3", "r_init <= r_target <= r_max"]),
        ("adapter.r_max=2", ["r_target=3", "r_max=2", "r_init <= r_target <= r_max"]),
        # budgets out of reach
        ("training.max_steps=3", ["run of 3 steps has no growth event", "lower settle_steps"]),
        (
            "adapter.grow_every=9; adapter.p_grow=0.2",
            ["6 experts * (r_target - r_init) = 6 * 2 = 12 ranks", "only 6 are certain",
             "raise p_grow or r_max, or lower grow_every"],
        ),
        ("adapter.p_grow=0", ["p_grow=0", "(0, 1]", "'auto'"]),
        ("adapter.grow_every=often", ["adapter.grow_every='often'", "whole number", "'auto'"]),
        # models
        ("start_from=./nowhere", ["nowhere holds no PEFT LoRA", "no adapter_config.json"]),
        ("start_ranks=./nowhere.json", ["there is no rank map nowhere.json"]),
        ("start_ranks=x.json; adapter.start=routing", ["start_ranks='x.json'", "keep one"]),
        ("model=no/such-model", ["model='no/such-model'", "local folder"]),
        ("model=./nowhere", ["model='./nowhere'", "local folder"]),
        ("adapter.experts=[model.layers.9.mlp.experts]", ["layers.9", "match nothing", "layers.0"]),
        ("tokenizer=./nowhere", ["tokenizer", "./nowhere"]),
        # data
        ("data.train=./missing.jsonl", ["missing.jsonl", "no such file"]),
        ("data.train=words.csv", ["words.csv", "no such file"]),
        ("data.train=words.docx", ["words.docx", ".jsonl", ".csv"]),
        ("data.train=embedded:nothing", ["'nothing'", "pronunciation"]),
        ("data.columns={prompt: question}", ["'question'", "'prompt'"]),
        ("data.columns={promt: question}", ["promt", "did you mean data.columns.prompt?"]),
    ],
)  # fmt: skip
def test_settings(refused, monkeypatch, override, parts):
    def no_weights(*arguments):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("drlora.runs.train.load_base_model", no_weights)
    message = refused(*override.split("; "))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["train.jsonl", "empty"]),
        (json.dumps(GOOD) + "\n{'prompt': 1}\n", ["train.jsonl, line 2", "not valid JSON"]),
        (json.dumps(GOOD) + '\n{"prompt": "a"}\n', ["train.jsonl, line 2", "'completion'"]),
        ('{"asked": "a", "answer": "b"}\n', ["'asked'", "'answer'", "prompt", "columns"]),
        ('{"prompt": 3, "completion": "b"}\n', ["line 1", "'prompt' must be"]),
    ],
    ids=["empty", "not JSON", "no completion", "other columns", "wrong type"],
)
def test_data_files(refused, folder, text, parts):
    (folder / "train.jsonl").write_text(text)
    message = refused()
    for part in parts:
        assert part in message


def test_a_recipe_that_is_not_there_or_no_yaml(tmp_path, capsys):
    assert "no.yaml cannot be read" in the_message(
        main(["train", str(tmp_path / "no.yaml")]), capsys
    )
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: embedded\n  data: [\n")
    assert f"{bad}, line 2 is not valid YAML" in the_message(main(["train", str(bad)]), capsys)
    bad.write_text("model: a\nmodel: b\n")
    assert "model is set twice" in the_message(main(["train", str(bad)]), capsys)
    bad.write_text("output_dir: a\ndata: {train: 'embedded:pronunciation'}\n")
    assert "model is missing" in the_message(main(["train", str(bad)]), capsys)


def test_a_model_without_moe_blocks(refused, folder):
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    message = refused(f"model={folder / 'dense'}")
    assert "LlamaForCausalLM has no Mixture-of-Experts block" in message
    assert "LoraConfig" in message


def test_a_tokenizer_of_another_model(refused, folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    tokenizer.save_pretrained(folder / "large")
    message = refused(f"tokenizer={folder / 'large'}")
    assert "has 131 tokens" in message
    assert "knows 64" in message


def test_damaged_model_weights(refused, folder, model):
    weights = shutil.copytree(model, folder / "damaged") / "model.safetensors"
    cut(weights)
    message = refused(f"model={weights.parent}")
    assert f"weights of model={str(weights.parent)!r} cannot be loaded" in message


def test_incomplete_model_weights(refused, folder, model):
    weights = shutil.copytree(model, folder / "incomplete") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    message = refused(f"model={weights.parent}")
    assert "1 tensors are missing, model.norm.weight for one" in message


def cut(path: Path) -> None:
    """Truncate a file to half of its size."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model) -> Path:
    """A finished run of two steps, without growth; tests change a copy of it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = save_all(folder, model=str(model))
    short = ["training.max_steps=2", "training.warmup_steps=0", "adapter.r_init=3"]
    assert main(["train", str(recipe), *short]) == 0
    return folder / "run"


@pytest.fixture
def run(folder, finished) -> Path:
    """A finished run that a test may damage."""
    return shutil.copytree(finished, folder / "run")


def test_an_output_directory_that_holds_a_run(run, folder, capsys):
    capsys.readouterr()
    message = the_message(main(["train", str(folder / "recipe.yaml")]), capsys)
    assert str(run) in message
    assert "already holds a run" in message
    assert "another output_dir" in message


def test_nothing_to_resume(refused):
    message = refused("--resume")
    assert "no run to resume" in message


def test_a_truncated_adapter(run, capsys):
    capsys.readouterr()
    cut(run / "adapter_model.safetensors")
    message = the_message(main(["eval", str(run)]), capsys)
    assert f"{run}/adapter_model.safetensors is no whole safetensors file" in message


def put(tensors, name, change):
    """Replace the tensors of block 0 whose keys end with `name`."""
    keys = [key for key in tensors if ".layers.0." in key and key.endswith(name)]
    assert keys
    tensors |= {key: change(tensors[key]).contiguous() for key in keys}


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        (".owner", lambda x: x.where(x > 0, 6), "owners must lie between -1"),
        ("drlora_adapters.pools.down.owner", lambda x: x * 0, "expert 0 has rank 18, r_max is 8"),
        ("drlora_adapters.pools.down.owner", lambda x: x.clamp(max=4),
         "must give each expert the same rank"),
        ("drlora_adapters.pools.down.owner", lambda x: x.float(), "torch.float32, not of integers"),
        ("drlora_adapters.pools.down.owner", lambda x: x[1:], "is (17,) in the file"),
        ("drlora_adapters.pools.down.lora_B", lambda x: x[:, 1:], "is (18, 31) in the file"),
        ("drlora_adapters.pools.up.lora_A", None, "no place for it"),
        ("drlora_adapters.pools.gate_up.seed", None, "seed is missing in the file"),
        ("gate_up_proj", None, "no place for it"),
    ],
    ids=["unknown owner", "rank above r_max", "unequal ranks", "float owners", "short owners",
         "turned", "a pool too many", "a seed too few", "a weight of the base"],
)  # fmt: skip
def test_an_adapter_file_that_was_tampered_with(run, capsys, name, change, part):
    path = run / "adapter_model.safetensors"
    tensors = load_file(path)
    if change is not None:
        put(tensors, name, change)
    elif "seed" in name:
        tensors = {key: x for key, x in tensors.items() if not key.endswith(name)}
    else:
        prefix = "base_model.model.model.layers.0.mlp.experts."
        tensors[prefix + name] = torch.zeros(18, 32)
    save_file(tensors, path)
    capsys.readouterr()
    dry_run = ["--format", "peft", "-o", str(run.parent / "out"), "--dry-run"]
    for command in (["eval", str(run)], ["export", str(run), *dry_run]):
        assert part in the_message(main(command), capsys)


def test_an_adapter_for_another_model(run, folder, capsys):
    save_model_folder(folder / "other", num_experts=5)
    config = (run / "config.yaml").read_text().splitlines()
    config = [f"model: {folder / 'other'}" if x.startswith("model:") else x for x in config]
    (run / "config.yaml").write_text("\n".join(config))
    capsys.readouterr()
    message = the_message(main(["eval", str(run)]), capsys)
    assert "does not fit this model" in message


def test_an_adapter_for_a_deeper_model(run, folder, capsys):
    save_model_folder(folder / "other", num_hidden_layers=1)
    config = (run / "config.yaml").read_text().splitlines()
    config = [f"model: {folder / 'other'}" if x.startswith("model:") else x for x in config]
    (run / "config.yaml").write_text("\n".join(config))
    capsys.readouterr()
    message = the_message(main(["eval", str(run)]), capsys)
    assert "Was the adapter made for another model?" in message


def test_what_is_no_run_or_not_finished(run, tmp_path, capsys):
    capsys.readouterr()
    message = the_message(main(["eval", str(tmp_path / "nowhere")]), capsys)
    assert "nowhere is neither a run directory nor a saved adapter" in message
    (run / "adapter_model.safetensors").unlink()
    message = the_message(main(["eval", str(run)]), capsys)
    assert "not finished" in message
    assert "--resume" in message


def test_debug_shows_the_traceback(folder):
    from drlora.errors import ConfigError

    with pytest.raises(ConfigError, match="ranks are out of order"):
        main(["train", str(folder / "recipe.yaml"), "adapter.r_init=9", "--debug"])
