"""Forward and backward of one adapted expert layer: `python -m benchmarks.experts_layer [CASE]`.

Ranks run from 8 to 64 with mean 16: once drawn independently of the routing, once following the
load, as DR-LoRA makes them. Before anything is timed, output and gradients of every implementation
are checked against the naive definition (benchmarks/checks.py).

In 16 bits each pass has a routing of its own, as in training, and a turn is several passes: oneDNN
writes code for each shape that it has not seen lately, so the same rows in every pass would flatter
those whose rows are as they come, and what one implementation pushed out would be laid to another.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import lru_cache, partial

import torch

from benchmarks.checks import Reference, check_peft, results_of
from benchmarks.harness import Row, alternate, parser, rows_of, run_cases
from benchmarks.layers import (
    Inputs,
    Shape,
    make_batches,
    make_experts,
    make_inputs,
    masked,
    ours,
    peft,
    step_of,
    uneven_ranks,
)

SHAPES = [
    Shape(512, 256, 64, 8, 1024),
    Shape(1024, 1024, 64, 8, 2048),
    Shape(256, 256, 64, 8, 2048),
    Shape(1024, 1024, 64, 8, 2048, torch.bfloat16),
    Shape(256, 256, 64, 8, 2048, torch.bfloat16),
]
HOW = ("independent", "following")
LEAST, MEAN, MOST = 8, 16, 64
BATCHES, PASSES = 8, 2  # in 16 bits: batches in turn, passes a turn
SKEW = 0.55  # so that ranks that follow the load meet rank 23 to 31 on average


def batches_of(shape: Shape) -> tuple[list[Inputs], int]:
    """The batches that passes take in turn, and how many passes a turn is; see the module."""
    writes_code = shape.dtype.itemsize == 2
    batches = make_batches(shape, SKEW, BATCHES if writes_code else 1)
    return batches, PASSES if writes_code else 1


def load_of(inputs: Inputs, shape: Shape) -> torch.Tensor:
    """(E,) routed rows of each expert, on the host."""
    return torch.bincount(inputs.index.flatten(), minlength=shape.experts).cpu()


def ranks_of(how: str, load_E: torch.Tensor) -> list[int]:
    """Unequal ranks, `independent` of the load or `following` it."""
    independent = how == "independent"
    order = torch.randperm(len(load_E)) if independent else load_E.argsort(descending=True)
    return uneven_ranks(len(load_E), LEAST, MEAN, MOST, order)


def rank_met(load_E: torch.Tensor, ranks: list[int]) -> float:
    """The rank that a routed row meets, on average."""
    return round(float((load_E * torch.tensor(ranks)).sum() / load_E.sum()), 1)


@lru_cache
def slower_than_float32(shape: Shape) -> float:
    """How many times slower the frozen layer is than in float32, with few tokens.

    Processors without AVX-512 multiply bfloat16 by hand, which takes minutes at these sizes.
    """
    few = replace(shape, tokens=max(1, shape.tokens // 32))
    seconds = []
    for one in (replace(few, dtype=torch.float32), few):
        step = step_of(make_experts(one), make_inputs(one, SKEW))
        step()  # writes the code of its products
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds[1] / seconds[0]


def run(
    case: tuple[Shape, str],
    rounds: int,
    seconds: float | None,
    with_masked: bool,
    at_most: float = math.inf,
) -> list[Row]:
    """Check, then time one shape at one kind of ranks; nothing if `at_most` forbids it."""
    shape, how = case
    if at_most < math.inf and (slower := slower_than_float32(shape)) > at_most:
        print(f"layer {shape.name} {how}: skipped, {slower:.0f} times slower than float32 here")
        return []
    torch.manual_seed(0)
    batches, passes = batches_of(shape)
    inputs, experts = batches[0], make_experts(shape)
    load_E = load_of(inputs, shape)
    ranks = ranks_of(how, load_E)
    modules = {"hf_frozen": experts, "ours": ours(experts, shape, ranks),
               "peft": peft(experts, MEAN)}  # fmt: skip
    Reference(modules["ours"], experts, shape, ranks, inputs).check(
        results_of(modules["ours"], inputs)
    )
    check_peft(modules["peft"], experts, shape, inputs, MEAN)
    if with_masked:
        modules["masked r_max"] = masked(experts, shape, ranks)
        Reference(modules["masked r_max"], experts, shape, ranks, inputs, make=masked).check(
            results_of(modules["masked r_max"], inputs)
        )
    steps = {name: step_of(module, *batches) for name, module in modules.items()}
    hurried = {"warmup": 1, "seconds": seconds} if seconds else {}
    timings = alternate(steps, rounds, calls=passes, **hurried)
    return rows_of(
        f"layer {shape.name} {how}", timings, "hf_frozen", "peft",
        mean_rank=MEAN, mean_rank_met=rank_met(load_E, ranks), routings=len(batches),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Time the chosen cases and append the rows to benchmarks/results/experts_layer.jsonl."""
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("cases", nargs="*", type=int, help="numbers of shapes, all by default")
    arguments.add_argument("--masked", action="store_true", help="also time the paper's masked way")
    arguments.add_argument(
        "--at-most",
        type=float,
        default=math.inf,
        help="skip shapes whose frozen layer is more times slower than in float32",
    )
    chosen = arguments.parse_args(argv)
    shapes = [SHAPES[number] for number in chosen.cases] or SHAPES
    measure = partial(
        run,
        rounds=chosen.rounds,
        seconds=chosen.seconds,
        with_masked=chosen.masked,
        at_most=chosen.at_most,
    )
    run_cases("experts_layer", [(s, how) for s in shapes for how in HOW], measure, chosen.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
