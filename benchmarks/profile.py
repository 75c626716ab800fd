"""Where the CPU engine's time goes, and what the least would be: `python -m benchmarks.profile`.

Layers of `benchmarks.experts_layer` and steps of `benchmarks.train_step`, forward and backward, in
milliseconds. `by_kind_ms` splits one core's time by kind of work. `least_ms` is the physical limit:
all products, LoRA's included, at the best rate that large products reach here, or the frozen
experts' weights read twice at the best rate of memory, whichever is longer. What the ratios of the
other benchmarks would be at that limit stands beside what they are: `to_frozen` and
`least_to_frozen`, `peft_over_ours` and `peft_over_least`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.experts_layer import (
    HOW,
    LEAST,
    MEAN,
    SHAPES,
    batches_of,
    load_of,
    rank_met,
    ranks_of,
)
from benchmarks.growth_of_cost import TERMS, counts
from benchmarks.harness import Row, alternate, append, parser, where
from benchmarks.layers import Shape, make_experts, ours, peft, step_of
from benchmarks.models import ModelShape, training_step, twins
from benchmarks.models import ours as our_model
from benchmarks.models import peft as peft_model
from benchmarks.train_step import RANK, REALISTIC
from benchmarks.train_step import SHAPES as MODEL_SHAPES

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addmv_", "aten::bmm",
                 "aten::baddbmm", "aten::mkldnn_linear"),
    "gate": ("aten::silu", "aten::silu_backward", "aten::sigmoid"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                  "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
    "other element-wise": ("aten::mul", "aten::mul_", "aten::sum", "aten::copy_", "aten::add_",
                           "aten::add", "aten::fill_", "aten::pow", "aten::mean", "aten::rsqrt",
                           "aten::neg", "aten::div", "aten::cat", "aten::_softmax",
                           "aten::_log_softmax", "aten::_softmax_backward_data",
                           "aten::_log_softmax_backward_data"),
    "gather and sum by token": ("aten::index_select", "aten::_embedding_bag", "aten::index",
                                "aten::_embedding_bag_forward_only", "aten::sort"),
}  # fmt: skip
SIZES = (512, 768, 1024, 2048)


def milliseconds(step: Callable[[], object], rounds: int) -> float:
    """Median of some calls."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken[1:])


def product_gflops(rounds: int, dtype: torch.dtype) -> float:
    """The best rate of square products, of all threads that torch has now."""
    rates = []
    for size in SIZES:
        left, right, out = (torch.randn(size, size).to(dtype) for _ in range(3))
        taken = milliseconds(partial(torch.mm, left, right, out=out), 4 * rounds)
        rates.append(2 * size**3 / taken / 1e6)
    return max(rates)


