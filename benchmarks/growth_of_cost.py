"""What a training step costs as work grows: measured, fitted to a formula, and put on paper.

    PYTHONPATH=src python -m benchmarks.growth_of_cost [SWEEP ...] [--rounds 3]
    PYTHONPATH=src python -m benchmarks.growth_of_cost --fit      of the rows that are there

Each sweep changes one size of a random OLMoE in float32 and leaves the others: tokens, rank,
experts (8 to 512), layers, vocabulary, width. A step is forwards, backwards, statistics, growth
where it is due, and AdamW; the time is CPU seconds on one thread, sizes in turn. `processes` times
the sum of gradients over processes on this machine. The formula, per step:

    seconds = c0 + c1 base + c2 lora + c3 dense + c4 calls + c5 trained

    base     12 S d m a layer     frozen experts, forwards and the input's gradient (S = T k rows)
    lora     6 S r (2 d + 3 m)    A and B of gate_up and down, and their gradients
    dense    16 T d^2 + 4 T n d a layer, n the length of a sequence, and 4 T d V
    calls    experts that have rows, over all layers: what products of their own cost at least
    trained  numbers that are trained: statistics and optimizer

Coefficients are not negative; errors are relative. `paper` applies the same counts to
Qwen3-235B-A22B on 64 GPUs, at rates that are assumed and said.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import distributed, multiprocessing

import drlora
from benchmarks.harness import Row, add_names, append, percentile, read, where
from benchmarks.models import ModelShape, batch_of, make_base, ours
from drlora.evaluation.head import has_plain_head, losses_at_targets

BASE = ModelShape(256, 128, 32, 8, 2, 1024, vocab=4096, sequences=4)
RANK = 16
SWEEPS: dict[str, list[tuple[ModelShape, int]]] = {
    "tokens": [(replace(BASE, tokens=n), RANK) for n in (256, 512, 1024, 2048, 4096)],
    "rank": [(BASE, rank) for rank in (4, 8, 16, 32, 64)],
    "experts": [(replace(BASE, experts=n), RANK) for n in (8, 32, 128, 512)],
    "layers": [(replace(BASE, layers=n), RANK) for n in (1, 2, 4, 8)],
    "vocabulary": [(replace(BASE, vocab=n), RANK) for n in (1024, 4096, 32_768, 151_936)],
    "width": [(replace(BASE, hidden=n, width=n // 2), RANK) for n in (128, 256, 512, 1024)],
}
TERMS = ("constant", "base", "lora", "dense", "calls", "trained")
MEGABYTES = (1, 4, 16, 64)
PROCESSES = (2, 4)


def counts(shape: ModelShape, rank: int) -> list[float]:
    """The terms of the formula, in the order of `TERMS`."""
    rows, d, m = shape.tokens * shape.top_k, shape.hidden, shape.width
    length = shape.tokens // shape.sequences
    dense = shape.layers * (16 * shape.tokens * d**2 + 4 * shape.tokens * length * d)
    # With k of E by lot, an expert is left without rows with this probability.
    empty = (1 - shape.top_k / shape.experts) ** shape.tokens
    return [
        1.0,
        shape.layers * 12.0 * rows * d * m,
        shape.layers * 6.0 * rows * rank * (2 * d + 3 * m),
        float(dense + 4 * shape.tokens * d * shape.vocab),
        shape.layers * shape.experts * (1 - empty),
        float(shape.layers * shape.experts * rank * (2 * d + 3 * m)),
    ]


def step_of(shape: ModelShape, rank: int) -> Callable[[], None]:
    """A step of a new model; ranks grow in every second."""
    model = ours(make_base(shape), rank, r_init=max(1, rank // 2), r_max=2 * rank, p_grow=1.0,
                 grow_every=2, warmup_steps=0, settle_steps=0)  # fmt: skip
    base: Any = model.get_base_model()  # type: ignore[operator]
    dynamics = drlora.RankDynamics(model, 10_000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids, in_chunks = batch_of(shape, "cpu"), has_plain_head(base)

    def step() -> None:
        if in_chunks:
            loss = losses_at_targets(base, ids, input_ids=ids).mean()
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()

    return step


def sweep(name: str, rounds: int) -> list[Row]:
    """CPU seconds of each size, in turn."""
    sizes = SWEEPS[name]
    steps = [step_of(shape, rank) for shape, rank in sizes]
    taken: list[list[float]] = [[] for _ in sizes]
    for number in range(rounds + 1):
        for step, seconds in zip(steps, taken, strict=True):
            began = time.process_time()
            step()
            if number:
                seconds.append(time.process_time() - began)
    return [
        {
            "case": f"growth of cost, {name}: {shape.name} V{shape.vocab} r{rank}",
            "implementation": "ours", "sweep": name, "terms": counts(shape, rank),
            "cpu_s": percentile(seconds, 50), "all_cpu_s": seconds, **where(),
        }
        for (shape, rank), seconds in zip(sizes, taken, strict=True)
    ]  # fmt: skip


def sum_over_processes(rounds: int) -> list[Row]:
    """Wall seconds to sum gradients of so many megabytes over processes on this machine."""
    rows: list[Row] = []
    for count in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            found = os.path.join(folder, "found.pt")
            multiprocessing.spawn(_sum, (count, f"file://{folder}/meet", rounds, found), count)
            seconds = torch.load(found)
        rows += [
            {
                "case": f"growth of cost, processes: {count}, {size} MB", "implementation": "gloo",
                "sweep": "processes", "processes": count, "megabytes": size, "wall_s": median,
                **where(),
            }
            for size, median in zip(MEGABYTES, seconds, strict=True)
        ]  # fmt: skip
    return rows


def _sum(number: int, count: int, meet: str, rounds: int, found: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meet, rank=number, world_size=count)
    medians = []
    for size in MEGABYTES:
        gradient, seconds = torch.ones(size * 2**18), []
        for _ in range(rounds + 1):
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce(gradient)
            seconds.append(time.perf_counter() - began)
        medians.append(percentile(seconds[1:], 50))
    if number == 0:
        torch.save(medians, found)
    distributed.destroy_process_group()


def fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[list[float], float]:
    """Coefficients of the formula, none below 0, and the largest relative error.

    Few terms: each set of them is fitted alone, and of those without a negative one the best is it.
    """
    x, t = (torch.tensor(v, dtype=torch.float64) for v in (terms, seconds))
    scale = x.abs().amax(dim=0).clamp(min=1e-300)
    design, ones = x / scale / t[:, None], torch.ones_like(t)[:, None]
    best, least = torch.zeros(x.shape[1], dtype=torch.float64), float(len(t))
    for size in range(1, x.shape[1] + 1):
        for kept in itertools.combinations(range(x.shape[1]), size):
            found = torch.linalg.lstsq(design[:, kept], ones, driver="gelsd").solution[:, 0]
            off = float((design[:, kept] @ found - 1).square().sum())
            if float(found.min()) >= 0 and off < least:
                best, least = torch.zeros_like(best), off
                best[list(kept)] = found
    error = float((design @ best - 1).abs().max())
    return (best / scale).tolist(), error


def report(rows: Sequence[Row]) -> str:
    """The fit of the newest row of each size, and how far each sweep is off it."""
    newest = {row["case"]: row for row in rows if "terms" in row}.values()
    if len(newest) < len(TERMS):
        return "too few sizes for a fit"
    coefficients, worst = fit([r["terms"] for r in newest], [r["cpu_s"] for r in newest])
    lines = [f"{name:9} {value:.3e}" for name, value in zip(TERMS, coefficients, strict=True)]
    for name in SWEEPS:
        off = [
            sum(c * t for c, t in zip(coefficients, row["terms"], strict=True)) / row["cpu_s"] - 1
            for row in newest
            if row["sweep"] == name
        ]
        if off:
            lines.append(f"{name}: off by {min(off):+.1%} to {max(off):+.1%}")
    return "\n".join([*lines, f"at most {worst:.1%} off"])


# Sizes from the model's own configuration.
QWEN3_235B = ModelShape(4096, 1536, 128, 8, 94, 64 * 8192, torch.bfloat16, 151_936, sequences=64)
ASSUMED = {
    "gpus": 64,
    "product_flops": 790e12,  # of large bfloat16 products on one H200, as others measured it
    "share_of_it": 0.4,  # that a whole step reaches
    "lora_over_products": 2.0,  # LoRA's narrow products run at half the wide ones' rate
    "recomputed": 1.33,  # gradient checkpointing runs the forward pass twice
    "link_bytes_s": 50e9,  # that a GPU sends and receives beside its own machine
    "weight_bytes": 470e9,
    "gathers": 3,  # of all weights a step: forwards, again for checkpointing, backwards
}


def paper(rank: int = RANK) -> Row:
    """Seconds of a step of Qwen3-235B-A22B on 64 GPUs, 8,192 tokens each, weights sharded."""
    shape, a = QWEN3_235B, ASSUMED
    _, base, lora, dense, _, trained = counts(shape, rank)
    rate = a["gpus"] * a["product_flops"] * a["share_of_it"]
    products = (base + lora * a["lora_over_products"] + dense) * a["recomputed"] / rate
    share = (a["gpus"] - 1) / a["gpus"]
    weights = a["gathers"] * a["weight_bytes"] * share / a["link_bytes_s"]
    gradients = 2 * 4 * trained * share / a["link_bytes_s"]
    return {
        "case": f"growth of cost, paper: Qwen3-235B-A22B r{rank}, 64 x 8,192 tokens",
        "implementation": "ours, computed", "assumed": a, "products_s": products,
        "weights_s": weights, "gradients_s": gradients, "trained_numbers": trained,
        "tokens_per_s": shape.tokens / max(products, weights + gradients),
        "lora_share_of_flops": lora / (base + lora + dense),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure the sweeps, append rows to benchmarks/results/growth_of_cost.jsonl, print the fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_names(parser, [*SWEEPS, "processes"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    parser.add_argument("--fit", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    measured = []
    for name in () if options.fit else options.names:
        is_sum = name == "processes"
        rows = sum_over_processes(options.rounds) if is_sum else sweep(name, options.rounds)
        for row in rows:
            print(f"{row['case']:70} {row.get('cpu_s', row.get('wall_s')):9.4f} s", flush=True)
        measured += rows
        if not options.dry:
            append("growth_of_cost", rows)
    print(report(measured if options.dry else read("growth_of_cost")))
    figures = paper()
    print("; ".join(f"{k} {v:.3g}" for k, v in figures.items() if isinstance(v, float)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
