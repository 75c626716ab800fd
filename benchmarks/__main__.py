"""All CPU benchmarks, the table and the chart: `make bench`, under ten minutes on two cores.

Writes benchmarks/results/table.md (what the README shows) and benchmarks/results/chart.svg from the
newest rows of each case in benchmarks/results/*.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from benchmarks import dynamics, experts_layer, memory, train_step
from benchmarks.harness import RESULTS

NAMES = {"hf_frozen": "transformers, frozen", "ours": "drlora", "masked r_max": "masked at r_max",
         "peft": "PEFT LoRA"}  # fmt: skip
COLOURS = {"ours": "#0072b2", "masked r_max": "#e69f00", "peft": "#999999"}


def newest(name: str) -> dict[tuple[str, str], dict]:
    """(case, implementation) -> the row that was appended last."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["case"], row["implementation"]): row for row in rows}


def table() -> str:
    """Ratios to the frozen base, PEFT's time over ours, and memory above the frozen base."""
    timed = {**newest("experts_layer"), **newest("train_step")}
    extra = {k: row["of_peft"] for k, row in newest("memory").items()}
    lines = [
        "| case | drlora / frozen | p20 - p80 | masked / frozen | PEFT / drlora | of PEFT memory |",
        "|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(case for case, _ in timed):
        mine = timed[case, "ours"]
        slow = timed.get((case, "masked r_max"))
        used = extra.get((case.replace("step ", "memory "), "ours"))
        slow_text = f"{slow['to_frozen']:.2f}" if slow else ""
        used_text = f"{used:.0%}" if used is not None else ""
        lines.append(
            f"| {case} | {mine['to_frozen']:.2f} | {mine['to_frozen_p20']:.2f} - "
            f"{mine['to_frozen_p80']:.2f} | {slow_text} | {mine['peft_over_this']:.1f} | "
            f"{used_text} |"
        )
    any_row = next(iter(timed.values()))
    lines.append("")
    lines.append(
        f"{any_row['device']}; torch {any_row['torch']}, transformers {any_row['transformers']}, "
        f"PEFT {any_row['peft']}; {any_row['date']}. Medians of ratios in one process."
    )
    return "\n".join(lines) + "\n"


def chart() -> None:
    """Time as a multiple of the frozen base, one group of bars a case."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    timed = {**newest("experts_layer"), **newest("train_step")}
    cases = list(dict.fromkeys(case for case, _ in timed))
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(cases) + 1.2))
    for offset, kind in enumerate(COLOURS):
        values = [timed.get((case, kind), {}).get("to_frozen", 0) for case in cases]
        places = [position + 0.27 * (offset - 1) for position in range(len(cases))]
        axes.barh(places, values, height=0.25, color=COLOURS[kind], label=NAMES[kind])
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of the frozen base (shorter is better)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "chart.svg", transparent=True)


def main(argv: list[str] | None = None) -> int:
    """Run everything, then make the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-table", action="store_true", help="from the rows that are there")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    if not arguments.only_table:
        experts_layer.main(["--masked", "--rounds", "7"])
        train_step.main(["--rounds", "7"])
        dynamics.main(["--rounds", "15"])
        memory.main([])
    text = table()
    (RESULTS / "table.md").write_text(text, "utf-8")
    chart()
    print(text)
    print(f"{time.monotonic() - started:.0f} s; table and chart are in {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
