"""Everything that a GPU is to say, in eight minutes: `make gpu`, or `python -m benchmarks.gpu`.

    make gpu                                       all cases on a GPU, into results/gpu.jsonl
    python -m benchmarks.gpu CASE ... --out FILE   some of them
    python -m benchmarks.gpu --toy                 the same code on a CPU, tiny, under two minutes
    python -m benchmarks.gpu --verdicts            the bars, from the rows that are there

A bare machine with a torch, transformers, peft and triton of its own is enough: PYTHONPATH=src. A
package that is missing or too old fails its case, with a row that says so, and no other.

Cases run in the order of their worth until the minutes are used up. Each row is written as soon as
it is measured, so a cut loses nothing, and `make gpu` again goes on after the last case that ended.
A process computes; another watches it, and where a case outlasts its time, hangs or breaks the
device, ends it, writes why, and starts one for the cases that are left. What is wrong, does not fit
in memory or fails is not timed.

With --toy, Triton's kernels run in Triton's interpreter, where triton is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_verdicts
from benchmarks.gpu_setting import OutOfTimeError, Setting, failure
from benchmarks.harness import RESULTS, Row, add_names, line_of, where

ROOT = Path(__file__).parent.parent
MEASURED = ("median_s", "seconds", "waits", "passed", "train_s", "chosen", "loss")
BEGIN, END = "-- begin", "-- end"
STARTUP_S, GRACE_S = 120.0, 20.0
Measure = Callable[[Setting], Iterator[Row]]


# Name -> seconds it may take, the most valuable first.
LIMITS = {
    "tests": 100,
    "layer-published": 60,
    "layer-olmoe": 60,
    "step-olmoe": 90,
    "layer-qwen3": 60,
    "trial": 30,
    "packed-layer": 60,
    "packed-qwen3": 75,
    "growth-qwen3": 75,
    "synchronisation": 30,
    "head": 20,
    "fine-tune": 120,
    "scattermoe": 90,
    "step-olmoe-r64": 90,
    "tiles": 120,
}


def cases(toy: bool) -> dict[str, tuple[float, Measure]]:
    """Name -> (seconds it may take, what it measures)."""
    return {name: (limit, partial(rows_of_case, name, toy)) for name, limit in LIMITS.items()}


def rows_of_case(name: str, toy: bool, setting: Setting) -> Iterator[Row]:
    """What a case measures. It imports what it needs, so that no other fails with it."""
    if name in ("tests", "head", "fine-tune"):
        from benchmarks import gpu_runs

        found = {
            "tests": gpu_runs.tests,
            "head": gpu_runs.head_loss,
            "fine-tune": gpu_runs.fine_tunes,
        }
        yield from found[name](setting)
    elif name.startswith("packed"):
        from benchmarks import gpu_packed

        yield from gpu_packed.CASES[name](toy, setting)
    elif name.startswith(("step", "growth")):
        from benchmarks import gpu_models

        yield from gpu_models.CASES[name](toy, setting)
    else:
        from benchmarks import gpu_layers

        yield from gpu_layers.CASES[name](toy, setting)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside after this long (once a call that blocks returns)."""

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"stopped after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_case(name: str, seconds: float, measure: Measure, setting: Setting, out: Path) -> None:
    """Write the rows of one case, or why it stopped."""
    try:
        with deadline(seconds):
            for row in measure(setting):
                write(row, out)
    except OutOfTimeError as error:
        write(gave_up(name, str(error)), out)
    except Exception as error:
        write(failure(name, None, error), out)


def gave_up(name: str, why: str) -> Row:
    """The row of a case that has no measurement."""
    return {"case": name, "implementation": None, "error": why, **where()}


