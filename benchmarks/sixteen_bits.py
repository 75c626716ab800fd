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
    """Seconds with products in bfloat16 and with widened experts, and their ratio."""
    steps = {way: step_of(shape, least, trains) for way, least in WAYS.items()}
    chosen = min(shape.experts, shape.tokens * shape.top_k)
    saved = engine.work_saved(shape.tokens * shape.top_k / chosen, shape.hidden, shape.width)
    name = shape.name if trains else f"{shape.name} forward"
    return {**compared(name, steps, rounds), "saved": saved}


def run_filled(shape: Shape, rounds: int, ranks: tuple[int, ...]) -> Row:
    """Seconds of a training pass in bfloat16 with rows and ranks filled up and as they are."""
    filled = step_of(shape, 0.0, True, ranks)

    def unfilled() -> None:
        with mock.patch.object(engine, "fill", lambda plan, masks, work: (plan, masks)):
            filled()

    name = f"{shape.name} {'one rank' if len(ranks) == 1 else 'unequal ranks'}"
    return compared(name, {"filled": filled, "unfilled": unfilled}, rounds)


def compared(case: str, steps: dict[str, Callable[[], None]], rounds: int) -> Row:
    """Seconds of two ways, and the ratio of the first to the second."""
    timings = alternate(steps, rounds)
    ratios = [a / b for a, b in zip(*(timings[way].seconds for way in steps), strict=True)]
    row: Row = {"case": case, "implementation": " over ".join(steps)}
    row |= {f"{way}_s": timings[way].median for way in steps}
    row |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {**row, "rounds": rounds, **where()}


def tell(row: Row, dry: bool) -> None:
    """Print a row, and append it unless it is a try."""
    first, second = row["implementation"].split(" over ")
    saved = f" {row['saved'] / 1e6:6.1f} million saved:" if "saved" in row else ""
    print(
        f"{row['case']:52}{saved} {first} {1e3 * row[f'{first}_s']:.1f} ms, {second} "
        f"{1e3 * row[f'{second}_s']:.1f} ms, ratio {row['ratio']:.2f} [{row['lowest']:.2f}, "
        f"{row['highest']:.2f}]",
        flush=True,
    )
    if not dry:
        append("sixteen_bits", [row])


def main(argv: list[str] | None = None) -> int:
    """Time all cases and append the rows to benchmarks/results/sixteen_bits.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    for sizes, trains in [*((s, True) for s in TRAINED), *((s, False) for s in DECODED)]:
        tell(run(Shape(*sizes, torch.bfloat16), arguments.rounds, trains), arguments.dry)
    for sizes in FILLED:
        for ranks in ((RANK,), RANKS):
            row = run_filled(Shape(*sizes, torch.bfloat16), arguments.rounds, ranks)
            tell(row, arguments.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
