"""Run the cells of a plan: each in a process of its own, several at once, none twice.

The processes are forked from one server that has imported everything, which saves each cell the
seconds that importing takes. A cell's result is one file, written at once; a plan that is started
again goes on with what has no file, and a cell that was under way with its newest checkpoint.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any

from filelock import FileLock, Timeout

from drlora.compare.cells import Cell
from drlora.compare.plan import Plan
from drlora.compare.results import Folder, Matrix, read_matrix, write_result
from drlora.compare.worker import LOG_NAME, Work, run_cell
from drlora.errors import ConfigError
from drlora.io.plugins import loaded_plugins
from drlora.io.run_files import LOCK

LOG_LINES_KEPT = 20


@dataclass(frozen=True)
class Pool:
    """How cells are run: so many at once, each with so many threads."""

    jobs: int
    threads: int


def make_pool(jobs: int | None, threads: int | None) -> Pool:
    """By default one job a core, or one on a GPU, and the cores shared out among the jobs.

    Raises:
        ConfigError: if a number is below 1.
    """
    for name, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = jobs or cores or 1
    return Pool(jobs, threads or max(1, (cores or 1) // jobs))


def run_plan(
    plan: Plan,
    folder: Folder,
    pool: Pool,
    tell: Callable[[str], object],
    retry_failed: bool = False,
) -> Matrix:
    """Run what has no result yet: the tuning first, then the compared cells.

    Args:
        plan: what to run.
        folder: where results go; locked meanwhile.
        pool: how many at once.
        tell: is told a line for each cell that ends.
        retry_failed: run the cells again that failed before.

    Raises:
        ConfigError: if another process runs a comparison in this folder.
    """
    with _locked(folder):
        if retry_failed:
            for cell in read_matrix(plan, folder).cells:
                folder.failure_file(cell).unlink(missing_ok=True)
        tried: set[str] = set()
        while True:
            # After the tuning there are cells that could not be named before it.
            matrix = read_matrix(plan, folder)
            todo = [c for c in open_cells(matrix) if c.key not in tried]
            if not todo:
                return matrix
            tried |= {cell.key for cell in todo}
            _run_all(todo, folder, pool, tell)


def open_cells(matrix: Matrix) -> list[Cell]:
    """The cells that have neither a result nor an error."""
    return [c for c in matrix.cells if c.key not in matrix.results and c.key not in matrix.failures]


def _run_all(
    cells: Sequence[Cell], folder: Folder, pool: Pool, tell: Callable[[str], object]
) -> None:
    # Windows has no fork; there each process imports everything for itself.
    has_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_fork else "spawn")
    if has_fork:
        context.set_forkserver_preload(["drlora.compare.worker"])
    waiting = list(cells)
    running: dict[int, tuple[BaseProcess, Cell, float]] = {}
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < pool.jobs:
                cell = waiting.pop(0)
                process = context.Process(target=run_cell, args=(_work(cell, folder, pool),))
                process.start()
                running[process.sentinel] = (process, cell, time.monotonic())
            for sentinel in multiprocessing.connection.wait(list(running)):
                assert isinstance(sentinel, int)
                process, cell, started = running.pop(sentinel)
                process.join()
                done += 1
                failed = _note_failure(cell, folder, process.exitcode)
                said = f"failed: {failed}" if failed else f"{time.monotonic() - started:.0f} s"
                tell(f"[{done}/{len(cells)}] {cell.stage} {cell.name}: {said}")
    finally:
        for process, _, _ in running.values():
            process.terminate()
            process.join()


def _work(cell: Cell, folder: Folder, pool: Pool) -> Work:
    place = folder.runs / cell.name
    labels = {
        "key": cell.key,
        "stage": cell.stage,
        "model": cell.model,
        "task": cell.task,
        "method": cell.method,
        "tuned": cell.tuned,
    }
    recipe = replace(cell.recipe, output_dir=str(place / "run"))
    return Work(
        recipe, labels, place, folder.cell_file(cell), pool.threads, tuple(loaded_plugins())
    )


def _note_failure(cell: Cell, folder: Folder, exit_code: int | None) -> str | None:
    """Keep the error of a cell that left no result; returns it in one line."""
    if folder.results([cell]):
        folder.failure_file(cell).unlink(missing_ok=True)
        return None
    log = folder.runs / cell.name / LOG_NAME
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    told = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    if exit_code is not None and exit_code < 0:
        told = f"killed by signal {-exit_code}"
    write_result(
        folder.failure_file(cell),
        {
            "key": cell.key,
            "stage": cell.stage,
            "model": cell.model,
            "task": cell.task,
            "method": cell.method,
            "seed": cell.seed,
            "tuned": cell.tuned,
            "error": told,
            "exit_code": exit_code,
            "log": lines[-LOG_LINES_KEPT:],
        },
    )
    shutil.rmtree(folder.runs / cell.name, ignore_errors=True)
    return told


@contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """Hold the folder; the lock goes with the process, however it ends."""
    folder.runs.mkdir(parents=True, exist_ok=True)
    (folder.runs / ".gitignore").write_text("*\n", "utf-8")
    lock = FileLock(folder.runs / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"another drlora compare is running in {folder.path}; wait for it, or stop it and "
            f"start this one again: what is finished is kept."
        ) from error
    try:
        yield
    finally:
        lock.release()