def write(row: Row, out: Path) -> None:
    """Print a row, and append it."""
    known = "median_s" in row and "to_frozen" in row
    text = line_of(row) if known else json.dumps({k: v for k, v in row.items() if k not in where()})
    print(text, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rows_in(out: Path) -> list[Row]:
    """What was written so far; a line that was cut off is none."""
    found = []
    for line in out.read_text("utf-8").splitlines() if out.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def ended(out: Path) -> set[str]:
    """Names of cases that came to their end."""
    return {row["ended_case"] for row in rows_in(out) if "ended_case" in row}


def compute(names: list[str], toy: bool, seconds: float, scattermoe: str | None, out: Path) -> int:
    """Run cases in this process; another one watches what it says."""
    torch.set_float32_matmul_precision("highest")  # some images have TF32, which no check allows
    size = ("cpu", 1, 0, 1) if toy else ("cuda", 30, 3, 5)
    setting, end = Setting(*size, scattermoe=scattermoe), time.monotonic() + seconds
    for name in names:
        limit, measure = cases(toy)[name]
        left = end - time.monotonic()
        if left < min(limit, 30):
            write(gave_up(name, f"not started: {left:.0f} s were left"), out)
            continue
        limit = min(limit, left)
        print(f"{BEGIN} {name} {limit:.0f}, {left:.0f} s left", flush=True)
        began = time.monotonic()
        run_case(name, limit, measure, setting, out)
        if setting.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises where the device is lost
        mark_ended(name, time.monotonic() - began, out)
        print(f"{END} {name}", flush=True)
    return 0


def mark_ended(name: str, seconds: float, out: Path) -> None:
    """A row that says that the case need not run again."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"ended_case": name, "case_s": round(seconds, 1)}) + "\n")


def watch(command: list[str], env: dict[str, str], out: Path) -> str | None:
    """Run a process that computes; the name of the case that it broke off at, or None.

    Why is in a row then, and the case counts as ended.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as said:
            for line in said:
                lines.put(line.rstrip("\n"))
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    current, limit, began = "startup", STARTUP_S, time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.1, began + limit - time.monotonic()))
            except queue.Empty:
                if time.monotonic() < began + limit:
                    continue
                return broke_off(current, f"no end after {limit:.0f} s: killed", began, out)
            if line is None:
                code = process.wait()
                said = f"the process ended with {code}"
                return broke_off(current, said, began, out) if code else None
            print(line, flush=True)
            if line.startswith(BEGIN):
                current, seconds = line.removeprefix(BEGIN).split(",")[0].split()
                limit, began = float(seconds) + GRACE_S, time.monotonic()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(timeout=10)


def broke_off(name: str, why: str, began: float, out: Path) -> str:
    """Write it down."""
    with out.open("a", encoding="utf-8") as file:  # this process may not touch the device
        row = {
            "case": name,
            "implementation": None,
            "error": why,
            "date": time.strftime("%Y-%m-%d"),
        }
        file.write(json.dumps(row) + "\n")
    print(f"{name}: {why}", flush=True)
    mark_ended(name, time.monotonic() - began, out)
    return name


def run(names: list[str], toy: bool, minutes: float, scattermoe: str | None, out: Path) -> int:
    """Run cases, with as many processes as it takes; 1 where nothing was measured."""
    end, before = time.monotonic() + 60 * minutes, len(rows_in(out))
    env = dict(os.environ, PYTHONPATH=paths())
    if toy and importlib.util.find_spec("triton") is not None:
        env["TRITON_INTERPRET"] = "1"
    left = list(names)
    while left and time.monotonic() < end:
        seconds = end - time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu", *left, "--out", str(out)]
        command += ["--compute", str(seconds), *(["--toy"] if toy else [])]
        command += ["--scattermoe", scattermoe] if scattermoe else []
        broken = watch(command, env, out)
        if broken is None or broken not in left:
            break
        left = left[left.index(broken) + 1 :]
    measured = [row for row in rows_in(out)[before:] if any(key in row for key in MEASURED)]
    return 0 if measured else 1


def paths() -> str:
    """Where a process of ours finds the package and the benchmarks."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), given]))


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases within the minutes given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_names(parser, cases(toy=True))
    parser.add_argument("--minutes", type=float, default=8.0, help="in all, 8 by default")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="file to append rows to")
    parser.add_argument("--scattermoe", help="folder that holds axolotl's scattermoe_lora")
    parser.add_argument("--verdicts", action="store_true", help="measure nothing")
    parser.add_argument("--compute", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    out = chosen.out or RESULTS / "gpu.jsonl"
    if chosen.verdicts:
        print(gpu_verdicts.report(rows_in(out)))
        return 0
    if not chosen.toy and not torch.cuda.is_available():
        parser.error("there is no GPU; --toy runs the same code on the CPU")
    if chosen.compute is not None:
        return compute(chosen.names, chosen.toy, chosen.compute, chosen.scattermoe, out)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.toy and not chosen.out:
            out = Path(folder) / "rows.jsonl"
        is_all = chosen.names == list(cases(toy=True))
        done = ended(out) if is_all else set()
        names = [name for name in chosen.names if name not in done]
        if done:
            print(f"ended before: {', '.join(sorted(done))}", flush=True)
        code = run(names, chosen.toy, chosen.minutes, chosen.scattermoe, out) if names else 0
        print(gpu_verdicts.report(rows_in(out)))
    return code


if __name__ == "__main__":
    sys.exit(main())
