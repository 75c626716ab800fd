"""Where products in bfloat16 pay on this processor: `python -m benchmarks.sixteen_bits`.

One layer with bfloat16 experts, with products in bfloat16 and with experts that are widened to
float32, in turn; forward and backward, and forward alone on few tokens, as in decoding. Each pass
has a routing of its own, as in training: oneDNN writes code for each shape that it has not seen
lately, so with the same rows in every pass bfloat16 would look better than it is.
`drlora.ops.loop.engine.work_saved` and `PAYS_FROM` are from here.

Then, with one rank and with many: what it saves to fill rows and ranks up to a few sizes
(`drlora.ops.loop.filling`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, islice
from unittest import mock

import torch

from benchmarks.harness import Row, alternate, append, where
from benchmarks.layers import Shape, make_experts, ours
from drlora.ops.loop import engine

# Hidden, width, experts, top k, tokens.
DECODED = [
    (128, 48, 64, 8, 50),
    (128, 192, 16, 8, 50),
    (256, 256, 64, 8, 50),
    (512, 256, 64, 8, 8),
    (512, 512, 64, 8, 50),
    (768, 512, 64, 8, 16),
    (1024, 1024, 64, 8, 8),
    (1024, 1024, 64, 8, 50),
    (2048, 1024, 64, 8, 1),
    (2048, 1024, 64, 8, 50),
]
TRAINED = [
    (128, 48, 64, 8, 640),
    (128, 48, 64, 8, 2560),
    (128, 128, 64, 8, 256),
    (128, 192, 16, 8, 100),
    (128, 192, 16, 8, 640),
    (256, 128, 32, 4, 512),
    (256, 256, 64, 8, 256),
    (256, 256, 64, 8, 2048),
    (512, 256, 64, 8, 64),
    (512, 256, 64, 8, 1024),
    (512, 512, 64, 8, 1024),
    (1024, 1024, 64, 8, 64),
    (1024, 1024, 64, 8, 512),
    (1024, 1024, 64, 8, 2048),
    (576, 1536, 8, 2, 1280),
    (2048, 1024, 64, 8, 722),
]
FILLED = [
    (256, 256, 64, 8, 2048),
    (512, 256, 64, 8, 1024),
    (1024, 1024, 64, 8, 512),
    (1024, 1024, 64, 8, 2048),
    (576, 1536, 8, 2, 1280),
    (2048, 1024, 64, 8, 722),
    (2048, 1024, 64, 8, 2048),
]
RANK, RANKS = 16, (4, 8, 10, 13, 16, 20, 27, 30)  # the second have the first as their mean
WAYS = {"bfloat16": 0.0, "widened": float("inf")}  # PAYS_FROM of each


def step_of(
    shape: Shape, pays_from: float, trains: bool, ranks: tuple[int, ...] = (RANK,)
) -> Callable[[], None]:
    """Forward, and backward if it trains, with fresh rows in each call."""
    layer = ours(make_experts(shape), shape, list(islice(cycle(ranks), shape.experts)))

    def step() -> None:
        x = torch.randn(shape.tokens, shape.hidden).to(shape.dtype).requires_grad_(trains)
        order = torch.rand(shape.tokens, shape.experts).argsort(dim=1)[:, : shape.top_k]
        weights = torch.rand(shape.tokens, shape.top_k).to(shape.dtype)
        on = nullcontext() if trains else torch.no_grad()
        with mock.patch.object(engine, "PAYS_FROM", pays_from), on:
            out = layer(x, order, weights.requires_grad_(trains))
            if trains:
                out.backward(torch.ones_like(out))

    return step


def run(shape: Shape, rounds: int, trains: bool) -> Row:
    """Seconds of both ways, and their ratio."""
    steps = {way: step_of(shape, least, trains) for way, least in WAYS.items()}
    timings = alternate(steps, rounds)
    ratios = [a / b for a, b in zip(*(timings[way].seconds for way in WAYS), strict=True)]
    chosen = min(shape.experts, shape.tokens * shape.top_k)
    rows = shape.tokens * shape.top_k / chosen
    name = shape.name if trains else f"{shape.name} forward"
    row: Row = {"case": name, "implementation": "bfloat16 over widened"}
    row |= {f"{way}_s": timings[way].median for way in WAYS}
    row |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    row["saved"] = engine.work_saved(rows, shape.hidden, shape.width)
    return {**row, "rounds": rounds, **where()}


def run_filled(shape: Shape, rounds: int, ranks: tuple[int, ...]) -> Row:
    """Seconds of a training pass in bfloat16 with rows and ranks filled up and as they are."""
    filled = step_of(shape, 0.0, True, ranks)

    def unfilled() -> None:
        with mock.patch.object(engine, "fill", lambda plan, masks, work: (plan, masks)):
            filled()

    timings = alternate({"filled": filled, "unfilled": unfilled}, rounds)
    ratios = [
        a / b for a, b in zip(timings["filled"].seconds, timings["unfilled"].seconds, strict=True)
    ]
    name = f"{shape.name} {'one rank' if len(ranks) == 1 else 'unequal ranks'}"
    row: Row = {"case": name, "implementation": "filled over unfilled"}
    row |= {f"{way}_s": timings[way].median for way in timings}
    row |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {**row, "rounds": rounds, **where()}


def main(argv: list[str] | None = None) -> int:
    """Time all cases and append the rows to benchmarks/results/sixteen_bits.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    for sizes, trains in [*((s, True) for s in TRAINED), *((s, False) for s in DECODED)]:
        row = run(Shape(*sizes, torch.bfloat16), arguments.rounds, trains)
        print(
            f"{row['case']:52} {row['saved'] / 1e6:6.0f} million saved: bfloat16 "
            f"{1e3 * row['bfloat16_s']:.1f} ms, widened {1e3 * row['widened_s']:.1f} ms, ratio "
            f"{row['ratio']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]",
            flush=True,
        )
        if not arguments.dry:
            append("sixteen_bits", [row])
    for sizes, ranks in [(sizes, ranks) for sizes in FILLED for ranks in ((RANK,), RANKS)]:
        row = run_filled(Shape(*sizes, torch.bfloat16), arguments.rounds, ranks)
        print(
            f"{row['case']:52} filled {1e3 * row['filled_s']:.1f} ms, unfilled "
            f"{1e3 * row['unfilled_s']:.1f} ms, ratio {row['ratio']:.2f} [{row['lowest']:.2f}, "
            f"{row['highest']:.2f}]",
            flush=True,
        )
        if not arguments.dry:
            append("sixteen_bits", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
