"""Peak memory of a training step above the frozen base's: `python -m benchmarks.memory`.

Each implementation runs two steps in a process of its own, because only a process has a peak of its
own; what is reported is the peak resident memory minus that of the frozen base in the same case,
and, exactly, the bytes of adapter weights, gradients and Adam moments.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

from benchmarks.harness import append, where
from benchmarks.models import make_base, masked, optimizer_step, ours, peft, training_step
from benchmarks.train_step import R_MAX, RANK, SHAPES

KINDS = {
    "hf_frozen": lambda base: base,
    "ours": lambda base: ours(base, RANK),
    "masked r_max": lambda base: masked(base, RANK, R_MAX),
    "peft": lambda base: peft(base, RANK),
}


def measure(number: int, kind: str) -> dict[str, int]:
    """Run two steps of one case here; peak resident bytes, and bytes of the trained state."""
    shape = SHAPES[number]
    model = KINDS[kind](make_base(shape))
    trained = [p for p in model.parameters() if p.requires_grad]
    step = optimizer_step(model, shape) if trained else training_step(model, shape)
    for _ in range(2):
        step()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Weight, gradient and two moments, each of the parameter's own size.
    return {"peak": peak_bytes, "state": sum(4 * p.numel() * p.element_size() for p in trained)}


def in_a_process(number: int, kind: str) -> dict[str, int]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(number), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(number: int) -> list[dict]:
    """All implementations of one case."""
    found = {kind: in_a_process(number, kind) for kind in KINDS}
    base = found["hf_frozen"]["peak"]
    extra = {kind: values["peak"] - base for kind, values in found.items()}
    return [
        {
            "case": f"memory {SHAPES[number].name} r{RANK}",
            "implementation": kind,
            "peak_extra_bytes": extra[kind],
            "of_peft": extra[kind] / extra["peft"],
            "state_bytes": values["state"],
            **where(),
        }
        for kind, values in found.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases and append the rows to benchmarks/results/memory.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", type=int, help="numbers of cases, all by default")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "KIND"), help="one, in this process")
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(int(arguments.measure[0]), arguments.measure[1])))
        return 0
    for number in arguments.cases or range(len(SHAPES)):
        rows = run(number)
        for row in rows:
            print(
                f"{row['case']:48} {row['implementation']:13} peak above frozen "
                f"{row['peak_extra_bytes'] / 1e6:8.0f} MB ({row['of_peft']:.0%} of PEFT)  "
                f"trained state {row['state_bytes'] / 1e6:7.1f} MB",
                flush=True,
            )
        if not arguments.dry:
            append("memory", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
