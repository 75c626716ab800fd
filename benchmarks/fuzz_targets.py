"""What benchmarks.fuzz breaks: whole files of each kind, and what reads them.

`make_world` writes them once, with a model of a few thousand weights.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
import transformers
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import drlora
from benchmarks.mutate import HOSTILE
from drlora.adapter.linear import choose_targets, refuse_endless
from drlora.compare.plan import load_plan
from drlora.compare.results import Folder, read_matrix
from drlora.data import encode_examples, load_examples, pad_token_id
from drlora.embedded import resolve_model
from drlora.evaluation.measure import measurement_from
from drlora.io.jsonl import forget_after, read_lines
from drlora.moe.blocks import find_blocks
from drlora.ranks.schedule import plan_growth
from drlora.report.write import write_report
from drlora.runs.arguments import training_arguments
from drlora.runs.loading import load_adapter, load_tokenizer
from drlora.runs.recipe import Recipe, adapter_settings, load_recipe, recipe_from
from drlora.runs.rundir import RunDir
from drlora.runs.sources import find_source

RANKS = dict(r_init=1, r_target=2, r_max=4, p_grow=0.5, grow_every=2, settle_steps=2)
RECIPE: dict[str, Any] = {
    "model": "embedded",
    "output_dir": "run",
    "data": {"train": "embedded:kinds", "limits": {"eval": 8}},
    "adapter": {**RANKS, "router": "train"},
    "training": {"max_steps": 12, "warmup_steps": 2, "learning_rate": 1e-3},
    "evaluation": {"exact_match_examples": 4},
}
PLAN: dict[str, Any] = {
    "output_dir": "results",
    "models": {"embedded": {"model": "embedded"}},
    "tasks": {"kinds": {"data.train": "embedded:kinds"}},
    "methods": ["lora", "drlora"],
    "seeds": [1, 2],
    "base": {"adapter": RANKS, "training": RECIPE["training"]},
    "baselines": ["lora"],
    "metrics": ["loss", "exact_match"],
    "tune": {"grid": {"training.learning_rate": [1e-3, 2e-3]}, "seeds": [7], "split": "dev"},
}


@dataclass(frozen=True)
class Target:
    """A folder of the world, the files in it that are broken, and what reads the folder."""

    folder: str
    files: tuple[str, ...]
    read: Callable[[Path, Path], Any]


def make_model() -> transformers.PreTrainedModel:
    """An OLMoE of one layer and four experts."""
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, num_experts=4,
        num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(config)


def make_world(world: Path) -> None:
    """Whole files of every kind, in a folder each."""
    for target in TARGETS.values():
        (world / target.folder).mkdir(parents=True, exist_ok=True)
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**RANKS, target_modules=["q_proj"]))
    model.save_pretrained(str(world / "adapter"))
    _write(world / "ranks" / "ranks.json", drlora.rank_map(model))
    lora = LoraConfig(
        r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=["q_proj"],
    )  # fmt: skip
    get_peft_model(make_model(), lora).save_pretrained(str(world / "lora"))
    (world / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (world / "plan" / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    _make_data(world / "data")
    _make_run(world / "run", world / "adapter")
    _write(world / "export" / "drlora_export.json", {"adapter": str(world / "run"), "rank": 4})
    _write(world / "export" / "config.json", {"model_type": "olmoe"})
    _make_results(world / "results")
    for file in (Path(__file__).parents[1] / "docs" / "runs" / "embedded").iterdir():
        shutil.copy(file, world / "report")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


def _make_data(folder: Path) -> None:
    rows = [{"prompt": f"{n} und:", "completion": f" {n + 1}"} for n in range(12)]
    for row, answer in zip(rows, "abcdefghijkl", strict=True):
        row |= {"answers": [answer, row["completion"]], "note": None}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name, records in (("rows", rows), ("turns", [{"messages": turns}] * 4)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    _write(folder / "rows.json", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")


def _make_run(folder: Path, adapter: Path) -> None:
    """The files that a run leaves behind, without training one."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    recipe = recipe_from(RECIPE).to_dict()
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    loss = {"loss": 2.0, "perplexity": 7.4, "target_tokens": 9}
    match = {"accuracy": 0.5, "correct": 1, "total": 2, "error_rate": None, "samples": []}
    measured = {"loss": loss, "match": match}
    metrics: list[dict] = [{"step": 0, "kind": "before", **measured}]
    metrics += [{"step": n, "kind": "log", "loss": 2.0 - n / 10} for n in range(1, 9)]
    grant = {"block": "model.layers.0.mlp", "projection": "gate_up+down", "granted": 1, "rank": 2}
    growth = [{"step": n, "expert": n % 4, **grant, "saliency": 1e-3} for n in range(4, 9)]
    for name, entries in (("metrics", metrics), ("growth", growth)):
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / f"{name}.jsonl").write_text(lines)
    result = {"before": measured, "after": measured, "steps": 12, "config": recipe}
    _write(folder / "result.json", result)
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    shutil.copytree(adapter, checkpoint)
    _write(checkpoint / "trainer_state.json", {"global_step": 6, "log_history": []})
    torch.save({"state": {}}, checkpoint / "optimizer.pt")


