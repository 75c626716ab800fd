"""Forward and backward of one adapted expert layer: `python -m benchmarks.experts_layer [CASE]`.

Ranks run from 8 to 64 with mean 16: once drawn independently of the routing, once following the
load, as DR-LoRA makes them. Before anything is timed, output and gradients are checked against the
naive definition.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.harness import alternate, append, rows_of
from benchmarks.layers import Shape, make_experts, make_inputs, masked, ours, peft, step_of
from benchmarks.layers import uneven_ranks as uneven

SHAPES = [
    Shape(512, 256, 64, 8, 1024),
    Shape(1024, 1024, 64, 8, 2048),
    Shape(256, 256, 64, 8, 2048),
    Shape(1024, 1024, 64, 8, 2048, torch.bfloat16),
    Shape(256, 256, 64, 8, 2048, torch.bfloat16),
]
SKEW = 0.55  # so that ranks that follow the load meet rank 23 to 31 on average
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def check(fast, reference, inputs, tolerance: float) -> None:
    """Output and every gradient of `fast` against the naive engine's; raises if they differ."""
    results = []
    for module in (fast, reference):
        leaves = [inputs.x, inputs.weight, *(p for p in module.parameters() if p.requires_grad)]
        out = module(inputs.x, inputs.index, inputs.weight)
        results.append([out, *torch.autograd.grad(out, leaves, inputs.grad)])
    for number, (got, wanted) in enumerate(zip(*results, strict=True)):
        error = (got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-12)
        if not error < tolerance:
            raise RuntimeError(f"tensor {number} is wrong: relative error {error:.2e}; not timed.")


def run(shape: Shape, how: str, rounds: int, with_masked: bool) -> list[dict]:
    """Time one case; `how` is `independent` or `following`."""
    torch.manual_seed(0)
    inputs = make_inputs(shape, SKEW)
    load = torch.bincount(inputs.index.flatten(), minlength=shape.experts)
    order = load.argsort(descending=True) if how == "following" else torch.randperm(shape.experts)
    ranks = uneven(shape.experts, 8, 16, 64, order)
    experts = make_experts(shape)
    mine = ours(experts, shape, ranks)
    for pool in mine.experts.adapter("default").rank_pools.values():
        pool.lora_A.data = pool.lora_A.data.to(shape.dtype)
    naive = ours(experts, shape, ranks, engine="naive")
    naive.load_state_dict(mine.state_dict())
    check(mine, naive, inputs, TOLERANCE[shape.dtype])
    modules = {"hf_frozen": experts, "ours": mine, "peft": peft(experts, 16)}
    if with_masked:
        modules["masked r_max"] = masked(experts, shape, ranks, 64)
    steps = {name: step_of(module, inputs) for name, module in modules.items()}
    timings = alternate(steps, rounds)
    met = float((load * torch.tensor(ranks)).sum() / load.sum())
    return rows_of(
        f"layer {shape.name} {how}", timings, "hf_frozen", "peft",
        mean_rank=16, mean_rank_met=round(met, 1),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Time the chosen cases and append the rows to benchmarks/results/experts_layer.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", type=int, help="numbers of cases, all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--masked", action="store_true", help="also time the paper's masked way")
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    for number in arguments.cases or range(len(SHAPES)):
        for how in ("independent", "following"):
            rows = run(SHAPES[number], how, arguments.rounds, arguments.masked)
            for row in rows:
                print(
                    f"{row['case']:58} {row['implementation']:12} {row['median_s'] * 1e3:8.1f} ms"
                    f"  to frozen {row['to_frozen']:.3f} [{row['to_frozen_p20']:.3f},"
                    f" {row['to_frozen_p80']:.3f}]  PEFT/this {row['peft_over_this']:.2f}"
                    f"  rank met {row['mean_rank_met']}", flush=True,
                )  # fmt: skip
            if not arguments.dry:
                append("experts_layer", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
