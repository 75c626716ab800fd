"""One step of training on paper, or one pass that is only measured.

model = adapted_on_paper(skeleton, config, torch.bfloat16)
found = pass_on_paper(model, Batch(4, 512), torch.bfloat16)
found.peak_bytes, found.work
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from drlora.config.adapter import DrLoraConfig
from drlora.forecast.counting import Counting, Work
from drlora.forecast.stand_ins import on_paper

# Layers that are run of a model with more: four repeat whatever pattern layers follow.
LAYERS = (4, 8)


@dataclass(frozen=True)
class Batch:
    """Examples at once, all as long as the longest.

    Attributes:
        examples: rows.
        length: tokens of each, padding included.
        checkpoints: whether layers are computed again in the backward pass.
        fuses_head: whether the loss is formed in the LM head, without all logits.
        head_chunk_bytes: of logits in float32 that are formed at once, where it is; 0 where kernels
            form it.
        engine: of experts: `loop` on a CPU, `grouped` on a GPU.
        autocast: dtype of products, where it is not that of the weights.
        follows: whether it is a later pass of an accumulated step, which begins with the gradients
            of those before it.
    """

    examples: int
    length: int
    checkpoints: bool = False
    fuses_head: bool = False
    head_chunk_bytes: int = 0
    engine: str = "loop"
    autocast: torch.dtype | None = None
    follows: bool = False

    @property
    def tokens(self) -> int:
        """Of it, padding included."""
        return self.examples * self.length


@dataclass(frozen=True)
class PassOnPaper:
    """What a pass takes beside the weights.

    Attributes:
        kept_bytes: between the forward and the backward pass, gradients of earlier passes apart.
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

    Returns:
        Of the whole model; of one with more layers than `LAYERS` what the first of these take, and
        as much again for the others as the latter of these do.

    Raises:
        RuntimeError: what a model says that cannot run without numbers.
    """
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    whole = config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == whole]
    few, more = LAYERS
    if whole <= more or len(lists) != 1:
        return _pass(model, batch, dtype, trains)
    found = []
    for layers in LAYERS:
        with _first_layers(config, lists[0], layers):
            found.append(_pass(model, batch, dtype, trains))
    times = (whole - more) / (more - few)
    short, long = found
    return PassOnPaper(
        round(long.kept_bytes + times * (long.kept_bytes - short.kept_bytes)),
        round(long.peak_bytes + times * (long.peak_bytes - short.peak_bytes)),
        long.work + (long.work - short.work) * times,
    )


@contextmanager
def _first_layers(config: Any, layers: nn.ModuleList, number: int) -> Iterator[None]:
    """While it lasts, the model has no more."""
    whole, kept = config.num_hidden_layers, dict(layers._modules)
    config.num_hidden_layers = number
    layers._modules = {name: kept[name] for name in list(kept)[:number]}
    try:
        yield
    finally:
        config.num_hidden_layers, layers._modules = whole, kept


def _pass(model: PeftModel, batch: Batch, dtype: torch.dtype, trains: bool) -> PassOnPaper:
    try:
        return _run(model, batch, dtype, trains, reads_mask=False)
    except TypeError:  # sparse attention, say, which chooses tokens by the mask
        return _run(model, batch, dtype, trains, reads_mask=True)


def _run(
    model: PeftModel, batch: Batch, dtype: torch.dtype, trains: bool, reads_mask: bool
) -> PassOnPaper:
    model.train(trains)
    if batch.checkpoints and trains:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    counting = Counting()
    counting.ignore([*model.parameters(), *model.buffers()])
    cast = torch.autocast("cpu", batch.autocast) if batch.autocast else nullcontext()
    paper = on_paper(model, counting, dtype, batch.engine, reads_mask)
    with counting, paper, torch.set_grad_enabled(trains), cast:
        held = _hold_gradients(model) if batch.follows and trains else 0
        ids_BL = torch.zeros(batch.examples, batch.length, dtype=torch.int64, device="meta")
        given: dict[str, Any] = {"labels": ids_BL}
        if batch.fuses_head:
            given = {"logits_to_keep": 1}
        out = model(input_ids=ids_BL, use_cache=False, **given)
        loss = out.logits.float().sum() if batch.fuses_head else out.loss
        _form_chunk(batch, out.logits)
        del out
        kept = counting.bytes - held
        if trains:
            loss.backward()
    model.zero_grad()
    return PassOnPaper(kept, counting.peak_bytes, counting.work)


def _hold_gradients(model: PeftModel) -> int:
    """Give all that is trained a gradient, and return how many bytes they take."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)


def _form_chunk(batch: Batch, logits_BLV: torch.Tensor) -> None:
    """Logits as `drlora.evaluation.head` forms them: of some rows, in both dtypes."""
    vocabulary = logits_BLV.shape[-1]
    rows = min(batch.tokens, max(1, batch.head_chunk_bytes // (4 * vocabulary)))
    if batch.head_chunk_bytes:
        chunk_nV = logits_BLV.new_empty(rows, vocabulary)
        chunk_nV.float()
