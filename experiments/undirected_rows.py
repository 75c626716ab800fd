"""Rows of A without a direction: three codes side by side, paired by seed.

    python experiments/undirected_rows.py

Reads the packed results of undirected-rows.yaml, -before.yaml and -drawn.yaml, which differ in the
commit that they were run with alone, and writes the gain in held-out loss over `before`, in per
cent, to experiments/results/undirected-rows/gains.json.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drlora.compare.statistics import interval

RESULTS = Path(__file__).parent / "results"
CODES = {"as drawn": "undirected-rows-drawn", "as long as the others": "undirected-rows"}


def cells(name: str) -> dict[int, dict[str, Any]]:
    """Seed -> its run."""
    with gzip.open(RESULTS / name / "cells.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["seed"]: row for row in rows if "seed" in row}


def main() -> None:
    """Write the gains."""
    before = cells("undirected-rows-before")
    loss = {seed: row["after"]["loss"]["loss"] for seed, row in before.items()}
    found: dict[str, Any] = {"before": {"commit": next(iter(before.values()))["source"]["commit"]}}
    for code, name in CODES.items():
        runs = cells(name)
        assert set(runs) == set(before)
        gains = {s: 100 * (1 - runs[s]["after"]["loss"]["loss"] / loss[s]) for s in sorted(runs)}
        about = {"commit": next(iter(runs.values()))["source"]["commit"]}
        found[code] = {**about, "gains": gains, "mean": asdict(interval([*gains.values()]))}
    text = json.dumps(found, indent=1) + "\n"
    (RESULTS / "undirected-rows" / "gains.json").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
