"""How the `loop` engine cuts a layer's routed rows, and the threads that share out the cuts.

The products of one expert are small: two threads inside each of them wait for each other more than
they gain, the more so the narrower the product (a LoRA product of rank 16 gains almost nothing).
Whole experts side by side scale with the cores. torch releases the interpreter's lock inside its
operations, so plain threads do.

Letters as in `parts`, c for the rows of a task, n for those of a segment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

# Rows of a task: more do not stay in cache, fewer make each call into torch too short.
MOST_ROWS, FEWEST_ROWS = 512, 64
TASKS_PER_THREAD = 4


class Segment(NamedTuple):
    """Rows of one expert in one task; `part` counts the segments of the same expert."""

    number: int
    expert: int
    part: int
    rows: int


class Task(NamedTuple):
    """Neighbouring segments that one thread does together.

    `sizes` are the rows of each segment, and `rows` their sum.
    """

    number: int
    segments: list[Segment]
    sizes: list[int]
    rows: int


def cut(counts: list[int]) -> list[Task]:
    """Tasks in the order of the rows, of about equal size; only large experts are cut."""
    share = sum(counts) // (TASKS_PER_THREAD * torch.get_num_threads())
    enough = min(max(share, FEWEST_ROWS), MOST_ROWS)
    tasks: list[Task] = []
    segments: list[Segment] = []
    number = waiting = 0

    def close() -> None:
        tasks.append(Task(len(tasks), segments, [s.rows for s in segments], waiting))

    for expert, count in enumerate(counts):
        parts = -(-count // (2 * enough))
        for part in range(parts):
            rows = count * (part + 1) // parts - count * part // parts
            segments.append(Segment(number, expert, part, rows))
            number, waiting = number + 1, waiting + rows
            if waiting >= enough:
                close()
                segments, waiting = [], 0
    if segments:
        close()
    return tasks


Work = Callable[[Task], None]

_pools: dict[int, ThreadPoolExecutor] = {}
_making = threading.Lock()
# Threads do not survive a fork (a DataLoader's workers, say): the child makes its own.
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_pools.clear)


def share_out(tasks: Sequence[Task], make_work: Callable[[], Work], device: torch.device) -> None:
    """Do every task, the longest first, on as many threads as torch may use on the CPU.

    Args:
        tasks: which of them a thread gets is left to chance; they must not write to the same place.
        make_work: called once in each thread; returns what does a task, with buffers of its own.
        device: of the tensors; threads are for the CPU only.
    """
    todo = iter(sorted(tasks, key=lambda task: -task.rows))  # next() on it is atomic: the queue
    threads = min(torch.get_num_threads(), len(tasks)) if device.type == "cpu" else 1
    if threads <= 1:
        _work_off(todo, make_work, device)
        return
    pool = _pool()
    running = [pool.submit(_work_off, todo, make_work, device) for _ in range(threads)]
    for future in running:
        future.result()


def _work_off(todo: Iterator[Task], make_work: Callable[[], Work], device: torch.device) -> None:
    # Grad mode and autocast belong to a thread; backward may be called under autocast.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        work = make_work()
        for task in todo:
            work(task)


def _pool() -> ThreadPoolExecutor:
    """The pool for the number of threads that torch is set to now; each computes on one core."""
    threads = torch.get_num_threads()
    with _making:
        if threads not in _pools:
            ready = threading.Barrier(threads)

            def use_one_core() -> None:
                torch.get_num_threads()  # takes the global setting over, now and not later
                torch.set_num_threads(1)
                ready.wait()

            pool = ThreadPoolExecutor(threads, "drlora", initializer=use_one_core)
            for future in [pool.submit(int) for _ in range(threads)]:
                future.result()
            # What a thread sets is also what threads made later start from: put that right.
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]
