"""Peak memory of a training step above the frozen base's: `python -m benchmarks.memory`.

Each implementation runs a few steps in a process of its own, because only a process has a peak of
its own; what is reported is the peak resident memory minus that of the frozen base in the same
case. Ours grows within these steps, observed and corrected.

Adapter weights, their gradients and Adam's moments are counted to the byte after the last step,
and nothing is reported unless they are exactly the budget's: that of the mean rank for ours and
PEFT, of r_max for the masked way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from torch import nn

import drlora
from benchmarks.harness import Row, append, peak_resident_bytes, where
from benchmarks.models import ModelShape, batch_of, make_base, masked, ours, peft, training_step
from benchmarks.train_step import R_MAX, RANK, SHAPES

STEPS = 3
GROWTH = {"r_init": RANK // 2, "r_max": R_MAX, "p_grow": 1.0, "grow_every": 1, "warmup_steps": 1,
          "settle_steps": 1}  # fmt: skip
KINDS = {
    "hf_frozen": lambda base: base,
    "ours": lambda base: ours(base, RANK, **GROWTH),
    "masked r_max": lambda base: masked(base, RANK, R_MAX),
    "peft": lambda base: peft(base, RANK),
}
RANK_OF = {"hf_frozen": 0, "ours": RANK, "masked r_max": R_MAX, "peft": RANK}


def budget_bytes(shape: ModelShape, rank: int) -> int:
    """The adapter's weights: `rank` rows an expert in A and B, on gate_up and on down."""
    columns = (shape.hidden + 2 * shape.width) + (shape.width + shape.hidden)
    return shape.layers * shape.experts * rank * columns * shape.dtype.itemsize


def train(model: nn.Module, shape: ModelShape, grows: bool) -> dict[str, int]:
    """Some steps of AdamW; the bytes of weights, gradients and moments at the end."""
    ids = batch_of(shape, "cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    dynamics = drlora.RankDynamics(model, STEPS) if grows else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if dynamics is not None:
            dynamics.before_optimizer_step()
        optimizer.step()
        if dynamics is not None:
            dynamics.after_optimizer_step(optimizer)
    if dynamics is not None and len(set(dynamics.budget())) > 1:
        raise RuntimeError(f"the budget was not spent: {dynamics.budget()}.")
    kept = {
        "weights": trained,
        "gradients": [p.grad for p in trained if p.grad is not None],
        "moments": [
            value
            for p in trained
            for value in optimizer.state[p].values()
            if isinstance(value, torch.Tensor) and value.shape == p.shape
        ],
    }
    return {name: sum(t.nbytes for t in tensors) for name, tensors in kept.items()}


def measure(number: int, kind: str) -> dict[str, int]:
    """Run one case here; peak resident bytes, and bytes of the trained state."""
    shape = SHAPES[number]
    model = KINDS[kind](make_base(shape))
    state = {"weights": 0, "gradients": 0, "moments": 0}
    if kind == "hf_frozen":
        step = training_step(model, shape)
        for _ in range(STEPS):
            step()
    else:
        state = train(model, shape, grows=kind == "ours")
    budget = budget_bytes(shape, RANK_OF[kind])
    wanted = {"weights": budget, "gradients": budget, "moments": 2 * budget}
    if state != wanted:
        raise RuntimeError(f"{kind} keeps {state} bytes instead of {wanted}.")
    return {"peak": peak_resident_bytes(), "state": sum(state.values())}


def in_a_process(number: int, kind: str) -> dict[str, int]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(number), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(number: int) -> list[Row]:
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
