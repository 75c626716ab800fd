"""Is an implementation right? Asked before it is timed; `WrongResultError` says that it is not.

The measure is one expert layer's output and every gradient, against the naive engine in float32
with the same weights. Errors are taken row by row (a token of the output, a rank of a factor), so
that one wrong expert among many cannot hide in a norm over all of them. What error rounding
excuses is not guessed: in bfloat16 it is a small multiple of what the naive engine itself errs
there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.layers import Block, Inputs, Shape, ours
from drlora.ops.trial import row_error

FLOAT32_BOUND = 1e-4
SLACK = 3.0
Results = dict[str, Tensor]


class WrongResultError(RuntimeError):
    """An implementation's output or gradient is off; it is not timed."""


def results_of(module: nn.Module, inputs: Inputs) -> Results:
    """Output and every gradient, in float32; pools' gradients go by the parameter's name."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = [inputs.x, inputs.weight, *named.values()]
    out = module(inputs.x, inputs.index, inputs.weight)
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    names = ["out", "dx", "dweight", *named]
    results = {n: t.detach().float() for n, t in zip(names, [out, *grads], strict=True)}
    # One row: a weight's gradient is an inner product that may cancel, alone it is mostly rounding.
    results["dweight"] = results["dweight"].reshape(1, -1)
    return results


def in_float32(inputs: Inputs) -> Inputs:
    """The same batch, exactly, in float32."""
    return Inputs(
        inputs.x.detach().float().requires_grad_(),
        inputs.index,
        inputs.weight.detach().float().requires_grad_(),
        inputs.grad.float(),
    )


class Reference:
    """What the naive engine says of one adapted layer, and how far rounding takes it from that.

    Args:
        block: an adapted layer; only its weights and ranks are read.
        experts: its frozen experts.
        make: builds the layer on experts with the naive engine (`ours`, or `masked`).
    """

    def __init__(
        self,
        block: Block,
        experts: nn.Module,
        shape: Shape,
        ranks: list[int],
        inputs: Inputs,
        make: Callable[..., Block] = ours,
    ) -> None:
        wide = replace(shape, dtype=torch.float32)
        exact = make(copy.deepcopy(experts).float(), wide, ranks, engine="naive")
        exact.load_state_dict(block.state_dict())
        self.wanted = results_of(exact, in_float32(inputs))
        self.naive_error = dict.fromkeys(self.wanted, 0.0)
        del exact
        if shape.dtype != torch.float32:
            rounded = make(experts, shape, ranks, engine="naive")
            rounded.load_state_dict(block.state_dict())
            for name, tensor in results_of(rounded, inputs).items():
                self.naive_error[name] = row_error(tensor, self.wanted[name])

    def check(self, results: Results, slack: float = SLACK) -> None:
        """Raise WrongResultError unless every tensor is within `slack` times what naive errs."""
        if results.keys() != self.wanted.keys():
            raise WrongResultError(f"found {sorted(results)} instead of {sorted(self.wanted)}")
        for name, wanted in self.wanted.items():
            error = row_error(results[name], wanted)
            bound = max(slack * self.naive_error[name], FLOAT32_BOUND)
            if not error <= bound:  # NaN is wrong too
                raise WrongResultError(
                    f"{name} is off by {error:.2e} in a row, more than {bound:.2e}"
                )


def check_frozen(experts: nn.Module, shape: Shape, inputs: Inputs) -> None:
    """The frozen layer against the naive engine with an adapter that adds nothing."""
    ranks = [1] * shape.experts
    idle = ours(experts, shape, ranks)
    for pool in idle.experts.adapter("default").rank_pools.values():
        nn.init.zeros_(pool.lora_B)
    reference = Reference(idle, experts, shape, ranks, inputs)
    reference.wanted = {name: reference.wanted[name] for name in ("out", "dx", "dweight")}
    reference.check(results_of(experts, inputs))


def check_peft(
    model: nn.Module,
    experts: nn.Module,
    shape: Shape,
    inputs: Inputs,
    rank: int,
    slack: float = SLACK,
) -> None:
    """PEFT's layer against ours at one rank with the same factors."""
    ranks = [rank] * shape.experts
    twin = ours(experts, shape, ranks)
    copy_factors(model, twin)
    found = from_peft(results_of(model, inputs), shape.experts)
    Reference(twin, experts, shape, ranks, inputs).check(found, slack)


def copy_factors(model: nn.Module, block: Block) -> None:
    """PEFT's factors into the pools of a block with that rank for every expert."""
    found = dict(model.named_parameters())
    for projection, pool in block.experts.adapter("default").rank_pools.items():
        inside = "experts.base_layer" if projection == "gate_up" else "experts"
        a, b = (found[f"base_model.model.{inside}.lora_{f}.default.weight"].data for f in "AB")
        pool.lora_A.data[pool.packed_index] = a
        pool.lora_B.data[pool.packed_index] = pool_rows(b, pool.book.num_experts)


def from_peft(results: Results, experts: int) -> Results:
    """PEFT's results under the names of a block whose pools are in the experts' order."""
    renamed = {}
    for name, tensor in results.items():
        if "lora_" in name:
            projection = "gate_up" if ".base_layer.lora_" in name else "down"
            factor = "lora_A" if "lora_A" in name else "lora_B"
            name = f"experts.drlora_adapters.default.pools.{projection}.{factor}"
            tensor = pool_rows(tensor, experts) if factor == "lora_B" else tensor
        renamed[name] = tensor
    return renamed


def pool_rows(b: Tensor, experts: int) -> Tensor:
    """PEFT's B (out, rank * E), expert index fastest, as rows of a pool (E * rank, out)."""
    return b.reshape(b.shape[0], -1, experts).permute(2, 1, 0).reshape(-1, b.shape[0])
