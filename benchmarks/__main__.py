"""All CPU benchmarks, the table and the chart: `make bench`, ten to fifteen minutes on two cores.

Writes benchmarks/results/table.md (what docs/benchmarks.md shows) and chart.svg beside it. Cases
that take long get fewer rounds here, and bfloat16 layers are skipped, with a word, on a processor
that has no products for them; each benchmark alone runs all of its cases.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks import (
    dynamics,
    end_to_end,
    experts_layer,
    head,
    memory,
    quantised,
    quantised_loading,
    scaling,
    table,
    train_step,
)
from benchmarks.harness import RESULTS, add_names

PARTS = {
    "layers": lambda: experts_layer.main(
        ["--masked", "--rounds", "9", "--seconds", "10", "--at-most", "4"]
    ),
    "steps": lambda: train_step.main(["--rounds", "7", "--seconds", "40"]),
    "dynamics": lambda: dynamics.main(["--rounds", "11"]),
    "memory": lambda: memory.main([]),
    "scaling": lambda: scaling.main(["--short", "--rounds", "5"]),
    "quantised": lambda: quantised.main(["0", "--rounds", "5", "--seconds", "20"]),
    "head": lambda: head.main(["memory"]),
    "end-to-end": lambda: end_to_end.main(["--rounds", "1"]),
    "loading": lambda: quantised_loading.main(["bfloat16", "nf4-nested", "int8"]),
}


def main(argv: list[str] | None = None) -> int:
    """Run everything, then make the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_names(parser, PARTS)
    parser.add_argument("--only-table", action="store_true", help="from the rows that are there")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    for name in () if arguments.only_table else arguments.names:
        PARTS[name]()
        print(f"-- {name} done after {time.monotonic() - started:.0f} s", flush=True)
    print(table.write())
    print(f"{time.monotonic() - started:.0f} s; table and chart are in {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
