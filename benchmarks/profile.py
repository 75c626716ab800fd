"""Where the time of the CPU engine goes: `python -m benchmarks.profile`.

One layer, forward and backward on one core, in milliseconds by kind of work; beside it the least
that its products could take at the rate that this core reaches in one large product, and what is
gained by a second core. For the cases of `benchmarks.experts_layer` in float32.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.experts_layer import HOW, LEAST, MEAN, SHAPES, SKEW, load_of, rank_met, ranks_of
from benchmarks.harness import Row, append, parser, where
from benchmarks.layers import Shape, make_experts, make_inputs, ours, step_of

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addmv_"),
    "gate": ("aten::silu", "aten::silu_backward"),
    "other element-wise": ("aten::mul", "aten::mul_", "aten::sum", "aten::copy_", "aten::add_",
                           "aten::fill_"),
    "gather and sum by token": ("aten::index_select", "aten::_embedding_bag", "aten::index",
                                "aten::_embedding_bag_forward_only", "aten::sort"),
}  # fmt: skip


def milliseconds(step: Callable[[], object], rounds: int) -> float:
    """Median of some calls."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken[1:])


def product_gflops(rounds: int, size: int = 768) -> float:
    """What this core reaches in one square product."""
    left, right, out = (torch.randn(size, size) for _ in range(3))
    return 2 * size**3 / milliseconds(lambda: torch.mm(left, right, out=out), 4 * rounds) / 1e6


def gflop_of(shape: Shape, rank: float) -> float:
    """Of forward, dX and the factors' gradients: no gradient of a base weight."""
    base = 3 * shape.hidden * shape.width  # gate_up and down, a routed row
    lora = rank * (2 * shape.hidden + 3 * shape.width)
    return 2 * shape.tokens * shape.top_k * (2 * base + 3 * lora) / 1e9


def by_kind(step: Callable[[], object], rounds: int) -> dict[str, float]:
    """Milliseconds a call; what no operator of torch accounts for is Python and making views."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(rounds):
            step()
    found: Counter[str] = Counter()
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), None)
        if kind is not None:
            found[kind] += event.self_cpu_time_total / 1e3 / rounds
    return {kind: found[kind] for kind in KINDS}


def run(shape: Shape, how: str, rounds: int) -> Row:
    """One case."""
    torch.manual_seed(0)
    inputs, experts = make_inputs(shape, SKEW), make_experts(shape)
    load_E = load_of(inputs, shape)
    ranks = ranks_of(how, load_E)
    step = step_of(ours(experts, shape, ranks), inputs)
    frozen = step_of(experts, inputs)
    threads = torch.get_num_threads()
    all_cores = milliseconds(step, rounds), milliseconds(frozen, rounds)
    torch.set_num_threads(1)
    one_core = milliseconds(step, rounds), milliseconds(frozen, rounds)
    kinds, rate = by_kind(step, rounds), product_gflops(rounds)
    torch.set_num_threads(threads)
    gflop = gflop_of(shape, rank_met(load_E, ranks))
    return {
        "case": f"profile {shape.name} {how}",
        "one_core_ms": one_core[0],
        "frozen_one_core_ms": one_core[1],
        "cores_gain": one_core[0] / all_cores[0],
        "frozen_cores_gain": one_core[1] / all_cores[1],
        "by_kind_ms": kinds,
        "python_and_views_ms": one_core[0] - sum(kinds.values()),
        "gflop": gflop,
        "lora_share_of_gflop": 1 - gflop_of(shape, 0) / gflop,
        "product_gflops": rate,
        "least_products_ms": 1e3 * gflop / rate,
        "mean_rank": MEAN,
        "least_rank": LEAST,
        **where(),
    }


def main(argv: list[str] | None = None) -> int:
    """Profile the chosen cases and append the rows to benchmarks/results/profile.jsonl."""
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("cases", nargs="*", type=int, help="numbers of shapes, float32 if unset")
    chosen = arguments.parse_args(argv)
    shapes = [s for s in SHAPES if s.dtype == torch.float32]
    for shape in [SHAPES[number] for number in chosen.cases] or shapes:
        for how in HOW:
            row = run(shape, how, chosen.rounds)
            parts = {**row["by_kind_ms"], "Python, views": row["python_and_views_ms"]}
            print(f"{row['case']}: {row['one_core_ms']:.0f} ms on one core")
            print("  " + ", ".join(f"{kind} {ms:.0f}" for kind, ms in parts.items()))
            print(f"  products at {row['product_gflops']:.0f} GFLOP/s would take "
                  f"{row['least_products_ms']:.0f} ms; all cores: {row['cores_gain']:.2f} times "
                  f"(frozen {row['frozen_cores_gain']:.2f})", flush=True)  # fmt: skip
            if not chosen.dry:
                append("profile", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
