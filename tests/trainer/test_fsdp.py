"""FSDP2 and spread experts (transformers' expert parallelism) end with the ranks and rows of DDP.

Two gloo processes do all runs one after the other, four a few more: most of the time is imports.
accelerate's FSDP2 goes through tests/accelerate_double.py.
"""

from __future__ import annotations

import math
import shutil
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_processes import CASES, CUT, STEPS
from new_process import finish, start_together
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model

import drlora

SCRIPT = str(Path(__file__).parents[1] / "fsdp_processes.py")


def run_processes(folder: Path, count: int, cases: list[str]) -> None:
    """The script in `count` processes, which must end well."""
    for rank, job in enumerate(start_processes(folder, count, cases)):
        finish(job, folder / f"printed-{rank}")


def start_processes(folder: Path, count: int, cases: list[str]) -> list[BaseProcess]:
    """It, as torchrun would start it."""
    printed = [folder / f"printed-{rank}" for rank in range(count)]
    return start_together([[SCRIPT, str(folder), *cases]] * count, printed)


@pytest.fixture(scope="module")
def two(once) -> Path:
    """All cases in two processes; DDP first, for FSDP's settings stay in the environment."""
    names = sorted(CASES, key=lambda name: CASES[name].engine in ("full", "sharded"))
    names = [name for name in names if not name.startswith(("killed", "hybrid"))]
    names = ["recipe-ddp", "recipe-dpo", "evaluated-first", *names, "own-loop", "recipe-fsdp"]
    return once("fsdp-two", lambda folder: run_processes(folder, 2, names))


@pytest.fixture(scope="module")
def four(once, request) -> Path:
    """Experts spread over two processes, twice: ep 2, efsdp 2. And what two processes began."""
    names = ["ep-olmoe", "hybrid-router", "own-loop", "sharded-resumed"]

    def run(folder: Path) -> None:
        shutil.copytree(of_two / "sharded", folder / "sharded")
        run_processes(folder, 4, names)

    of_two = request.getfixturevalue("two")
    return once("fsdp-four", run)


def found(folder: Path, name: str, processes: int = 2) -> dict[str, Any]:
    """What the first process found, which the others must have found too, to the bit."""
    first, *others = (torch.load(folder / f"{name}.{rank}") for rank in range(processes))
    for other in others:
        assert other["ranks"] == first["ranks"] and other["losses"] == first["losses"]
        for part in ("adapter", "state"):
            assert all(torch.equal(other[part][key], value) for key, value in first[part].items())
    return first


def test_drlora_train_runs_a_recipe(two):
    """Experts in four bits, measured before and after; ranks grew as under DDP."""
    run, same = (torch.load(two / f"recipe-fsdp.{rank}") for rank in range(2))
    wanted = torch.load(two / "recipe-ddp.0")
    assert run == same
    assert run["ranks"] == wanted["ranks"] and run["trained"] == wanted["trained"]
    before, after, again = run["losses"]
    assert [before, after] == pytest.approx(wanted["losses"], abs=1e-4) and after < before
    assert again == pytest.approx(after, abs=1e-6)


def test_drlora_train_learns_from_preferences(two):
    """Measured by their own loss before DDP has the model, which must not keep it from it."""
    run, same = (torch.load(two / f"recipe-dpo.{rank}") for rank in range(2))
    assert run == same
    before, after = run["objectives"]
    assert before == pytest.approx(math.log(2), abs=1e-6) and after < before
    assert (
        len({rank for of in run["ranks"].values() for ranks in of.values() for rank in ranks}) > 1
    )


def test_a_trainer_that_has_left_ddp_out_is_refused(two):
    """Plain LoRA trains on in it, a model of its own in each process."""
    for rank in range(2):
        said = torch.load(two / f"evaluated-first.{rank}")["said"]
        assert (
            "evaluate() or predict() was called before trainer.train()" in said
            and "eval_on_start=True" in said
        )


