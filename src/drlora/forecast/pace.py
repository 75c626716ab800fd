"""How long a step takes: measured on a few layers of the model, or from what a GPU's maker says.

On this machine the model is made twice with random weights, with few layers and with two more, and
each is trained for some steps of the batch. The difference is what layers take; the work that both
do on paper says how much of it the whole model has. On a GPU that is not here the work is divided
by the card's speed, of which MoE steps reach `UTILISATION`: an estimate, and called so.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from drlora.adapter.inject import adapted_layers
from drlora.config.adapter import DrLoraConfig
from drlora.forecast.counting import Work
from drlora.forecast.step import Batch, adapted_on_paper, pass_on_paper
from drlora.moe.blocks import find_blocks
from drlora.moe.quantise import quantise_experts

UTILISATION = 0.25  # assumed: of a grouped MoE step with short examples, not measured
OPERATIONS_A_BYTE = 8.0  # how many a core does while it moves a byte, in round numbers
MORE_LAYERS, STEPS = 2, 3


@dataclass(frozen=True)
class Gpu:
    """A card: name, memory, dense 16-bit operations and bytes a second, as its maker says."""

    name: str
    gb: float
    peak: float
    bandwidth: float


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("T4", 16, 65e12, 320e9),
        Gpu("RTX 3090", 24, 71e12, 936e9),
        Gpu("RTX 4080", 16, 97e12, 717e9),
        Gpu("RTX 4090", 24, 165e12, 1008e9),
        Gpu("L4", 24, 121e12, 300e9),
        Gpu("L40S", 48, 362e12, 864e9),
        Gpu("A100", 80, 312e12, 2039e9),
        Gpu("H100", 80, 989e12, 3350e9),
        Gpu("H200", 141, 989e12, 4800e9),
    )
}
UNNAMED_SPEED = 100e12  # operations a second of a card of which only the memory is known
UNNAMED_BANDWIDTH = 600e9


def seconds_on(gpu: Gpu, work: Work) -> float:
    """Of some work on a card that is not here: an estimate."""
    return work.products / (gpu.peak * UTILISATION) + work.moved_bytes / gpu.bandwidth


@dataclass(frozen=True)
class Pace:
    """What was measured on a few layers.

    Attributes:
        layers: of the larger model that was tried.
        batch: that it was given.
        seconds: of a forward and backward pass of the whole model with that batch, computed.
        work: of that pass.
    """

    layers: int
    batch: Batch
    seconds: float
    work: Work

    def of(self, work: Work) -> float:
        """Seconds of other work by the same model."""
        return self.seconds * _amount(work) / _amount(self.work)


def measure_pace(
    architecture: PreTrainedConfig,
    config: DrLoraConfig,
    batch: Batch,
    dtype: torch.dtype,
    storage: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> Pace:
    """Try a few layers of the model on this machine.

    Args:
        architecture: of the model.
        config: of the adapter.
        batch: of one pass.
        dtype: of the weights.
        storage: of experts in few bits, as `drlora.quantise_experts` takes it.
        trust_remote_code: whether code that comes with a model of the hub may run.
        device: that it is tried on; by default the CPU.

    Raises:
        RuntimeError: if the model cannot be made with fewer layers.
    """
    layers = architecture.get_text_config().num_hidden_layers
    few = _fewest_layers(architecture, trust_remote_code)
    depths = sorted({min(layers, few), min(layers, few + MORE_LAYERS)})

    def on_paper(depth: int) -> Work:
        cut = with_layers(architecture, depth)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(cut, trust_remote_code=trust_remote_code)
        return pass_on_paper(adapted_on_paper(skeleton, config, dtype), batch, dtype).work

    def on_machine(depth: int) -> Callable[[], None]:
        cut = with_layers(architecture, depth)
        model = AutoModelForCausalLM.from_config(
            cut, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if storage is not None:
            quantise_experts(model, storage)
        adapted = get_peft_model(model.to(device or "cpu"), copy.deepcopy(config))
        _give_ranks(adapted)
        return _step(adapted, batch)

    taken = _fastest([on_machine(depth) for depth in depths])
    work = [on_paper(depth) for depth in depths]
    whole = on_paper(layers)
    if len(depths) == 1:
        return Pace(depths[0], batch, taken[0], whole)
    more = (taken[1] - taken[0]) / (_amount(work[1]) - _amount(work[0]))
    more = max(more, 0.5 * taken[1] / _amount(work[1]))  # where the machine was busy meanwhile
    left = _amount(whole) - _amount(work[1])
    return Pace(depths[1], batch, taken[1] + more * left, whole)


def _give_ranks(adapted: PeftModel) -> None:
    """Where data are to place the ranks, each expert as many as it has on average."""
    config = adapted.peft_config["default"]
    assert isinstance(config, DrLoraConfig)
    if not config.starts_from_data:
        return
    for layer in adapted_layers(adapted, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            pool.set_ranks([config.r_init] * pool.book.num_experts)


def _amount(work: Work) -> float:
    return work.products + OPERATIONS_A_BYTE * work.moved_bytes


def with_layers(architecture: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of a config with the first so many layers; what it lists by layer is cut too."""
    cut = copy.deepcopy(architecture)
    text: Any = cut.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return cut


def _fewest_layers(architecture: PreTrainedConfig, trust_remote_code: bool) -> int:
    """The layers up to the first one with experts: some models begin with others."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust_remote_code)
    numbers = [int(part) for part in find_blocks(model)[0].name.split(".") if part.isdigit()]
    return numbers[0] + 1 if numbers else 1


def _step(model: Any, batch: Batch) -> Callable[[], None]:
    """A training step of a model with a batch of tokens by chance."""
    assert isinstance(model, PeftModel)
    model.train()
    if batch.checkpoints:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    embedding: Any = model.get_input_embeddings()
    weight = embedding.weight
    shape = (batch.examples, batch.length)
    ids_BL = torch.randint(weight.shape[0], shape, device=weight.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)

    def step() -> None:
        model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if weight.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _fastest(steps: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds of each: the fastest of a few, the first left out.

    They take turns, so that a machine that is busy for a while is busy for all of them.
    """
    rounds = [[timed(step) for step in steps] for _ in range(1 + STEPS)]
    return [min(of_step) for of_step in zip(*rounds[1:], strict=True)]


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call; of one thread its processor time, which others on the machine do not
    lengthen."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    function()
    return max(clock() - started, math.ulp(1.0))
