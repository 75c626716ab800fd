"""ZeRO-1, 2 and 3 in two gloo processes train what DDP trains: ranks, weights, files, resumed runs.

Run: make test-engines. Skipped where DeepSpeed is not installed. Two pairs of processes run all
configurations (engine_processes). What it cannot show: NCCL, GPUs, DeepSpeed's own Adam, float16.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from new_process import finish, start_together
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model

import drlora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

HERE = Path(__file__).parents[1]
STEPS, CUT, CLIP = 18, 9, 0.04
RUNS = ["ddp", "z1", "z2", "z3", "z3-persistent", "z3-init", "z2-offload", "z2-bf16", "z3-bf16",
        "ddp-router", "z2-router", "z3-router-init", "ddp-rows", "z2-rows", "z3-rows",
        "ddp-probed", "z2-probed", "z3-probed", "ddp-placed", "z1-placed", "z2-placed",
        "z3-placed", "z2-placed-checkpointed", "z3-placed-checkpointed-init", "z2-placed-bf16",
        "z3-placed-bf16", "ddp-beside", "z2-beside", "z3-beside", "ddp-routed",
        "z2-routed", "z3-routed", "ddp-mixtral", "z3-mixtral", "ddp-mixtral-router",
        "z3-mixtral-router-checkpointed-init", "ddp-gpt_oss", "z3-gpt_oss"]  # fmt: skip
LOOPS = ["loop", "loop-z2", "loop-z3", "loop-placed", "loop-placed-z2", "loop-placed-z3"]
RECIPES = ["train-ddp", "train-packed-ddp", "train-dpo-ddp", "train-placed-dpo-ddp",
           "train-z2", "train-z3", "train-packed-z3", "train-dpo-z3",
           "train-placed-dpo-z3"]  # fmt: skip
TWINS = {
    "z1": "ddp", "z2": "ddp", "z3": "ddp", "z3-persistent": "ddp", "z3-init": "ddp",
    "z2-offload": "ddp", "z2-router": "ddp-router", "z3-router-init": "ddp-router",
    "z2-rows": "ddp-rows", "z3-rows": "ddp-rows", "loop-z2": "loop", "loop-z3": "loop",
    "z3-bf16": "z2-bf16", "z3-placed-bf16": "z2-placed-bf16",
    "z2-probed": "ddp-probed", "z3-probed": "ddp-probed",
    "z1-placed": "ddp-placed", "z2-placed": "ddp-placed", "z3-placed": "ddp-placed",
    "z2-placed-checkpointed": "ddp-placed", "z3-placed-checkpointed-init": "ddp-placed",
    "z2-beside": "ddp-beside", "z3-beside": "ddp-beside",
    "loop-placed-z2": "loop-placed", "loop-placed-z3": "loop-placed",
    "z2-routed": "ddp-routed", "z3-routed": "ddp-routed", "z3-mixtral": "ddp-mixtral",
    "z3-mixtral-router-checkpointed-init": "ddp-mixtral-router", "z3-gpt_oss": "ddp-gpt_oss",
}  # fmt: skip
RESUMED = ["z2", "z3", "z3-init", "z2-offload", "z2-bf16", "z3-bf16", "z2-router", "z3-placed"]


@pytest.fixture(scope="module")
def folder(once) -> Path:
    """What two processes have left."""

    def make(folder: Path) -> None:
        script = str(HERE / "engine_processes.py")
        for runs in ([*RUNS, *LOOPS], RECIPES):
            printed = [folder / f"printed-{runs[0]}-{rank}" for rank in range(2)]
            commands = [[script, str(folder), str(rank), *runs] for rank in range(2)]
            jobs = start_together(commands, printed, DS_ACCELERATOR="cpu")
            for job, file in zip(jobs, printed, strict=True):
                finish(job, file, timeout=540)
            (folder / "meet").unlink(missing_ok=True)

    return once("deepspeed", make)


def result(folder: Path, name: str) -> dict[str, Any]:
    """What process 0 found, which process 1 must have found too, to the bit."""
    first, second = (torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in range(2))
    for part in ("history", "final"):
        assert set(first[part]) == set(second[part]) and first[part]
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    assert first["budgets"] == second["budgets"]
    return first


def file_of(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / name / f"checkpoint-{step}" / "adapter_model.safetensors")


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_zero_trains_what_data_parallelism_does(folder, name, twin):
    """Ranks after every change to the bit; A, B, routers and statistics within rounding."""
    found, wanted = result(folder, name), result(folder, twin)
    owners = [key for key in wanted["history"] if key.endswith("owner")]
    assert len({key.split()[0] for key in owners}) >= 5
    assert set(found["history"]) == set(wanted["history"])
    for key, value in wanted["history"].items():
        if key in owners or key.endswith(("birth", "seed", "step")):
            assert torch.equal(found["history"][key], value), key
        else:
            torch.testing.assert_close(
                found["history"][key], value, rtol=1e-4, atol=1e-9, check_dtype=False, msg=key
            )
    assert set(found["final"]) == set(wanted["final"])
    for key, value in wanted["final"].items():
        torch.testing.assert_close(found["final"][key], value, rtol=0, atol=1e-5, msg=key)
    assert any(value.abs().max() > 1e-3 for k, value in wanted["final"].items() if "lora_B" in k)


def test_a_model_that_was_loaded_in_parts_trains_as_one_that_was_split_later(folder):
    """zero.Init changes nothing, to the bit."""
    early, late = result(folder, "z3-init"), result(folder, "z3")
    assert torch.equal(early["losses"], late["losses"])
    assert all(torch.equal(early["final"][key], value) for key, value in late["final"].items())


@pytest.mark.parametrize("name", RUNS)
def test_the_runs_are_what_they_are_meant_to_be(folder, name):
    """Clipped in every step, all of the budget spent, ranks moved."""
    found = result(folder, name)
    assert len(found["losses"]) == STEPS and (found["norms"] > CLIP).all()
    owned = [owned for owned, _ in found["budgets"]]
    assert owned == sorted(owned) and len(owned) >= 5
    rows = 48 if "mixtral" in name else 72  # of 4 and 6 experts
    assert all(stored == rows for _, stored in found["budgets"]) and owned[-1] == rows


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_straight_one_to_the_bit(folder, name):
    straight, resumed = result(folder, name), result(folder, f"{name}-resumed")
    assert torch.equal(straight["losses"][CUT:], resumed["losses"][CUT:])
    shared = set(straight["history"]) & set(resumed["history"])
    assert len({key.split()[0] for key in shared}) >= 2
    for part, keys in (("history", shared), ("final", set(straight["final"]))):
        assert all(torch.equal(straight[part][key], resumed[part][key]) for key in keys)


@pytest.mark.parametrize("name", [name for name in RUNS if "router" in name])
def test_a_trained_router_stands_still_in_the_warmup(folder, name):
    """Weight decay and the shared count of steps do not reach it."""
    moved = result(folder, name)["routers"]
    assert moved[:6] == [0.0] * 6 and moved[6] > 1e-3


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("ddp")])
def test_the_file_holds_the_weights_as_they_are_trained(folder, name):
    final, saved = result(folder, name)["final"], file_of(folder, name, STEPS)
    names = {key: key.replace(".default.", ".") for key in final if "modules_to_save" not in key}
    assert len(names) >= 13 and set(names.values()) <= set(saved)
    for key, own in names.items():
        assert torch.equal(saved[own], final[key]), key
    weights = {k: value for k, value in saved.items() if k.endswith(("lora_A", "lora_B"))}
    assert weights and all(value.dtype == torch.float32 for value in weights.values())
    rounded = [torch.equal(value, value.bfloat16().float()) for value in weights.values()]
    assert not any(rounded)


@pytest.mark.parametrize("name", ["z2", "z3", "z3-persistent", "z3-bf16", "z2-rows"])
def test_free_rows_stay_inert(folder, name):
    saved = file_of(folder, name, CUT)
    pools = [key.removesuffix("owner") for key in saved if key.endswith("owner")]
    assert len(pools) == 2
    for pool in pools:
        free_R = saved[f"{pool}owner"] < 0
        assert free_R.any() and (saved[f"{pool}lora_B"][free_R] == 0).all()
        assert (saved[f"{pool}lora_B"][~free_R] != 0).any()


@pytest.mark.parametrize("name", ["z3", "z3-bf16", "z2-router"])
def test_the_adapter_loads_in_one_ordinary_process(folder, name):
    final = result(folder, name)["final"]
    model = PeftModel.from_pretrained(
        make_model(num_hidden_layers=1), folder / name / f"checkpoint-{STEPS}"
    )
    assert isinstance(model.peft_config["default"], drlora.DrLoraConfig)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in final.items())


@pytest.mark.parametrize("kind", ["straight", "over", "resumed"])
@pytest.mark.parametrize("name", ["train-z2", "train-z3"])
def test_drlora_train_runs_a_recipe(folder, name, kind):
    """From the measurement before to the one after; `over` had only to be measured again."""
    first, second = (
        torch.load(folder / f"{name}-{kind}.{rank}", weights_only=True) for rank in range(2)
    )
    assert first == second
    assert first == torch.load(folder / f"{name}-straight.0", weights_only=True)
    wanted = torch.load(folder / "train-ddp-straight.0", weights_only=True)
    assert first["ranks"] == wanted["ranks"] and first["trained"] == wanted["trained"]
    assert first["before"] == pytest.approx(wanted["before"], abs=1e-5)
    assert first["after"] == pytest.approx(wanted["after"], abs=1e-4)
    assert first["after"] < first["before"] - 1


@pytest.mark.parametrize("what", ["packed", "dpo", "placed-dpo"])
def test_drlora_train_does_under_zero_3_what_else_it_does(folder, what):
    """Documents in packed rows attend apart; preferences are measured by their own loss.

    Under DDP they attend by another way of the same attention (`drlora.trainer.documents`).
    """
    first, second, wanted = (
        torch.load(folder / f"train-{what}-{name}", weights_only=True)
        for name in ("z3-straight.0", "z3-straight.1", "ddp-straight.0")
    )
    assert first == second and first["ranks"] == wanted["ranks"]
    for key in ("before", "after", "objective"):
        assert first[key] == (pytest.approx(wanted[key], abs=5e-4) if wanted[key] else None)


@pytest.mark.parametrize("name", ["z1", "z2", "z3", "z3-init", "z2-offload"])
def test_importances_cost_one_all_reduce_a_step(folder, name):
    """Of two float32 a row, for all pools together."""
    assert result(folder, name)["sums"] == STEPS
    assert os.path.exists(folder / f"{name}.1")
