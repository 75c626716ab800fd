"""A training run that can be cut in two: `python resume_run.py plain|trainer FOLDER FROM TO`.

Used by test_resume, which calls it in this process and in new ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model, plain_loop, trainable
from transformers import Trainer, TrainingArguments

import drlora

TOTAL = 24  # growth after steps 6, 10, 14, 18 and 22
SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=4, warmup_steps=2,
                settle_steps=1, lora_alpha=8.0, lora_dropout=0.1, router="train",
                options={"young_a": "probe"})  # fmt: skip


def plain(folder: Path, start: int, stop: int) -> list[float]:
    """The plain loop; saves adapter, optimizer, dynamics and generator at the end."""
    torch.manual_seed(start)
    if start:
        model = PeftModel.from_pretrained(make_model(), folder, is_trainable=True)
    else:
        model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    dynamics = drlora.RankDynamics(model, TOTAL)
    if start:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        dynamics.load_state_dict(load_file(folder / "dynamics.safetensors"))
        torch.set_rng_state(load_file(folder / "rng.safetensors")["cpu"])
    losses = plain_loop(model, dynamics, optimizer, range(start, stop))
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    save_file(dynamics.state_dict(), folder / "dynamics.safetensors")
    save_file({"cpu": torch.get_rng_state()}, folder / "rng.safetensors")
    return losses


def trainer(folder: Path, start: int, stop: int) -> list[float]:
    """The Trainer; stops after step `stop` and resumes from its own checkpoint of step `start`."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS))
    rows = [{k: v[0] for k, v in make_batch(seed, rows=1).items()} for seed in range(64)]
    arguments = TrainingArguments(
        str(folder), max_steps=TOTAL, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=2, warmup_steps=2, logging_steps=1, save_steps=13,
        save_strategy="steps", report_to=[], use_cpu=True, disable_tqdm=True, seed=5,
    )  # fmt: skip
    job = Trainer(model, arguments, train_dataset=Dataset.from_list(rows),
                  callbacks=[drlora.DrLoraCallback(), _StopAfter(stop)])  # fmt: skip
    job.train(resume_from_checkpoint=str(folder / f"checkpoint-{start}") if start else None)
    job.save_model(str(folder))
    return [entry["loss"] for entry in job.state.log_history if "loss" in entry]


class _StopAfter(drlora.DrLoraCallback.__mro__[1]):  # transformers' TrainerCallback
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = (
            control.should_training_stop or state.global_step >= self.step
        )
        return control


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, folder, start, stop = sys.argv[1:]
    {"plain": plain, "trainer": trainer}[kind](Path(folder), int(start), int(stop))
