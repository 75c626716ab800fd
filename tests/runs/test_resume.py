"""Laws 8 and 9: 2N steps equal N steps, a new process, N steps; and a seed gives one result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import resume_run
import torch
from new_process import run_python
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import make_batch, make_model, plain_loop, trainable

import drlora

HERE = Path(__file__).parents[1]
RUNS = {"plain": resume_run.plain, "trainer": resume_run.trainer}


def in_new_process(kind, folder, start, stop):
    script = str(HERE / "resume_run.py")
    run_python([script, kind, str(folder), str(start), str(stop)], folder / "printed.txt")


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_cut_in_two_equals_a_straight_one_to_the_bit(tmp_path, kind):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    straight.mkdir()
    cut.mkdir()
    RUNS[kind](straight, 0, 24)
    RUNS[kind](cut, 0, 13)
    in_new_process(kind, cut, 13, 24)
    wanted = load_file(straight / "adapter_model.safetensors")
    got = load_file(cut / "adapter_model.safetensors")
    assert set(got) == set(wanted)
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key
    births = {int(b) for k in wanted if k.endswith("birth") for b in wanted[k]}
    assert {6, 10} < births and {14, 18, 22} < births, "growth on both sides of the cut"
    if kind == "trainer":
        assert (straight / "growth.jsonl").read_text() == (cut / "growth.jsonl").read_text()
        one, other = (
            json.loads((folder / "checkpoint-24" / "trainer_state.json").read_text())
            for folder in (straight, cut)
        )
        losses = [[e["loss"] for e in s["log_history"] if "loss" in e] for s in (one, other)]
        assert len(losses[0]) == 24 and losses[0] == losses[1]


def test_the_trainer_saves_the_adapter_and_not_the_base(tmp_path):
    resume_run.trainer(tmp_path, 0, 13)
    checkpoint = tmp_path / "checkpoint-13"
    keys = load_file(checkpoint / "adapter_model.safetensors")
    assert keys and all(".drlora_adapters." in key or ".mlp.gate." in key for key in keys)
    assert not list(checkpoint.glob("model*.safetensors"))


def test_lines_of_a_lost_stretch_are_not_written_twice(tmp_path):
    """A crash after the checkpoint leaves grants in the log that the resumed run makes again."""
    resume_run.trainer(tmp_path, 0, 24)
    wanted = (tmp_path / "growth.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoint-24")
    with (tmp_path / "growth.jsonl").open("a") as log:
        log.write('{"step": 22, "blo')
    resume_run.trainer(tmp_path, 13, 24)
    assert (tmp_path / "growth.jsonl").read_text() == wanted


def test_a_fixed_seed_gives_the_same_ranks_and_losses_twice():
    def run():
        torch.manual_seed(3)
        config = drlora.DrLoraConfig(**resume_run.SETTINGS)
        model = get_peft_model(make_model(), config)
        dynamics = drlora.RankDynamics(model, 24)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return plain_loop(model, dynamics, optimizer, range(24)), dynamics.ranks()

    assert run() == run()


def test_a_state_of_another_adapter_is_refused():
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**resume_run.SETTINGS))
    dynamics = drlora.RankDynamics(model, 24)
    state = dynamics.state_dict()
    with pytest.raises(drlora.CheckpointError, match="another adapter"):
        dynamics.load_state_dict({k: v for k, v in state.items() if "frequency" not in k})
    wrong = {**state, "model.layers.0.mlp.frequency": torch.zeros(3)}
    with pytest.raises(drlora.CheckpointError, match=r"shape \(3,\)"):
        dynamics.load_state_dict(wrong)


def test_accelerate(tmp_path):
    """The plain loop under accelerate: prepare, accumulate, clip, save_state and load_state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**resume_run.SETTINGS))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    dynamics = drlora.RankDynamics(accelerator.unwrap_model(model), 24)
    for step in range(48):
        with accelerator.accumulate(model):
            accelerator.backward(model.train()(**make_batch(step)).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                dynamics.before_optimizer_step()
            optimizer.step()
            if accelerator.sync_gradients:
                dynamics.after_optimizer_step(optimizer)
            optimizer.zero_grad()
        if step == 23:
            accelerator.save_state(str(tmp_path))
    assert dynamics.step == 24 and dynamics.budget()[0] == dynamics.budget()[1]
    ranks = dynamics.ranks()
    accelerator.load_state(str(tmp_path))
    assert dynamics.ranks() != ranks, "the ranks are part of the model's state"
