"""OLMoE-1B-7B at its real shape on a small machine: `python -m benchmarks.full_size`.

Random bfloat16 weights made on the spot, gradient checkpointing on, a few training steps of DR-LoRA
with a growth event among them; reports seconds per step and the peak resident memory. What PEFT's
LoRA on the experts would need for the same step is computed from its tensors: merged copies of the
experts of one block and gradients of that size, beside the same model.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from peft import get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM

import drlora
from benchmarks.harness import append, where

GB = 1e9
STEPS = 4
SETTINGS = {"r_init": 8, "r_target": 16, "r_max": 32, "grow_every": 2, "warmup_steps": 1,
            "settle_steps": 1, "p_grow": 1.0}  # fmt: skip


def make_model() -> OlmoeForCausalLM:
    """6.9 billion random bfloat16 weights, without the cost of initialising them."""
    config = OlmoeConfig(intermediate_size=1024)  # the other defaults are OLMoE-1B-7B-0924's
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1.0)
        else:
            weight.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed
    return model.requires_grad_(False)


def peak_gb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def main(argv: list[str] | None = None) -> int:
    """Train a few steps and append the row to benchmarks/results/full_size.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dry", action="store_true", help="append no row")
    arguments = parser.parse_args(argv)
    model = get_peft_model(make_model(), drlora.DrLoraConfig(**SETTINGS))
    after_load = peak_gb()
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    dynamics = drlora.RankDynamics(model, STEPS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(1, 50_000, (1, arguments.tokens))
    seconds, grants = [], 0
    for step in range(STEPS):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        grants += len(dynamics.after_optimizer_step(optimizer))
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        print(f"step {step + 1}: loss {loss.item():.3f}, {seconds[-1]:.1f} s", flush=True)
    row = {
        "case": f"full size OLMoE-1B-7B bf16 T{arguments.tokens} checkpointing",
        "implementation": "ours", "seconds": seconds, "grants": grants,
        "budget_spent": dynamics.budget(), "loaded_gb": after_load, "peak_gb": peak_gb(), **where(),
    }  # fmt: skip
    print(row)
    if not arguments.dry:
        append("full_size", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