def _make_results(folder: Path) -> None:
    """One finished cell of the plan's tuning."""
    plan_file = folder / "plan.yaml"
    plan_file.write_text(yaml.safe_dump({k: v for k, v in PLAN.items() if k != "tune"}))
    (cell, *_) = read_matrix(load_plan(plan_file), Folder(folder)).compare
    measured = {"loss": {"loss": 2.0, "perplexity": 7.4, "target_tokens": 9}, "match": None}
    cells = folder / "runs" / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    result = {"recipe": cell.recipe.to_dict(), "after": measured, "before": measured}
    _write(cells / f"a-{cell.key}.json", result)
    shutil.copy(cells / f"a-{cell.key}.json", folder / "cell.json")


def _read_adapter(world: Path, folder: Path) -> None:
    find_source(folder, "embedded")
    load_adapter(make_model(), str(folder))


def _read_data(world: Path, folder: Path) -> None:
    for path in folder.iterdir():
        encoded = encode_examples(load_examples(str(path)), _tokenizer(), 64).tokens
        DataCollatorForLanguageModeling(pad_token_id(_tokenizer()))([encoded[0]])


@cache
def _tokenizer() -> transformers.PreTrainedTokenizerBase:
    recipe = recipe_from(RECIPE)
    tokenizer = load_tokenizer(recipe, 10**9)
    assert resolve_model(recipe.model)
    datasets.disable_progress_bars()
    return tokenizer


def _read_run(world: Path, folder: Path) -> None:
    run = RunDir(folder)
    find_source(folder)
    run.newest_checkpoint()
    for name in ("metrics.jsonl", "growth.jsonl"):
        for entry in read_lines(folder / name):
            if entry.get("kind") == "before":
                measurement_from(entry)
        forget_after(folder / name, 6)


def _read_results(world: Path, folder: Path) -> None:
    (cell,) = (folder / "runs" / "cells").iterdir()
    (folder / "cell.json").replace(cell)
    matrix = read_matrix(load_plan(folder / "plan.yaml"), Folder(folder))
    for place in {cell.place for cell in matrix.compare}:
        for metric in matrix.plan.metrics:
            matrix.values(metric, place)
            matrix.items(metric, place, matrix.plan.seeds)


@cache
def _fresh_adapter() -> Any:
    return get_peft_model(make_model(), drlora.DrLoraConfig(**RANKS))


def _read_ranks(world: Path, folder: Path) -> None:
    drlora.start_ranks(_fresh_adapter(), folder / "ranks.json")


def _read_recipe(world: Path, folder: Path) -> None:
    load_recipe(folder / "recipe.yaml").adapter_config()


def _read_plan(world: Path, folder: Path) -> None:
    plan = load_plan(folder / "plan.yaml")
    read_matrix(plan, Folder(folder / "results"))


