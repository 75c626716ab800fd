"""How the layer's time grows with experts, tokens and ranks: `python -m benchmarks.scaling`.

At a fixed number of routed rows experts go from 8 to 256; then tokens and ranks are doubled. The
frozen layer is timed beside ours in every case, so that its own growth can be taken out.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.experts_layer import SKEW
from benchmarks.harness import alternate, append, rows_of
from benchmarks.layers import Shape, make_experts, make_inputs, ours, step_of

EXPERTS = [Shape(512, 256, experts, 8, 1024) for experts in (8, 16, 32, 64, 128, 256)]
TOKENS = [Shape(512, 256, 64, 8, tokens) for tokens in (512, 1024, 2048, 4096)]
RANKS = [8, 16, 32, 64]


def run(shape: Shape, rank: int, rounds: int, sweep: str) -> list[dict]:
    """Ours at one rank beside the frozen layer."""
    torch.manual_seed(0)
    inputs, experts = make_inputs(shape, SKEW), make_experts(shape)
    adapted = ours(experts, shape, [rank] * shape.experts)
    steps = {"hf_frozen": step_of(experts, inputs), "ours": step_of(adapted, inputs)}
    timings = alternate(steps, rounds)
    return rows_of(
        f"scaling {sweep} {shape.name} r{rank}", timings, "hf_frozen", "", sweep=sweep, rank=rank,
        experts=shape.experts, tokens=shape.tokens,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the sweeps and append the rows to benchmarks/results/scaling.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    cases = [(shape, 16, "experts") for shape in EXPERTS]
    cases += [(shape, 16, "tokens") for shape in TOKENS]
    cases += [(EXPERTS[3], rank, "rank") for rank in RANKS]
    for shape, rank, sweep in cases:
        rows = run(shape, rank, arguments.rounds, sweep)
        for row in rows:
            print(
                f"{row['case']:52} {row['implementation']:10} {row['median_s'] * 1e3:8.1f} ms  "
                f"to frozen {row['to_frozen']:.3f}",
                flush=True,
            )
        if not arguments.dry:
            append("scaling", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
