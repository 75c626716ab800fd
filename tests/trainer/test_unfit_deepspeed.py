"""What is asked of DeepSpeed and ranks cannot grow with is refused before the first step, by name.

DeepSpeed is not needed: its configuration is a dictionary, as the Trainer has read it.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from peft import get_peft_model
from tiny import make_model
from tiny_trainer import make_trainer

import drlora
from drlora.runs.arguments import training_arguments
from drlora.runs.recipe import load_recipe
from drlora.runs.rundir import RunDir
from drlora.trainer.deepspeed import refuse_unfit_deepspeed


def arguments(compiled: bool = False, **config: Any) -> Any:
    read = SimpleNamespace(config=config)
    return SimpleNamespace(hf_deepspeed_config=read, torch_compile=compiled)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (arguments(expert_parallel={"enabled": True}), "Leave expert_parallel out"),
        (
            arguments(zero_optimization={"stage": 3, "zero_hpz_partition_size": 8}),
            "zero_hpz_partition_size=8.*Leave it out of zero_optimization",
        ),
        (
            arguments(zero_optimization={"stage": 3, "mics_shard_size": 4}),
            "mics_shard_size=4.*Leave it out of zero_optimization",
        ),
        (
            arguments(zero_optimization={"stage": 2, "zenflow": {"topk_ratio": 0.1}}),
            "zenflow.*Leave it out of zero_optimization",
        ),
        (
            arguments(compiled=True, zero_optimization={"stage": 3}),
            "torch_compile cannot work.*under ZeRO-3.*to false, or use ZeRO-2",
        ),
    ],
)
def test_refused(asked, said):
    with pytest.raises(drlora.ConfigError, match=said):
        refuse_unfit_deepspeed(asked)


@pytest.mark.parametrize(
    "asked",
    [
        SimpleNamespace(torch_compile=True),
        SimpleNamespace(hf_deepspeed_config=None, torch_compile=True),
        arguments(compiled=True, zero_optimization={"stage": 2, "zero_hpz_partition_size": 1}),
        arguments(zero_optimization={"stage": 3, "mics_shard_size": -1}, expert_parallel={}),
    ],
)
def test_not_refused(asked):
    refuse_unfit_deepspeed(asked)


@pytest.mark.parametrize("stage", [2, 3])
def test_experts_in_few_bits_are_not_split(stage):
    """They are read whole; what is trained beside them is shared out by ZeRO-2 as well."""
    asked = arguments(zero_optimization={"stage": stage})
    base = make_model(hidden_size=64, intermediate_size=64)
    drlora.quantise_experts(base, "nf4")
    packed = get_peft_model(base, drlora.DrLoraConfig(router="frozen"))
    is_refused = pytest.raises(drlora.ConfigError, match="Set the stage to 2")
    with is_refused if stage == 3 else nullcontext():
        refuse_unfit_deepspeed(asked, packed)
    refuse_unfit_deepspeed(asked, get_peft_model(make_model(), drlora.DrLoraConfig()))


def test_a_recipe_with_experts_in_few_bits_may_not_ask_for_zero_3(tmp_path, monkeypatch):
    monkeypatch.setattr("drlora.runs.arguments.asks_for_zero_3", lambda arguments: True)
    settings = [f"output_dir={tmp_path / 'run'}", "training.use_cpu=true"]
    training_arguments(load_recipe("embedded", settings), RunDir(tmp_path / "run"))
    recipe = load_recipe("embedded", [*settings, "quantise.experts=nf4"])
    with pytest.raises(drlora.ConfigError, match="quantise.experts='nf4': ZeRO-3 would split"):
        training_arguments(recipe, RunDir(tmp_path / "run"))


def test_the_callback_asks(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={"expert_parallel": {"enabled": 1}})
    args, state, control = trainer.args, trainer.state, trainer.control
    callback = drlora.DrLoraCallback()
    with pytest.raises(drlora.ConfigError, match="expert_parallel"):
        callback.on_train_begin(args, state, control, model=trainer.model)
