"""How the layer's time grows with experts, tokens and ranks: `python -m benchmarks.scaling`.

At a fixed number of routed rows experts go from 8 to 256; then tokens and ranks are doubled. All
sizes of a sweep take turns in one process, each beside the frozen layer of its size, so that times
at different sizes can be compared too. `verdicts` says what became of the bars.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.checks import Reference, results_of
from benchmarks.experts_layer import SKEW
from benchmarks.harness import Row, Timing, add_names, alternate, parser, rows_of, run_cases
from benchmarks.layers import Shape, make_experts, make_inputs, ours, step_of

EXPERTS = [Shape(512, 256, experts, 8, 1024) for experts in (8, 16, 32, 64, 128, 256)]
TOKENS = [Shape(512, 256, 64, 8, tokens) for tokens in (512, 1024, 2048, 4096)]
RANKS = [8, 16, 32, 64]
RANK = 16
SWEEPS: dict[str, list[tuple[Shape, int]]] = {
    "experts": [(shape, RANK) for shape in EXPERTS],
    "tokens": [(shape, RANK) for shape in TOKENS],
    "rank": [(Shape(512, 256, 64, 8, 1024), rank) for rank in RANKS],
}
BARS = {
    "256 experts over 8, beyond the frozen base's own growth": 1.5,
    "time off a straight line in tokens, at most": 0.10,
    "time off a straight line in the rank, at most": 0.10,
}


def run(sweep: str, rounds: int, seconds: float | None, short: bool) -> list[Row]:
    """Time all sizes of one sweep in turn, ours at one rank beside the frozen layer."""
    sizes = SWEEPS[sweep]
    if short and sweep == "experts":
        sizes = [sizes[0], sizes[3], sizes[-1]]
    steps = {}
    for shape, rank in sizes:
        torch.manual_seed(0)
        inputs, experts = make_inputs(shape, SKEW), make_experts(shape)
        ranks = [rank] * shape.experts
        adapted = ours(experts, shape, ranks)
        Reference(adapted, experts, shape, ranks, inputs).check(results_of(adapted, inputs))
        steps[f"{shape.name} r{rank}", "hf_frozen"] = step_of(experts, inputs)
        steps[f"{shape.name} r{rank}", "ours"] = step_of(adapted, inputs)
    timed = alternate({" / ".join(key): step for key, step in steps.items()}, rounds, 1, seconds)
    rows = []
    for shape, rank in sizes:
        name = f"{shape.name} r{rank}"
        pair: dict[str, Timing] = {k: timed[f"{name} / {k}"] for k in ("hf_frozen", "ours")}
        rows += rows_of(
            f"scaling {sweep} {name}", pair, "hf_frozen", "", sweep=sweep, rank=rank,
            experts=shape.experts, tokens=shape.tokens,
        )  # fmt: skip
    return rows


def off_a_line(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Largest relative distance of times from the straight line that fits them best.

    The line may have an intercept; distances are weighted by the times, so that no size counts
    more than another.
    """
    x, t = (torch.tensor(v, dtype=torch.float64) for v in (sizes, times))
    design = torch.stack([torch.ones_like(x), x], dim=1) / t[:, None]
    line = torch.linalg.lstsq(design, torch.ones_like(t)[:, None]).solution
    return float((design @ line - 1).abs().max())


def verdicts(rows: list[Row]) -> dict[str, float]:
    """The figure of each bar, from the newest row of every case; what was not measured is left out.

    The first is the growth of ours / frozen from 8 to 256 experts. The others use median times of
    one process, in which the sizes took turns.
    """
    newest = {row["case"]: row for row in rows if row["implementation"] == "ours"}
    by_sweep: dict[str, dict[int, Row]] = {"experts": {}, "tokens": {}, "rank": {}}
    for row in newest.values():
        by_sweep[row["sweep"]][row[row["sweep"]]] = row
    names, found = list(BARS), {}
    experts = by_sweep["experts"]
    if {8, 256} <= experts.keys():
        found[names[0]] = experts[256]["to_frozen"] / experts[8]["to_frozen"]
    for name, sweep in zip(names[1:], ("tokens", "rank"), strict=True):
        sizes = sorted(by_sweep[sweep])
        if len(sizes) > 2:
            found[name] = off_a_line(sizes, [by_sweep[sweep][n]["median_s"] for n in sizes])
    return found


def report(figures: dict[str, float]) -> str:
    """One line a bar."""
    lines = []
    for name, figure in figures.items():
        verdict = "met" if figure <= BARS[name] else "NOT met"
        lines.append(f"{name}: {figure:.2f} (bar {BARS[name]:.2f}: {verdict})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the sweeps, append the rows to benchmarks/results/scaling.jsonl, print the verdicts."""
    arguments = parser(__doc__, rounds=7)
    add_names(arguments, SWEEPS)
    arguments.add_argument("--short", action="store_true", help="8, 64 and 256 experts only")
    chosen = arguments.parse_args(argv)
    measure = partial(run, rounds=chosen.rounds, seconds=chosen.seconds, short=chosen.short)
    rows = run_cases("scaling", chosen.names, measure, chosen.dry)
    print(report(verdicts(rows)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
