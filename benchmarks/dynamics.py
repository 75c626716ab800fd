"""What statistics and growth cost: `python -m benchmarks.dynamics`.

The same model and engine twice: once with fixed ranks and no observation at all, once with
routing counted, importance taken each step, growth events and the correction of young rows.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.harness import alternate, append, rows_of
from benchmarks.models import ModelShape, make_base, optimizer_step, ours
from drlora import RankDynamics
from drlora.layer import DrLoraExperts

SHAPE = ModelShape(512, 256, 64, 8, 4, 1024)
GROWTH = {"r_init": 8, "r_target": 16, "r_max": 64, "p_grow": 0.2, "grow_every": 4,
          "warmup_steps": 1, "settle_steps": 1}  # fmt: skip


def run(rounds: int) -> list[dict]:
    """Time both; half of the rows are young throughout, the dearest case."""
    fixed = ours(make_base(SHAPE), 16)
    for layer in fixed.modules():
        if isinstance(layer, DrLoraExperts):
            layer._observe = lambda adapter, out, *rest: out  # type: ignore[method-assign]
    growing = ours(make_base(SHAPE), 16, **GROWTH)
    dynamics = RankDynamics(growing, total_steps=12)
    grow = optimizer_step(growing, SHAPE, dynamics)
    for _ in range(12):  # spend the budget, so that both work at the same mean rank
        grow()
    assert dynamics.budget()[0] == dynamics.budget()[1]
    steps = {"fixed ranks": optimizer_step(fixed, SHAPE), "with dynamics": grow}
    timings = alternate(steps, rounds)
    return rows_of(f"dynamics {SHAPE.name} r16", timings, "fixed ranks", "")


def main(argv: list[str] | None = None) -> int:
    """Time it and append the rows to benchmarks/results/dynamics.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    rows = run(arguments.rounds)
    for row in rows:
        print(
            f"{row['implementation']:14} {row['median_s'] * 1e3:8.1f} ms  to fixed "
            f"{row['to_frozen']:.3f} [{row['to_frozen_p20']:.3f}, {row['to_frozen_p80']:.3f}]"
        )
    if not arguments.dry:
        append("dynamics", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
