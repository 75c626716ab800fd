"""A comparison: read a plan, run what is missing, write the page, say how it stands.

found = run_comparison("experiments/quick.yaml", progress=print)
found.matrix.values("loss", ("olmoe-tiny", "pronunciation", "drlora"))     # seed -> value
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from drlora.compare.cells import places
from drlora.compare.metrics import METRICS
from drlora.compare.page import write_page
from drlora.compare.plan import load_plan
from drlora.compare.results import Folder, Matrix, read_matrix
from drlora.compare.run import Pool, make_pool, open_cells, run_plan
from drlora.compare.statistics import interval
from drlora.io.run_files import README


@dataclass(frozen=True)
class Comparison:
    """How a plan stands.

    Attributes:
        matrix: the plan, its cells, their results and the errors of those that failed.
        pool: how many are, or would be, run at once.
        page: the page that was written; None after a dry run.
    """

    matrix: Matrix
    pool: Pool
    page: Path | None = None

    @property
    def total(self) -> int:
        """All cells of the plan, those included that can be named only after the tuning."""
        return len(self.matrix.cells) + self.matrix.waiting

    @property
    def done(self) -> int:
        """Cells that have a result."""
        return sum(cell.key in self.matrix.results for cell in self.matrix.cells)

    @property
    def failed(self) -> int:
        """Cells that ended with an error (`matrix.failures`)."""
        return len(self.matrix.failures)

    def __str__(self) -> str:
        """`12 of 24 cells done, 1 failed, 12 wait for the tuning`."""
        text = f"{self.done} of {self.total} cells done, {self.failed} failed"
        waiting = self.matrix.waiting
        return f"{text}, {waiting} wait for the tuning" if waiting else text

    def estimate(self) -> str:
        """How long the rest takes, judged by what is finished."""
        missing = len(open_cells(self.matrix)) + self.matrix.waiting
        if not missing:
            return "nothing is left to run"
        if not self.matrix.results:
            return f"{missing} cells to run; the time is known once one is finished"
        seconds = fmean(result["wall_seconds"] for result in self.matrix.results.values())
        minutes = missing * seconds / min(self.pool.jobs, missing) / 60
        return f"{missing} cells to run at {seconds:.0f} s each: about {minutes:.0f} minutes"

    def to_dict(self) -> dict[str, Any]:
        """State, choices and means, as plain values for JSON."""
        return {
            "cells": self.total,
            "done": self.done,
            "failed": self.failed,
            "waiting": self.matrix.waiting,
            "results": [_place_to_dict(self.matrix, place) for place in places(self.matrix.plan)],
        }


def run_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    only_page: bool = False,
    retry_failed: bool = False,
    progress: Callable[[str], object] | None = None,
) -> Comparison:
    """Run the plan in `path` as far as it is not run yet, and write its page.

    Stopped by Ctrl-C or killed, it goes on from where it was when it is called again.

    Args:
        path: the plan.
        overrides: `key=value` on top of it.
        jobs: runs at once; by default one a core.
        threads: threads of each; by default the cores shared out.
        dry_run: only say what would be run.
        only_page: write the page of what there is, run nothing.
        retry_failed: run the cells again that failed before.
        progress: is told how it stands at first, and a line for each cell that ends, such as
            `print`; by default nothing is said.

    Returns:
        How the plan stands. A cell that fails ends nothing: look at `failed`.

    Raises:
        ConfigError: before anything is run, with what is wrong and the way out.
    """
    tell = progress or _nobody
    plan = load_plan(path, overrides)
    folder = Folder.of(plan)
    pool = make_pool(jobs, threads)
    found = Comparison(read_matrix(plan, folder), pool)
    if dry_run:
        return found
    matrix = found.matrix
    if not only_page:
        tell(f"{found}; {pool.jobs} at once, {pool.threads} threads each")
        matrix = run_plan(plan, folder, pool, tell, retry_failed)
        folder.pack([*matrix.tune, *matrix.compare], matrix.results)
    write_page(matrix, folder, shlex.join(["drlora", "compare", str(path), *overrides]))
    return Comparison(matrix, pool, folder.path / README)


def _nobody(text: str) -> None:
    """Hears nothing."""


def _place_to_dict(matrix: Matrix, place: tuple[str, str, str]) -> dict[str, Any]:
    model, task, method = place
    return {
        "model": model,
        "task": task,
        "method": method,
        "tuned": matrix.choices[place].settings if place in matrix.choices else None,
        "metrics": {
            metric: vars(interval(list(values.values())))
            for metric in METRICS
            if (values := matrix.values(metric, place))
        },
    }
