"""A tiny model with a trained adapter, for tests of what is done with adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_model, plain_loop, trainable

import drlora

SETTINGS: dict[str, Any] = dict(
    r_init=2,
    r_target=4,
    r_max=8,
    p_grow=0.5,
    grow_every=2,
    warmup_steps=1,
    settle_steps=1,
    lora_alpha=8.0,
)


def make_settings(**changes: Any) -> drlora.DrLoraConfig:
    """A config for a run of 8 steps in which ranks grow three times."""
    return drlora.DrLoraConfig(**{**SETTINGS, **changes})


def train(model: PeftModel, lr: float = 2e-2, steps: int = 8, **which: Any) -> PeftModel:
    """Eight steps, with growth; `which` names the adapter."""
    dynamics = drlora.RankDynamics(model, total_steps=8, step=0, **which)
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=lr), range(steps))
    dynamics.release()
    return model.eval()


def trained(family: str = "olmoe", base: Any = None, **changes: Any) -> PeftModel:
    """A model with a trained adapter called `default`."""
    model = get_peft_model(base or make_model(family), make_settings(**changes))
    assert isinstance(model, PeftModel)
    return train(model)


def logits(model: torch.nn.Module, seed: int = 7) -> torch.Tensor:
    """What the model says of a fixed batch, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**make_batch(seed)).logits