_CONFIG_AND_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")
_RUN_FILES = ("config.yaml", "metrics.jsonl", "growth.jsonl", "result.json", *_CONFIG_AND_WEIGHTS)
_SAVED = tuple(
    f"checkpoints/checkpoint-6/{name}"
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors")
)
TARGETS: dict[str, Target] = {
    "rank map": Target("ranks", ("ranks.json",), _read_ranks),
    "adapter": Target("adapter", _CONFIG_AND_WEIGHTS, _read_adapter),
    "PEFT LoRA": Target(
        "lora", _CONFIG_AND_WEIGHTS, lambda _, f: drlora.load_peft_lora(make_model(), f)
    ),
    "recipe": Target("recipe", ("recipe.yaml",), _read_recipe),
    "plan": Target("plan", ("plan.yaml",), _read_plan),
    "data": Target("data", ("rows.jsonl", "turns.jsonl", "rows.json", "rows.parquet"), _read_data),
    "run": Target("run", (*_RUN_FILES, *_SAVED), _read_run),
    "export record": Target("export", ("drlora_export.json",), lambda _, f: find_source(f)),
    "report": Target(
        "report",
        ("config.yaml", "growth.jsonl", "metrics.jsonl", "result.json"),
        lambda _, folder: write_report([folder], folder / "report.html"),
    ),
    "comparison result": Target("results", ("cell.json",), _read_results),
}


def make_settings(rng: random.Random) -> dict[str, Any]:
    """A recipe with one to six settings changed, misspelt, or in the wrong place."""
    tree = json.loads(json.dumps(RECIPE))
    sections: dict[str, list[str]] = {
        "adapter": [*adapter_settings(), "preset"],
        "data": ["train", "eval", "splits", "columns", "max_length", "limits", "config"],
        "evaluation": ["loss_examples", "exact_match", "max_new_tokens", "batch_size"],
        "training": [f.name for f in fields(transformers.TrainingArguments)],
    }
    top = [f.name for f in fields(Recipe)]
    for _ in range(rng.randint(1, 6)):
        section = rng.choice(("adapter", "adapter", "adapter", "training", *sections, ""))
        key = rng.choice(sections.get(section, top))
        if section == "adapter" and rng.random() < 0.15:
            key = "target_modules"
        if rng.random() < 0.1:
            at = rng.randrange(len(key))
            key = key[:at] + rng.choice("xyz_") + key[at + rng.randint(0, 1) :]
        holder = tree[section] if section else tree
        if isinstance(holder, dict):
            holder[key] = _some_value(rng)
    return tree


_LIKELY = (
    *(1, 2, 3, 4, 8, 16, 32, 64, 0.1, 0.5, 0.9, 1.2, 100, 200),
    *("train", "frozen", "grow", "prune", "uniform", "hot", "routing", "expert", "projection"),
    *("product", "importance", "random", "layer", "model", "own", "inherit", "paper-v5", "static"),
    # Patterns: a good one, some that are none, and some on which matching takes for ever.
    *(r".*\.q_proj", "(", "[a-", "*", "(?P<a", r"((\w+\.?)+)+!", r"(.*\w)*\d*!"),
    *("(a|a|.)*.*.*.*b!", r"(((\w+)+)+)+\."),
    *("all-linear", ["q_proj"], ["gate_up", "down"], ["up", "down"], {"train": "train[:50%]"}),
)


def _some_value(rng: random.Random) -> Any:
    return rng.choice(_LIKELY) if rng.random() < 0.6 else rng.choice(HOSTILE)


def read_settings_case(tree: dict[str, Any], folder: Path) -> None:
    """Make the recipe of `tree`, its plan of growth and the Trainer's arguments.

    What loads gives itself when its resolved form is read again.
    """
    names = {f.name for f in fields(PeftConfig)}
    if isinstance(tree.get("adapter"), dict) and "preset" not in tree["adapter"]:
        direct = {k: v for k, v in tree["adapter"].items() if k in adapter_settings() or k in names}
        drlora.DrLoraConfig(**direct)
    recipe = recipe_from(tree)
    assert recipe_from(recipe.to_dict()) == recipe
    config = recipe.adapter_config()
    if config.target_modules:
        model = make_model()
        refuse_endless(config.target_modules, [name for name, _ in model.named_modules()])
        choose_targets(model, config, find_blocks(model))
    arguments = training_arguments(recipe, RunDir(folder / "run"))
    if arguments.max_steps > 0:
        plan_growth(config, 4, arguments.max_steps)