def assert_same_run(run: dict[str, Any], wanted: dict[str, Any], of_a: float = 1e-5) -> None:
    """The same ranks after every event; losses, norms, A and B within what rounding makes.

    `of_a` is that of A.
    """
    assert run["ranks"] == wanted["ranks"] and len(run["ranks"]) > 5
    assert run["budgets"] == wanted["budgets"]
    for key in ("losses", "norms", "drifts"):
        assert run[key] == pytest.approx(wanted[key], abs=2e-6), key
    assert all(norm > 0.04 for norm in run["norms"])  # so clipping was at work
    assert set(run["adapter"]) == set(wanted["adapter"])
    for key, value in wanted["adapter"].items():
        if value.is_floating_point():
            atol = of_a if "lora_A" in key else 1e-5
            torch.testing.assert_close(run["adapter"][key], value, rtol=0, atol=atol, msg=key)
    for key, value in wanted["state"].items():
        if key.endswith("importance"):
            torch.testing.assert_close(run["state"][key], value, rtol=1e-3, atol=1e-9, msg=key)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ep-olmoe", "ddp-olmoe"),
        ("ep-qwen3_moe", "ddp-qwen3_moe"),
        ("ep-gpt_oss", "ddp-gpt_oss"),
        ("ep-whole", "ddp-olmoe"),
        ("ep-router", "ddp-router"),
        ("loaded-router", "ddp-router"),
        ("ep-beside", "ddp-beside"),
        ("sharded-beside", "ddp-beside"),
        ("full", "ddp-router"),
        ("sharded", "ddp-olmoe"),
    ],
)
def test_what_the_trainer_makes_of_it_is_what_ddp_makes(two, name, wanted):
    """Accumulation, clipping, weight decay, ranks that move: spread experts with gradient
    checkpointing, biases and interleaving, and with LoRA on all linear layers beside them."""
    # Directions whose strengths are 4 % apart turn into each other by rounding: 2e-5 of a row.
    of_a = 1e-4 if "beside" in name else 1e-5
    assert_same_run(found(two, name), found(two, wanted), of_a)


def test_spread_experts_that_are_sharded_too(two, four):
    assert_same_run(found(four, "ep-olmoe", processes=4), found(two, "ddp-olmoe"))


def test_shards_in_groups_that_each_hold_all(two, four):
    """HSDP, with trained routers."""
    assert_same_run(found(four, "hybrid-router", processes=4), found(two, "ddp-router"))


@pytest.mark.parametrize("name", ["full", "sharded", "bf16"])
def test_fsdp2_resumes_to_the_bit(two, name):
    """bf16 with a router that is trained."""
    straight, resumed = found(two, name), found(two, f"{name}-resumed")
    assert resumed["ranks"] == straight["ranks"][-len(resumed["ranks"]) :]
    assert resumed["losses"][-(STEPS - CUT) :] == straight["losses"][-(STEPS - CUT) :]
    for part in ("adapter", "state"):
        for key, value in straight[part].items():
            assert torch.equal(resumed[part][key], value), key


def test_fsdp2_goes_on_in_more_processes(two, four):
    """What two began, four end: the same ranks, A and B."""
    straight, resumed = found(two, "sharded"), found(four, "sharded-resumed", processes=4)
    assert resumed["ranks"] == straight["ranks"][-len(resumed["ranks"]) :]
    assert len(resumed["ranks"]) > 1
    for key, value in straight["adapter"].items():
        torch.testing.assert_close(resumed["adapter"][key], value, rtol=0, atol=1e-5, msg=key)


def test_a_process_that_is_killed_ends_the_others_and_the_run_resumes(two, tmp_path):
    """In the middle of a step, two steps after a checkpoint."""
    jobs = start_processes(tmp_path, 2, ["killed"])
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [1, 9]
    # What gloo says differs with the moment, but for this.
    assert "logs of the remote worker" in (tmp_path / "printed-0").read_text("utf-8")
    run_processes(tmp_path, 2, ["killed-resumed"])
    resumed, wanted = found(tmp_path, "killed-resumed"), found(two, "sharded")
    assert all(torch.equal(resumed["adapter"][key], v) for key, v in wanted["adapter"].items())


