"""A Trainer of a tiny adapted model."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import (
    make_batch,
    make_model,
)
from transformers import (
    Trainer,
    TrainingArguments,
)

import drlora

STEPS = 8  # growth after steps 3, 5 and 7


SETTINGS = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=1,
                settle_steps=1, lora_alpha=8.0)  # fmt: skip


ROWS = [{k: v[0] for k, v in make_batch(seed, rows=1).items()} for seed in range(32)]


def make_trainer(folder, *, base=None, model=None, callbacks=(), settings=None, **arguments):
    torch.manual_seed(0)
    config = drlora.DrLoraConfig(**{**SETTINGS, **(settings or {})})
    defaults = dict(
        max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=1,
        logging_steps=1, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, seed=5,
    )  # fmt: skip
    return Trainer(
        model or get_peft_model(base or make_model(), config),
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=Dataset.from_list(ROWS),
        callbacks=[drlora.DrLoraCallback(), *callbacks],
    )


def callback_of(trainer):
    (found,) = (
        c for c in trainer.callback_handler.callbacks if isinstance(c, drlora.DrLoraCallback)
    )
    return found


def dynamics_of(trainer):
    return callback_of(trainer).dynamics
