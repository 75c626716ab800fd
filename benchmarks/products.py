"""Products of one expert in 16 bits and in float32: `python -m benchmarks.products`.

Why the CPU engine widens 16-bit experts where the processor has no 16-bit products
(docs/engines.md). For each layout that the engine uses, one core: the 16-bit product as it is, the
float32 product, and the float32 product after the 16-bit matrix was copied into a buffer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import alternate, append, percentile, where

SHAPES = [(256, 512), (1024, 2048)]  # (in, out) of an expert's matrix
ROWS = [1, 8, 32, 128, 512]
RANK = 16


def cases(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Layout -> two factors; the second one is the frozen matrix where there is one."""
    x, g = torch.randn(rows, inputs), torch.randn(rows, outputs)
    weight, a, z = torch.randn(outputs, inputs), torch.randn(RANK, inputs), torch.randn(rows, RANK)
    return {
        "forward x W^T": (x, weight.T),
        "backward g W": (g, weight),
        "shrink x A^T": (x, a.T),
        "expand z A": (z, a),
        "gradient z^T x": (z.T, x),
    }


def implementations(
    left: Tensor, right: Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """The same product three ways."""
    left16, right16 = left.to(dtype), right.to(dtype)
    out = torch.empty(left.shape[0], right.shape[1])
    out16, buffer = out.to(dtype), torch.empty_like(right)
    repeats = max(1, int(2e7 / (left.shape[0] * right.numel())))

    def repeated(product: Callable[[], object]) -> Callable[[], None]:
        return lambda: [product() for _ in range(repeats)] and None

    ways = {
        str(dtype).removeprefix("torch."): lambda: torch.mm(left16, right16, out=out16),
        "float32": lambda: torch.mm(left, right, out=out),
        "widened": lambda: torch.mm(left, buffer.copy_(right16), out=out),
    }
    for name, product in ways.items():
        got = product().float()
        wanted = left @ right
        if not (got - wanted).norm() < 2e-2 * wanted.norm():
            raise RuntimeError(f"{name} is wrong; not timed.")
    return {name: repeated(product) for name, product in ways.items()}


def run(rows: int, inputs: int, outputs: int, rounds: int) -> list[dict]:
    """One row a layout and way; `gflops` counts 2 x rows x inputs x outputs a product."""
    result = []
    for layout, (left, right) in cases(rows, inputs, outputs).items():
        flops = 2 * left.shape[0] * right.numel() * max(1, int(2e7 / (rows * right.numel())))
        if layout.startswith("gradient"):
            flops = 2 * left.shape[0] * right.numel() * max(1, int(2e7 / (RANK * right.numel())))
        timings = alternate(implementations(left, right, torch.bfloat16), rounds, warmup=1)
        for way, timing in timings.items():
            result.append(
                {"case": f"{layout}, {inputs} to {outputs}, {rows} rows", "implementation": way,
                 "median_s": timing.median, "gflops": flops / timing.median / 1e9,
                 "p20_s": percentile(timing.seconds, 20), "p80_s": percentile(timing.seconds, 80),
                 **where()}
            )  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> int:
    """Time all layouts and append the rows to benchmarks/results/products.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for inputs, outputs in SHAPES:
        for number in ROWS:
            rows = run(number, inputs, outputs, arguments.rounds)
            for row in rows:
                print(f"{row['case']:44} {row['implementation']:10} {row['gflops']:8.1f} GFLOP/s")
            if not arguments.dry:
                append("products", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
