"""Law 10: public names are pinned; what a README or a script uses does not vanish unnoticed."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest

import drlora
from drlora.cli.arguments import make_parser

NAMES = {
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DrLoraCallback",
    "DrLoraConfig",
    "DrLoraError",
    "Grant",
    "RankDynamics",
    "RunDiverged",
    "RunInterrupted",
    "SyncError",
    "Verification",
    "__version__",
    "adapter_state",
    "chat",
    "continue_adapter",
    "evaluate",
    "examine",
    "export_adapter",
    "generate",
    "inspect",
    "load_peft_lora",
    "load_recipe",
    "look_at_data",
    "newest_checkpoint",
    "packed_config",
    "QuantisedExperts",
    "place_ranks",
    "plan",
    "quantise_experts",
    "rank_map",
    "ranks_from_routing",
    "run_comparison",
    "start_ranks",
    "train",
    "verify",
    "write_checkpoint",
    "write_recipe",
    "write_report",
}
SETTINGS = {
    "r_init": 8,
    "r_target": 16,
    "r_max": 32,
    "lora_alpha": None,
    "use_rslora": False,
    "lora_dropout": 0.0,
    "beta": 0.9,
    "gamma": 1.2,
    "p_grow": "auto",
    "grow_every": "auto",
    "warmup_steps": 0.03,
    "settle_steps": "auto",
    "saliency": "product",
    "start": "uniform",
    "allocation": "grow",
    "budget_scope": "layer",
    "router": "frozen",
    "young_rows": "own",
    "engine": "auto",
    "target_modules": None,
    "target_rank": None,
    "target_alpha": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "experts": None,
    "record": None,
}
GRANT_FIELDS = [
    "step", "block", "projection", "expert", "granted", "rank", "routing", "importance", "saliency",
]  # fmt: skip


def test_public_names():
    assert set(drlora.__all__) == NAMES
    assert all(hasattr(drlora, name) for name in NAMES)


def test_settings_and_their_defaults():
    own = {f.name: f for f in dataclasses.fields(drlora.DrLoraConfig)}
    for name, default in SETTINGS.items():
        assert own[name].default == default, name
    assert drlora.DrLoraConfig().projections == ["gate_up", "down"]
    inherited = {f.name for f in dataclasses.fields(drlora.DrLoraConfig.__mro__[1])}
    assert set(own) - inherited == {*SETTINGS, "projections", "options"}
    assert len(set(own) - inherited) <= 28


def test_the_growth_log_has_the_fields_of_a_grant():
    assert [f.name for f in dataclasses.fields(drlora.Grant)] == GRANT_FIELDS


def test_dynamics_and_callback_signatures():
    assert list(inspect.signature(drlora.RankDynamics).parameters) == [
        "model", "total_steps", "adapter", "schedule", "step", "skipped",
    ]  # fmt: skip
    for method in ("before_optimizer_step", "after_optimizer_step", "ranks", "budget",
                   "state_dict", "load_state_dict", "release", "watch"):  # fmt: skip
        assert callable(getattr(drlora.RankDynamics, method))
    assert list(inspect.signature(drlora.DrLoraCallback).parameters) == [
        "adapter", "log_dir", "on_growth",
    ]  # fmt: skip


def test_signatures_of_imports():
    for function, parameters in (
        (drlora.load_peft_lora, ["model", "folder", "config"]),
        (drlora.continue_adapter, ["model", "folder", "config", "ranks"]),
        (drlora.place_ranks, ["model", "batches", "adapter", "optimizer", "loss"]),
        (drlora.rank_map, ["model"]),
        (drlora.start_ranks, ["model", "ranks"]),
        (drlora.ranks_from_routing, ["model", "batches", "mean_rank"]),
    ):
        assert list(inspect.signature(function).parameters) == parameters


def test_command_line_verbs():
    (verbs,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert set(verbs.choices) == {
        "init", "plan", "data", "train", "eval", "generate", "chat", "inspect", "export", "compare",
        "report", "verify", "serve", "doctor", "env",
    }  # fmt: skip


WINGS = {path.stem for path in Path(drlora.__file__).parent.iterdir()}
VERBS = {
    "write_recipe": ["output", "overrides", "name"],
    "look_at_data": ["recipe", "examples"],
    "generate": [
        "folder", "prompts", "compare", "seed", "batch_size", "chat_template", "model",
        "trust_remote_code", "on_answer", "settings",
    ],
    "chat": [
        "folder", "compare", "system", "seed", "chat_template", "model", "trust_remote_code",
        "settings",
    ],
    "train": ["recipe", "resume", "overwrite", "progress"],
    "load_recipe": ["source", "overrides", "resume"],
    "evaluate": ["folder", "split", "data", "model", "trust_remote_code"],
    "inspect": [
        "model", "config", "steps", "dtype", "batch", "quantise", "optim", "trust_remote_code",
    ],
    "export_adapter": [
        "folder", "format", "output", "rank", "dry_run", "model", "data", "trust_remote_code",
        "max_shard_size", "rounding", "seed", "merge_into", "routers", "by_shard",
    ],
    "verify": ["folder", "base", "merged"],
    "write_report": ["folders", "output", "format", "refresh"],
    "plan": [
        "model", "data", "output", "overrides", "gpu", "memory", "measures", "tests_rates", "say",
    ],
    "examine": ["folder", "asks_hub"],
    "run_comparison": [
        "path", "overrides", "jobs", "threads", "dry_run", "only_page", "retry_failed", "progress",
    ],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_function(verb):
    """Whose name is no wing's, for `drlora.NAME` can be but one of them."""
    assert list(inspect.signature(getattr(drlora, verb)).parameters) == VERBS[verb]
    assert verb not in WINGS
    found = typing.get_type_hints(getattr(drlora, verb))["return"]
    assert found is Path or dataclasses.is_dataclass(found)
    assert found is Path or callable(found.to_dict)