def gigabytes_per_second(rounds: int, size: int = 1 << 28) -> float:
    """The rate at which numbers that are in no cache are read, of all threads."""
    numbers = torch.ones(size // 4)
    return size / milliseconds(numbers.sum, rounds) / 1e6


def gflop_of(shape: Shape, rank: float) -> float:
    """Of forward, dX and the factors' gradients: no gradient of a base weight."""
    base = 3 * shape.hidden * shape.width  # gate_up and down, a routed row
    lora = rank * (2 * shape.hidden + 3 * shape.width)
    return 2 * shape.tokens * shape.top_k * (2 * base + 3 * lora) / 1e9


def weights_of(shape: Shape | ModelShape) -> int:
    """Numbers of the experts of one layer."""
    return 3 * shape.experts * shape.hidden * shape.width


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
    return {kind: found[kind] for kind in KINDS if found[kind]}


def measured(
    steps: dict[str, Callable[[], object]],
    gflop: float,
    weights: int,
    dtype: torch.dtype,
    rounds: int,
    passes: int = 1,
) -> Row:
    """Times of `ours`, `frozen` and `peft`, and the limit, on all cores and on one.

    `weights` is how many numbers the frozen experts have.
    """
    threads = torch.get_num_threads()
    timings = alternate(steps, rounds, warmup=1, calls=passes)
    mine, frozen, other = (timings[name] for name in ("ours", "frozen", "peft"))
    gigabytes = 2 * weights * dtype.itemsize / 1e9  # once forwards, once for dX
    least = max(gflop / product_gflops(rounds, dtype), gigabytes / gigabytes_per_second(rounds))
    torch.set_num_threads(1)
    one_core = {name: milliseconds(steps[name], rounds) for name in ("ours", "frozen")}
    kinds = by_kind(steps["ours"], rounds)
    rate, reading = product_gflops(rounds, dtype), gigabytes_per_second(rounds)
    torch.set_num_threads(threads)
    return {
        "one_core_ms": one_core["ours"],
        "frozen_one_core_ms": one_core["frozen"],
        "all_cores_ms": 1e3 * mine.median,
        "frozen_all_cores_ms": 1e3 * frozen.median,
        "cores_gain": one_core["ours"] / 1e3 / mine.median,
        "frozen_cores_gain": one_core["frozen"] / 1e3 / frozen.median,
        "by_kind_ms": kinds,
        "python_and_views_ms": one_core["ours"] - sum(kinds.values()),
        "gflop": gflop,
        "product_gflops": rate,
        "gigabytes": gigabytes,
        "gigabytes_per_s": reading,
        "least_ms": 1e3 * max(gflop / rate, gigabytes / reading),
        "least_all_cores_ms": 1e3 * least,
        "to_frozen": mine.ratio_to(frozen)[0],
        "least_to_frozen": least / frozen.median,
        "peft_over_ours": other.ratio_to(mine)[0],
        "peft_over_least": other.median / least,
        **where(),
    }


def layer(shape: Shape, how: str, rounds: int) -> Row:
    """One layer, ranks `independent` of the load or `following` it."""
    torch.manual_seed(0)
    batches, passes = batches_of(shape)
    experts = make_experts(shape)
    load_E = load_of(batches[0], shape)
    ranks = ranks_of(how, load_E)
    modules: dict[str, Any] = {"ours": ours(experts, shape, ranks), "frozen": experts,
                               "peft": peft(experts, MEAN)}  # fmt: skip
    steps = {name: step_of(module, *batches) for name, module in modules.items()}
    gflop = gflop_of(shape, rank_met(load_E, ranks))
    return {
        "case": f"profile {shape.name} {how}",
        **measured(steps, gflop, weights_of(shape), shape.dtype, rounds, passes),
        "lora_share_of_gflop": 1 - gflop_of(shape, 0) / gflop,
        "mean_rank": MEAN,
        "least_rank": LEAST,
    }


def whole_step(shape: ModelShape, rounds: int) -> Row:
    """One step of a model at one rank; its products by the formula of `growth_of_cost`."""
    models = twins(shape, "cpu", {
        "ours": lambda base: our_model(base, RANK),
        "frozen": lambda base: base,
        "peft": lambda base: peft_model(base, RANK),
    })  # fmt: skip
    steps = {name: training_step(model, shape) for name, model in models.items()}
    terms = dict(zip(TERMS, counts(shape, RANK), strict=True))
    gflop = (terms["base"] + terms["lora"] + terms["dense"]) / 1e9
    return {
        "case": f"profile step {shape.name} r{RANK}",
        **measured(steps, gflop, shape.layers * weights_of(shape), shape.dtype, rounds),
        "lora_share_of_gflop": terms["lora"] / 1e9 / gflop,
        "mean_rank": RANK,
        "least_rank": RANK,
    }


def main(argv: list[str] | None = None) -> int:
    """Profile the chosen cases and append the rows to benchmarks/results/profile.jsonl."""
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--layers", nargs="*", type=int, help="numbers of layers, or all")
    arguments.add_argument(
        "--steps", nargs="*", type=int, help="numbers of steps, 0 and 1 if unset"
    )
    chosen = arguments.parse_args(argv)
    layers = SHAPES if chosen.layers is None else [SHAPES[number] for number in chosen.layers]
    models = [*MODEL_SHAPES, *REALISTIC]
    steps = MODEL_SHAPES if chosen.steps is None else [models[number] for number in chosen.steps]
    cases = [partial(layer, shape, how) for shape in layers for how in HOW]
    cases += [partial(whole_step, shape) for shape in steps]
    for case in cases:
        row = case(rounds=chosen.rounds)
        parts = {**row["by_kind_ms"], "Python, views": row["python_and_views_ms"]}
        print(f"{row['case']}: {row['one_core_ms']:.0f} ms on one core")
        print("  " + ", ".join(f"{kind} {ms:.0f}" for kind, ms in parts.items()))
        print(f"  the least is {row['least_ms']:.0f} ms, at {row['product_gflops']:.0f} GFLOP/s or "
              f"{row['gigabytes_per_s']:.0f} GB/s; all cores: {row['cores_gain']:.2f} times "
              f"(frozen {row['frozen_cores_gain']:.2f})\n"
              f"  over frozen {row['to_frozen']:.2f}, at the limit {row['least_to_frozen']:.2f}; "
              f"PEFT over ours {row['peft_over_ours']:.1f}, at the limit "
              f"{row['peft_over_least']:.1f}", flush=True)  # fmt: skip
        if not chosen.dry:
            append("profile", [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
