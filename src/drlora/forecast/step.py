"""One step of training on paper, or one pass that is only measured.

model = adapted_on_paper(skeleton, config, torch.bfloat16)
found = pass_on_paper(model, Batch(4, 512), torch.bfloat16)
found.peak_bytes, found.work
"""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from drlora.config.adapter import DrLoraConfig
from drlora.forecast.counting import Counting, Work
from drlora.forecast.stand_ins import on_paper


@dataclass(frozen=True)
class Batch:
    """Examples at once, all as long as the longest.

    Attributes:
        examples: rows.
        length: tokens of each, padding included.
        checkpoints: whether layers are computed again in the backward pass.
        fuses_head: whether the loss is formed in the LM head, without all logits (on a GPU).
        autocast: dtype of products, where it is not that of the weights.
    """

    examples: int
    length: int
    checkpoints: bool = False
    fuses_head: bool = False
    autocast: torch.dtype | None = None

    @property
    def tokens(self) -> int:
        """Of it, padding included."""
        return self.examples * self.length


@dataclass(frozen=True)
class PassOnPaper:
    """What a pass takes beside the weights.

    Attributes:
        kept_bytes: between the forward and the backward pass.
        peak_bytes: most at once, gradients of what is trained among them.
        work: what is computed.
    """

    kept_bytes: int
    peak_bytes: int
    work: Work


def adapted_on_paper(skeleton: nn.Module, config: DrLoraConfig, dtype: torch.dtype) -> PeftModel:
    """The model with an adapter, without memory for either; `skeleton` is used up.

    Args:
        skeleton: on the device `meta`.
        config: of the adapter.
        dtype: of the weights.
    """
    skeleton.to(dtype)
    model = get_peft_model(skeleton, copy.deepcopy(config), low_cpu_mem_usage=True)
    assert isinstance(model, PeftModel)
    return model


def pass_on_paper(
    model: PeftModel, batch: Batch, dtype: torch.dtype, trains: bool = True
) -> PassOnPaper:
    """Run the model on a batch, forwards and backwards.

    Args:
        model: on the device `meta`, with an adapter.
        batch: of tokens.
        dtype: that experts compute in.
        trains: whether there is a backward pass.

    Raises:
        RuntimeError: what a model says that cannot run without numbers.
    """
    model.train(trains)
    if batch.checkpoints and trains:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    counting = Counting()
    counting.ignore([*model.parameters(), *model.buffers()])
    cast = torch.autocast("cpu", batch.autocast) if batch.autocast else nullcontext()
    with counting, on_paper(model, counting, dtype), torch.set_grad_enabled(trains), cast:
        ids_BL = torch.zeros(batch.examples, batch.length, dtype=torch.int64, device="meta")
        given: dict[str, Any] = {"labels": ids_BL}
        if batch.fuses_head:
            given = {"logits_to_keep": 1}
        out = model(input_ids=ids_BL, use_cache=False, **given)
        loss = out.logits.float().sum() if batch.fuses_head else out.loss
        del out
        kept = counting.bytes
        if trains:
            loss.backward()
    model.zero_grad()
    return PassOnPaper(kept, counting.peak_bytes, counting.work)