@pytest.mark.parametrize("name", ["ep-olmoe", "loaded-router", "full", "bf16"])
def test_free_rows_are_zero_and_the_budget_is_exact(two, name):
    run = found(two, name)
    assert all(owned <= stored for owned, stored in run["budgets"])
    assert run["budgets"][-1][0] == run["budgets"][-1][1]
    for moment in (0, -1):
        pools = [ranks for block in run["ranks"][moment].values() for ranks in block.values()]
        assert sum(map(sum, pools)) == run["budgets"][moment][0]
    for key, owner_R in run["adapter"].items():
        if key.endswith("owner"):
            b_RO = run["adapter"][key.replace("owner", "lora_B")]
            assert (b_RO[owner_R < 0] == 0).all()


def test_files_of_spread_experts_are_complete(two):
    """What the Trainer saved of the run loads in one process, with the rows of the run."""
    folder = two / "ep-olmoe"
    for step, is_full in ((CUT, False), (STEPS, True)):
        saved = load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
        owners = {key: owner_R for key, owner_R in saved.items() if key.endswith("owner")}
        assert len(owners) == 4 and all((o >= 0).all() == is_full for o in owners.values())
        for key, owner_R in owners.items():
            assert (saved[key.replace("owner", "lora_B")][owner_R < 0] == 0).all()
    model = PeftModel.from_pretrained(make_model("olmoe"), folder / f"checkpoint-{STEPS}")
    run = found(two, "ep-olmoe")
    for key, value in drlora.adapter_state(model).items():
        assert torch.equal(value, run["adapter"][key]), key


@pytest.fixture(params=[2, 4])
def own_loop(request) -> dict[str, Any]:
    """What the loops of two and of four processes found."""
    folder = request.getfixturevalue({2: "two", 4: "four"}[request.param])
    return torch.load(folder / "own-loop.0")


def test_a_loop_of_ones_own_on_spread_experts(own_loop):
    """It trains what one process does, and its adapter loads in one process and in several."""
    assert own_loop["experts held"] == 3
    one, spread = own_loop["history"]
    assert one == spread and len(one) > 5
    assert own_loop["trained"] < 1e-5 and own_loop["probed"] < 1e-5
    assert own_loop["loaded spread"] == 0
    for key in ("logits", "without adapter", "loaded alone"):
        assert own_loop[key] < 2e-6, key


def test_experts_without_tokens_and_processes_without_rows(own_loop):
    """Nothing hangs, and gradients are those of one process."""
    assert own_loop["tokens of the second"] == 0
    assert own_loop["no token"] < 1e-6 and own_loop["no row"] < 1e-6


def test_what_spread_experts_cannot_do_is_said(own_loop):
    merged, unloaded, low_memory, head, *parallel = own_loop["said"]
    for said in (merged, unloaded):
        assert "layers.0.mlp.experts: it is expert-parallel" in said and "one process" in said
    assert "low_cpu_mem_usage=True" in low_memory
    assert "modules_to_save names lm_head" in head and "load the model whole" in head
    assert all("tp_size=2" in said for said in parallel)
    assert own_loop["left behind"] == "transformers.distributed.expert_parallel"


def test_collectives_are_those_that_the_page_says(own_loop):
    """One more of each kind for a pool, two for growth; tokens travel as without an adapter."""
    pools, routers = 4, 2
    counts, frozen = own_loop["collectives"], own_loop["collectives"]["frozen forward"]
    assert counts["forward"] == frozen | {
        "allgather_base": frozen["allgather_base"] + pools + routers
    }
    assert counts["backward"]["reduce_scatter_base"] == pools + routers
    assert counts["backward"]["allgather_base"] <= frozen["allgather_base"] + pools + routers
    assert counts["backward"]["all_to_all_single"] <= frozen["all_to_all_single"]
    assert counts["dynamics"] == {"allreduce": 2}
    blocks, experts, rows = 2, 6, 6 * 6
    assert counts["numbers summed"] == [blocks * (experts + 1), pools * rows]
    assert counts["agreement"] == {"allgather": 1}
    # A and B of every pool, trained routers, and nothing of the base model.
    assert counts["save"] == {"all_gather_into_tensor": 2 * pools + routers}
