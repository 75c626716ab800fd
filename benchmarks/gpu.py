"""Everything at real shapes on one GPU: `python -m benchmarks.gpu [CASE ...]`.

    python -m benchmarks.gpu --minutes 9 --out rows.jsonl      on a GPU
    python -m benchmarks.gpu --toy                             the same code on a CPU, tiny

Cases run in the order of their worth until the minutes are used up, and each row is written as soon
as it is measured. What is wrong, does not fit in memory or fails gets a row that says so, and is
not timed. Without --out rows go to benchmarks/results/gpu.jsonl, and nowhere with --toy.

With --toy, Triton's kernels run in Triton's interpreter, where triton is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import gpu_layers, gpu_models
from benchmarks.gpu_layers import OutOfTimeError, Setting, failure
from benchmarks.harness import RESULTS, Row, add_names, line_of, where
from benchmarks.layers import Shape

ROOT = Path(__file__).parent.parent
OLMOE_LAYER = Shape(2048, 1024, 64, 8, 8192, torch.bfloat16)
QWEN3_LAYER = Shape(2048, 768, 128, 8, 8192, torch.bfloat16)
MEASURED = ("median_s", "seconds", "waits")
Measure = Callable[[Setting], Iterator[Row]]


def cases(toy: bool) -> dict[str, tuple[float, Measure]]:
    """Name -> (seconds it may take, what it measures), the most valuable first."""
    small, tiny = (gpu_layers.toy, gpu_models.toy) if toy else (lambda s: s, lambda s: s)
    olmoe, qwen3 = small(OLMOE_LAYER), small(QWEN3_LAYER)
    return {
        "layer-olmoe": (150, lambda s: gpu_layers.compare(olmoe, s)),
        "synchronisation": (60, lambda s: gpu_layers.synchronisation(olmoe, s)),
        "step-olmoe": (120, lambda s: gpu_models.training(tiny(gpu_models.OLMOE), 16, s)),
        "growth-qwen3": (120, lambda s: gpu_models.growing(tiny(gpu_models.QWEN3), s)),
        "layer-qwen3": (120, lambda s: gpu_layers.compare(qwen3, s)),
        "scattermoe": (240, lambda s: gpu_layers.scattermoe(olmoe, s)),
        "step-olmoe-r64": (120, lambda s: gpu_models.training(tiny(gpu_models.OLMOE), 64, s)),
        "tiles": (240, lambda s: gpu_layers.tile_sweep(olmoe, s)),
    }


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


def run_case(
    name: str, seconds: float, measure: Measure, setting: Setting, out: Path | None
) -> int:
    """Write the rows of one case, or why it stopped; returns how many hold a measurement."""
    measured = 0
    try:
        with deadline(seconds):
            for row in measure(setting):
                write(row, out)
                measured += any(key in row for key in MEASURED)
    except OutOfTimeError as error:
        write({"case": name, "implementation": None, "error": str(error), **where()}, out)
    except Exception as error:
        write(failure(name, None, error), out)
    return measured


def device_is_lost() -> bool:
    """Whether the GPU's context broke (an illegal access), so that this process can do no more."""
    if not torch.cuda.is_available():
        return False
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def write(row: Row, out: Path | None) -> None:
    """Print a row, and append it."""
    known = "median_s" in row
    text = line_of(row) if known else json.dumps({k: v for k, v in row.items() if k not in where()})
    print(text, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def in_the_interpreter(argv: list[str]) -> int:
    """This command again, in a process where Triton interprets its kernels."""
    command = [sys.executable, "-m", "benchmarks.gpu", *argv]
    return subprocess.call(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases within the minutes given."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_names(parser, cases(toy=True))
    parser.add_argument("--minutes", type=float, default=9.0, help="in all, 9 by default")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="file to append rows to")
    parser.add_argument("--scattermoe", help="folder that holds axolotl's scattermoe_lora")
    chosen = parser.parse_args(argv)
    has_triton = importlib.util.find_spec("triton") is not None
    if chosen.toy and has_triton and os.environ.get("TRITON_INTERPRET") != "1":
        return in_the_interpreter(argv)
    if not chosen.toy and not torch.cuda.is_available():
        parser.error("there is no GPU; --toy runs the same code on the CPU")
    out = chosen.out or (None if chosen.toy else RESULTS / "gpu.jsonl")
    size = ("cpu", 1, 0, 1) if chosen.toy else ("cuda", 30, 3, 5)
    setting = Setting(*size, scattermoe=chosen.scattermoe)
    end = time.monotonic() + 60 * chosen.minutes
    measured = 0
    for number, name in enumerate(chosen.names):
        seconds, measure = cases(chosen.toy)[name]
        left = end - time.monotonic()
        if left < min(seconds, 30):
            reason = f"not started: {left:.0f} s were left"
            write({"case": name, "implementation": None, "error": reason, **where()}, out)
            continue
        print(f"-- {name}, {left:.0f} s left", flush=True)
        measured += run_case(name, min(seconds, left), measure, setting, out)
        if device_is_lost():
            remaining = chosen.names[number + 1 :]
            return again(remaining, end - time.monotonic(), out, chosen.scattermoe)
    return 0 if measured else 1


def again(names: list[str], seconds: float, out: Path | None, scattermoe: str | None) -> int:
    """The remaining cases in a process of their own."""
    if not names:
        return 1
    command = [sys.executable, "-m", "benchmarks.gpu", *names, "--minutes", str(seconds / 60)]
    command += ["--out", str(out)] if out else []
    command += ["--scattermoe", scattermoe] if scattermoe else []
    return subprocess.call(command, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
