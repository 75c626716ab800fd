"""`drlora compare`: read a plan, run what is missing, write the page, say how it stands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from drlora.compare.metrics import METRICS
from drlora.compare.page import write_page
from drlora.compare.plan import load_plan
from drlora.compare.results import Folder, Matrix, read_matrix
from drlora.compare.run import Pool, make_pool, open_cells, run_plan
from drlora.compare.statistics import interval
from drlora.io.run_files import README

EXIT_FAILED = 1


def compare(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    only_page: bool = False,
    retry_failed: bool = False,
    as_json: bool = False,
) -> int:
    """Run the plan in `path` as far as it is not run yet, and write its page.

    Args:
        path: the plan.
        overrides: `key=value` on top of it.
        jobs: runs at once; by default one a core.
        threads: threads of each; by default the cores shared out.
        dry_run: only say what would be run.
        only_page: write the page of what there is, run nothing.
        retry_failed: run the cells again that failed before.
        as_json: print the outcome as JSON.

    Returns:
        The exit code: 0, or 1 if a cell has failed.

    Raises:
        ConfigError: before anything is run, with what is wrong and the way out.
    """
    plan = load_plan(path, overrides)
    folder = Folder.of(plan)
    pool = make_pool(jobs, threads)
    console = Console(highlight=False, soft_wrap=True, markup=False, stderr=as_json)
    matrix = read_matrix(plan, folder)
    if not (dry_run or only_page):
        console.print(f"{_state(matrix)}; {pool.jobs} at once, {pool.threads} threads each")
        matrix = run_plan(plan, folder, pool, console, retry_failed)
        folder.pack([*matrix.tune, *matrix.compare], matrix.results)
    if dry_run:
        _print_cells(matrix, console)
        console.print(_estimate(matrix, pool))
    else:
        command = shlex.join(["drlora", "compare", str(path), *overrides])
        write_page(matrix, folder, command)
        console.print(f"the page is {folder.path / README}")
    console.print(_state(matrix))
    for failure in matrix.failures.values():
        console.print(f"failed: {failure['method']} on {failure['task']}: {failure['error']}")
    if as_json:
        print(json.dumps(_to_json(matrix), indent=2))
    return EXIT_FAILED if matrix.failures and not dry_run else 0


def _state(matrix: Matrix) -> str:
    """`12 of 24 cells done, 1 failed, 12 wait for the tuning`."""
    cells = matrix.cells
    done = sum(cell.key in matrix.results for cell in cells)
    text = f"{done} of {len(cells) + matrix.waiting} cells done, {len(matrix.failures)} failed"
    return f"{text}, {matrix.waiting} wait for the tuning" if matrix.waiting else text


def _print_cells(matrix: Matrix, console: Console) -> None:
    for cell in matrix.cells:
        state = "done" if cell.key in matrix.results else "open"
        state = "failed" if cell.key in matrix.failures else state
        tuned = " ".join(f"{key}={value}" for key, value in cell.tuned.items())
        console.print(f"{state:7} {cell.stage:8} {cell.name} {tuned}".rstrip())


def _estimate(matrix: Matrix, pool: Pool) -> str:
    """How long the rest takes, judged by what is finished."""
    missing = len(open_cells(matrix)) + matrix.waiting
    if not missing:
        return "nothing is left to run"
    if not matrix.results:
        return f"{missing} cells to run; the time is known once one is finished"
    seconds = fmean(result["wall_seconds"] for result in matrix.results.values())
    minutes = missing * seconds / min(pool.jobs, missing) / 60
    return f"{missing} cells to run at {seconds:.0f} s each: about {minutes:.0f} minutes"


def _to_json(matrix: Matrix) -> dict[str, Any]:
    """State, choices and means, for programs."""
    plan = matrix.plan
    places = [(mo, t, me) for mo in plan.models for t in plan.tasks for me in plan.methods]
    return {
        "cells": len(matrix.cells) + matrix.waiting,
        "done": sum(cell.key in matrix.results for cell in matrix.cells),
        "failed": len(matrix.failures),
        "waiting": matrix.waiting,
        "results": [
            {
                "model": model,
                "task": task,
                "method": method,
                "tuned": matrix.choices[model, task, method].settings
                if (model, task, method) in matrix.choices
                else None,
                "metrics": {
                    metric: vars(interval(list(values.values())))
                    for metric in METRICS
                    if (values := matrix.values(metric, (model, task, method)))
                },
            }
            for model, task, method in places
        ],
    }
