"""Two gloo processes under DDP and FSDP2 train what one process does, and `drlora train` in two.

What FSDP2 does under the Trainer is not here: accelerate takes it up on accelerators only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from new_process import finish, start_python, start_together
from safetensors.torch import load_file
from tiny_run import save_all
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer
from two_processes import CUT, ROWS, SHORT, TOTAL, Job

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(once) -> Path:
    """What one process and two have left."""

    def make(folder: Path) -> None:
        one = Job().go(CUT).save(folder / f"one-{CUT}")
        printed = [folder / f"printed-{rank}" for rank in range(2)]
        script = str(HERE / "two_processes.py")
        jobs = [start_python([script, str(folder), str(r)], printed[r]) for r in range(2)]
        torch.save(one.go(TOTAL).result(), folder / "one")
        for job, file in zip(jobs, printed, strict=True):
            finish(job, file)

    return once("many-processes", make)


def both(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What process 0 found, which process 1 must have found too, to the bit."""
    first, second = (load_file(folder / f"{name}.{rank}") for rank in range(2))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    return first


def assert_close(found, wanted, last=None):
    """Losses of the `last` steps, and ranks and statistics after each event that `found` has."""
    assert set(found) <= set(wanted)
    assert len([key for key in found if key.endswith(".frequency")]) >= 4
    losses = wanted["losses"][-last:] if last else wanted["losses"]
    torch.testing.assert_close(found["losses"], losses, rtol=1e-4, atol=1e-4)
    for key, value in found.items():
        if key.endswith("owner"):
            assert torch.equal(value, wanted[key]), key
        elif key.endswith((".frequency", ".importance")):
            torch.testing.assert_close(value, wanted[key], rtol=2e-2, atol=1e-6, msg=key)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(folder, engine):
    """200 steps with nine events: losses, ranks, statistics."""
    assert_close(both(folder, engine), torch.load(folder / "one", weights_only=True))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_checkpoint_of_two_goes_on_in_one(folder, engine):
    job = Job(start=folder / f"{engine}-{CUT}")
    assert job.dynamics.step == CUT
    assert_close(job.go(TOTAL).result(), both(folder, engine), last=TOTAL - CUT)


def test_a_checkpoint_of_one_goes_on_in_two(folder):
    wanted = torch.load(folder / "one", weights_only=True)
    assert_close(both(folder, "resumed"), wanted, last=TOTAL - CUT)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_free_rows_stay_inert(folder, engine):
    saved = load_file(folder / f"{engine}-{CUT}" / "adapter_model.safetensors")
    moments = torch.load(folder / f"{engine}-{CUT}" / "optimizer.pt", weights_only=True)["state"]
    owners = {key.removesuffix("owner"): o for key, o in saved.items() if key.endswith("owner")}
    assert owners and all((owner_R < 0).any() for owner_R in owners.values())
    for pool, owner_R in owners.items():
        free = owner_R < 0
        assert (saved[f"{pool}lora_B"][free] == 0).all()
        assert (saved[f"{pool}lora_B"][~free] != 0).any()
        of_pool = [
            state
            for key, state in moments.items()
            if key.replace("drlora_adapters.default.", "drlora_adapters.").startswith(pool)
        ]
        assert len(of_pool) == 2
        for state in of_pool:
            assert (state["exp_avg"][free] == 0).all() and (state["exp_avg_sq"][free] == 0).all()


def test_rows_that_are_written_singly_are_found_in_their_shard(folder):
    """Inherited moments, directions of the gradient, released and redrawn rows under FSDP2."""
    wanted = Job(total=SHORT, **ROWS).go(SHORT).result()
    found = both(folder, "rows")
    assert_close(found, wanted)
    for key in found:
        if key.startswith("final") and "lora_" in key:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-4, msg=key)


def test_processes_that_come_apart_are_stopped(folder):
    said = [(folder / f"said.{rank}").read_text().splitlines() for rank in range(2)]
    assert said[0] == said[1] and len(said[0]) == 3
    for text, step, part in zip(
        said[0], (1, 6, 6), ("seeds of rows", "routing statistics", "ranks"), strict=True
    ):
        assert f"step {step}: processes [1] differ from process 0 in" in text and part in text


def in_two_processes(folder: Path, *arguments: str) -> list[Path]:
    """`drlora ARGUMENTS` as torchrun and accelerate launch start it; the files with its output."""
    printed = [folder / f"printed-{rank}" for rank in range(2)]
    jobs = start_together([["-m", "drlora", *arguments]] * 2, printed)
    for job, file in zip(jobs, printed, strict=True):
        finish(job, file)
    return printed


def test_drlora_train_in_two_processes_writes_once(tmp_path):
    """One lock, one log, one result; then resumed, with the same end."""
    recipe = save_all(tmp_path, training={"per_device_train_batch_size": 2})
    printed = in_two_processes(tmp_path, "train", str(recipe))
    run = tmp_path / "run"
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "grad_norm" in e] == list(range(1, 13))
    assert [e["kind"] for e in entries if e["kind"] in ("before", "after")] == ["before", "after"]
    result = json.loads((run / "result.json").read_text())
    assert result["budget"]["spent"] == result["budget"]["stored"]
    grants = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    keys = [(g["step"], g["block"], g["projection"], g["expert"]) for g in grants]
    assert len(keys) == len(set(keys)) > 0
    assert {p.name for p in (run / "checkpoints" / "checkpoint-12").glob("rng*")} == {
        "rng_state_0.pth", "rng_state_1.pth"}  # fmt: skip
    assert "before:" in printed[0].read_text() and "before:" not in printed[1].read_text()
    assert not (run / ".lock").exists()

    straight = load_file(run / "adapter_model.safetensors")
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    (run / "adapter_model.safetensors").unlink()
    (run / "result.json").unlink()
    in_two_processes(tmp_path, "train", str(recipe), "--resume")
    again = load_file(run / "adapter_model.safetensors")
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    of_steps = [
        json.loads(line)["step"] for line in (run / "growth.jsonl").read_text().splitlines()
    ]
    assert of_steps == [grant["step"] for grant in grants]


def test_the_page_of_many_processes(tmp_path, monkeypatch):
    """accelerate takes its configurations, and its table is the script's (one model looked at)."""
    monkeypatch.syspath_prepend(HERE.parent / "tools")
    import make_memory

    page = make_memory.PAGE.read_text("utf-8")
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    processes = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        config = load_config_from_file(str(path))
        assert config.to_dict().items() >= yaml.safe_load(block).items()
        processes.append(config.num_processes)
    assert processes == [1, 8, 8, 64]
    sharded = yaml.safe_load(blocks[-1])["fsdp_config"]
    for name, value in sharded.items():
        monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and not plugin.cpu_ram_efficient_loading
    assert sharded["fsdp_transformer_layer_cls_to_wrap"] == Qwen3MoeDecoderLayer.__name__
    shown = page.split(make_memory.BEGIN)[1].split(make_memory.END)[0].splitlines()
    assert set(make_memory.table("OLMoE-1B-7B").splitlines()) <= set(shown)
