"""What is asked of DeepSpeed and ranks cannot grow with is refused before the first step, by name.

DeepSpeed is not needed: its configuration is a dictionary, as the Trainer has read it.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_trainer import make_trainer
from transformers import TrainingArguments

import drlora
from drlora.runs.arguments import _refuse_arguments
from drlora.trainer.deepspeed import refuse_unfit_deepspeed
from drlora.trainer.objectives import OwnSettings


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


def test_a_recipe_may_not_ask_for_zero_3(tmp_path):
    """A run measures its model outside of the engine."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to=[])
    for is_stage_3 in (False, True):
        arguments.hf_deepspeed_config = SimpleNamespace(is_zero3=lambda asked=is_stage_3: asked)
        with pytest.raises(drlora.ConfigError) if is_stage_3 else nullcontext() as said:
            _refuse_arguments(arguments, OwnSettings.of({}))
    assert "asks for ZeRO-3" in str(said.value) and "Set the stage to 2" in str(said.value)


def test_the_callback_asks(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={"expert_parallel": {"enabled": 1}})
    args, state, control = trainer.args, trainer.state, trainer.control
    callback = drlora.DrLoraCallback()
    with pytest.raises(drlora.ConfigError, match="expert_parallel"):
        callback.on_train_begin(args, state, control, model=trainer.model)
