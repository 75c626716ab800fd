"""One expert layer in every implementation that is compared, with the same weights and routing.

hf_frozen   transformers' own experts, frozen, grouped_mm: forward and the input's gradient
ours        DrLoraExperts at the given ranks
masked      the paper's way: every expert at r_max, unused ranks masked, same engine
peft        PEFT's LoRA on `target_parameters`, one rank for all (the mean)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from drlora import DrLoraConfig
from drlora.adapter.layer import DrLoraExperts
from drlora.moe.blocks import MoEBlock


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: hidden d, expert width m, E experts, k a token, tokens."""

    hidden: int
    width: int
    experts: int
    top_k: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind} d{self.hidden} m{self.width} E{self.experts} k{self.top_k} T{self.tokens}"


class Block(nn.Module):
    """A module with one child called `experts`, as PEFT and the surgery expect it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.experts(x, index, weight)


@dataclass
class Inputs:
    """One batch: x (T, H), index and weight (T, K), and the output's gradient (T, H)."""

    x: Tensor
    index: Tensor
    weight: Tensor
    grad: Tensor


def make_inputs(shape: Shape, skew: float, device: str = "cpu") -> Inputs:
    """A batch whose expert load is uneven: experts get a bias of `skew` times a normal draw."""
    return make_batches(shape, skew, 1, device)[0]


def make_batches(shape: Shape, skew: float, count: int, device: str = "cpu") -> list[Inputs]:
    """Batches of one bias of the experts, each with a routing of its own."""
    batches: list[Inputs] = []
    bias_E = None
    for _ in range(count):
        x = torch.randn(shape.tokens, shape.hidden, device=device)
        if bias_E is None:
            bias_E = skew * torch.randn(shape.experts, device=device)
        logits = torch.randn(shape.tokens, shape.experts, device=device) + bias_E
        weight, index = logits.softmax(-1).topk(shape.top_k)
        weight, x = weight.to(shape.dtype), x.to(shape.dtype)
        leaves = x.requires_grad_(), index, weight.requires_grad_()
        batches.append(Inputs(*leaves, torch.randn_like(x)))
    return batches


def make_experts(shape: Shape, device: str = "cpu") -> OlmoeExperts:
    """Frozen experts with random weights, computed by transformers' grouped_mm."""
    config = OlmoeConfig(
        hidden_size=shape.hidden, intermediate_size=shape.width, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, num_hidden_layers=1,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        experts = OlmoeExperts(config).to(shape.dtype)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.02)
        weight.requires_grad_(False)
    return experts


def uneven_ranks(experts: int, low: int, mean: int, high: int, order: Tensor) -> list[int]:
    """Ranks from `low` to `high` with the given mean, the largest to the first in `order`."""
    if not low <= mean <= high:
        raise ValueError(f"a mean of {mean} is out of reach with ranks from {low} to {high}.")
    ranks = [low] * experts
    left = experts * (mean - low)
    while left:
        for expert in order.tolist():
            share = min(high - ranks[expert], max(left // 4, 1), left)
            ranks[expert] += share
            left -= share
    return ranks


def ours(experts: nn.Module, shape: Shape, ranks: list[int], **settings: Any) -> Block:
    """The experts with adapters at the given ranks; LoRA's B is random, as after some training."""
    total = sum(ranks)
    assert total % shape.experts == 0, "the budget is a whole rank per expert"
    config = DrLoraConfig(
        r_init=min(ranks),
        r_target=total // shape.experts,
        r_max=max(ranks),
        p_grow=1.0,
        **settings,
    )
    block = MoEBlock("block", "experts", None, shape.experts, shape.hidden, shape.width)
    layer = DrLoraExperts(experts, block)
    layer.add_adapter("default", config)
    layer.set_adapter("default")
    for pool in layer.adapter("default").rank_pools.values():
        pool.grant([rank - min(ranks) for rank in ranks], step=1)
        nn.init.normal_(pool.lora_B, std=0.02)
    return Block(layer).train()


def masked(experts: nn.Module, shape: Shape, ranks: list[int], **settings: Any) -> Block:
    """Every expert at the largest rank; the unused rows of A and B are zeroed in each forward."""
    r_max = max(ranks)
    block = ours(experts, shape, [r_max] * shape.experts, **settings)
    for pool in block.experts.adapter("default").rank_pools.values():
        live = torch.cat([torch.arange(r_max) < rank for rank in ranks]).float()[:, None]
        live = live.to(pool.lora_A)
        plain = pool.forward

        def forward(
            dtype: torch.dtype, experts: range | None = None, plain=plain, live=live
        ) -> tuple[Tensor, Tensor]:
            a, b = plain(dtype, experts)
            return a * live.to(dtype), b * live.to(dtype)

        pool.forward = forward
    return block


def peft(experts: nn.Module, rank: int) -> nn.Module:
    """PEFT's LoRA on both parameters; its wrapper keeps the experts as its base layer."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_parameters=["gate_up_proj", "down_proj"]
    )
    model = get_peft_model(Block(experts), config, autocast_adapter_dtype=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    return model.train()


def step_of(module: nn.Module, *batches: Inputs) -> Callable[[], None]:
    """Forward and backward of the next batch; gradients are dropped, not accumulated."""
    trained = [p for p in module.parameters() if p.requires_grad]
    coming = itertools.cycle(batches)

    def step() -> None:
        inputs = next(coming)
        out = module(inputs.x, inputs.index, inputs.weight)
        torch.autograd.grad(out, [inputs.x, inputs.weight, *trained], inputs.grad)

    return step
