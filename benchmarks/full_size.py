"""OLMoE-1B-7B at its real shape on a small machine: `python -m benchmarks.full_size`.

Random bfloat16 weights made on the spot, gradient checkpointing on, a few training steps of DR-LoRA
with a growth event among them; reports seconds per step and the peak resident memory. `packed` does
the same with experts in four bits (NF4, nested scales), which are packed while they are made.

PEFT's LoRA on the same experts, and ours, take such steps on models of one and of two layers (PEFT
one, after its moments were made). What PEFT needs for all sixteen is computed as the straight line
through these measurements; the same line for ours stands beside what was measured of it. Each model
runs in a process of its own, whose memory is limited so that it fails before the machine does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

import drlora
from benchmarks.harness import Row, add_names, append, peak_resident_bytes, where
from benchmarks.models import (
    EXPERT_PARAMETERS,
    random_model,
    random_packed_model,
    with_checkpointing,
)
from drlora.ops.storage.packed import FORMATS

GB = 1e9
LAYERS, FEW, MORE = 16, 1, 2
# PEFT takes a minute and a half a layer and step on a CPU without 16-bit products, however few the
# tokens; what it needs is nearly all weights, merged copies and their gradients.
LINE_TOKENS, PEFT_STEPS = 8, 1
STEPS = 3
GROWTH = {"r_init": 8, "r_target": 16, "r_max": 32, "grow_every": 1, "warmup_steps": 1,
          "settle_steps": 1, "p_grow": 1.0}  # fmt: skip
# Leaves room for the system on a machine of 24 GB.
LIMIT_BYTES = 21 * 2**30


class WideBackward(torch.autograd.Function):
    """A frozen linear layer whose backward product runs in float32, some rows at a time.

    torch's own in bfloat16 reaches 0.2 GFLOP/s on a CPU without 16-bit products: two minutes for
    the vocabulary of 128 tokens. Ours and PEFT's model get it alike, outside the experts.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> Any:
        """A forward for the layer."""
        return lambda x: cls.apply(x, linear.weight)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.weight_OI = weight_OI
        return nn.functional.linear(x, weight_OI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flat_TO = grad.reshape(-1, grad.shape[-1])
        result_TI = torch.zeros(len(flat_TO), ctx.weight_OI.shape[1])
        for g, w in zip(flat_TO.split(2048, dim=1), ctx.weight_OI.split(2048), strict=True):
            result_TI.addmm_(g.float(), w.float())
        return result_TI.view(*grad.shape[:-1], -1).to(grad.dtype), None


def make_model(kind: str, layers: int) -> nn.Module:
    """Up to 6.9 billion random bfloat16 weights and an adapter of mean rank 16 in training mode."""
    # The other defaults are those of OLMoE-1B-7B-0924.
    config = OlmoeConfig(intermediate_size=1024, num_hidden_layers=layers)
    if kind in FORMATS:
        base = random_packed_model(OlmoeForCausalLM, config, torch.bfloat16, kind)
    else:
        base = random_model(OlmoeForCausalLM, config, torch.bfloat16, "cpu")
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.forward = WideBackward.of(module)  # type: ignore[method-assign]
    adapter: Any = drlora.DrLoraConfig(**GROWTH)
    if kind == "peft":
        adapter = LoraConfig(r=16, lora_alpha=32, target_parameters=EXPERT_PARAMETERS)
    return with_checkpointing(get_peft_model(base, adapter).train())


def measure(kind: str, layers: int, tokens: int) -> Row:
    """Train a few steps in this process; ours grows after the second."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    torch.manual_seed(0)
    model = make_model(kind, layers)
    loaded = peak_resident_bytes() / GB
    dynamics = None if kind == "peft" else drlora.RankDynamics(model, STEPS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(1, 50_000, (1, tokens))
    if dynamics is None:
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    seconds, losses, grown = [], [], {}
    for step in range(1, 1 + (STEPS if dynamics is not None else PEFT_STEPS)):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if dynamics is not None:
            dynamics.before_optimizer_step()
        optimizer.step()
        if dynamics is not None:
            grown[step] = len(dynamics.after_optimizer_step(optimizer))
        optimizer.zero_grad()
        seconds.append(round(time.perf_counter() - started, 2))
        losses.append(round(loss.item(), 4))
        print(f"{kind} L{layers} step {step}: {losses[-1]}, {seconds[-1]} s", file=sys.stderr)
    row: Row = {
        "seconds": seconds,
        "losses": losses,
        "loaded_gb": loaded,
        "peak_gb": peak_resident_bytes() / GB,
    }
    row["trained_parameters"] = sum(p.numel() for p in trained)
    row["adapter_dtype"] = str(trained[0].dtype)
    if dynamics is not None:
        row["grants_after_step"] = {step: count for step, count in grown.items() if count}
        row["budget_spent"] = dynamics.budget()
    return row


def in_a_process(kind: str, layers: int, tokens: int) -> Row:
    """`measure` in a fresh process; raises if it fails, for want of memory say."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--tokens", str(tokens)]
    command += ["--measure", kind, str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    case = f"full size OLMoE-1B-7B L{layers} bf16 T{tokens} checkpointing"
    found = json.loads(done.stdout.splitlines()[-1])
    return {"case": case, "implementation": kind, **found, **where()}


def computed(few: Row, more: Row, kind: str) -> Row:
    """What `kind` needs for all layers: the straight line through two measured sizes."""
    layer_gb = (more["peak_gb"] - few["peak_gb"]) / (MORE - FEW)
    return {
        "case": f"full size OLMoE-1B-7B L{LAYERS} bf16 T{LINE_TOKENS} checkpointing",
        "implementation": kind,
        "computed_from_measured": [few["case"], more["case"]],
        "computed_peak_gb": few["peak_gb"] + layer_gb * (LAYERS - FEW),
        "layer_gb": layer_gb,
        **where(),
    }


def full(tokens: int) -> Iterator[Row]:
    """Ours at full size."""
    yield in_a_process("ours", LAYERS, tokens)


def packed(tokens: int) -> Iterator[Row]:
    """Ours at full size, experts in four bits."""
    yield in_a_process("nf4-nested", LAYERS, tokens)


def lines(tokens: int) -> Iterator[Row]:
    """Ours and PEFT at two small sizes, and their lines."""
    for kind in ("ours", "peft"):
        small = [in_a_process(kind, layers, tokens) for layers in (FEW, MORE)]
        yield from [*small, computed(*small, kind)]


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for and append its rows to benchmarks/results/full_size.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_names(parser, ["full", "packed", "lines"])
    parser.add_argument("--tokens", type=int, default=128, help="of the full model, 128 if unset")
    parser.add_argument("--dry", action="store_true", help="append no row")
    parser.add_argument(
        "--measure", nargs=2, metavar=("KIND", "LAYERS"), help="one, in this process"
    )
    arguments = parser.parse_args(argv)
    if arguments.measure:
        kind, layers = arguments.measure
        print(json.dumps(measure(kind, int(layers), arguments.tokens)))
        return 0
    parts = {
        "full": full(arguments.tokens),
        "packed": packed(arguments.tokens),
        "lines": lines(LINE_TOKENS),
    }
    for row in (row for name in arguments.names for row in parts[name]):
        print(json.dumps(row), flush=True)
        if not arguments.dry:
            append("full_size", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
