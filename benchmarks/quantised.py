"""One adapted expert layer whose experts are packed: `python -m benchmarks.quantised [CASE]`.

Implementations: 16-bit (or float32) experts, then each storage, with the same adapter, routing and
engine (`loop`). Forward and backward. Before timing, a packed layer's output and gradients must be,
to the bit, those of the layer over the numbers that its experts stand for; INT8 is held within the
bounds of engines. bitsandbytes reads NF4 where it is installed, and rows say so.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn

from benchmarks.checks import WrongResultError, results_of
from benchmarks.harness import Row, alternate, parser, rows_of, run_cases
from benchmarks.layers import Shape, make_experts, make_inputs, ours, step_of
from drlora.moe.packing import places_of, put_in
from drlora.ops.contract import TOLERANCES
from drlora.ops.storage.packed import FORMATS, Packed, packed_format

RANK, SKEW = 16, 0.55
SHAPES = [
    Shape(2048, 1024, 64, 8, 512, torch.bfloat16),
    Shape(2048, 1024, 64, 8, 512),
    Shape(2048, 1024, 64, 8, 2048, torch.bfloat16),
    Shape(256, 128, 16, 4, 128),
]


def packed(experts: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """The experts packed, and experts of the numbers that these stand for."""
    found = {
        place.path: Packed.of(getattr(experts, place.path).detach(), packed_format(name))
        for place in places_of(experts)
    }
    wide = copy.deepcopy(experts)
    for key, matrix in found.items():
        getattr(wide, key).data = matrix.wide()
    few = copy.deepcopy(experts)
    put_in(few, found)
    return few, wide


def run(shape: Shape, rounds: int, seconds: float | None) -> list[Row]:
    """Check, then time one shape with every storage."""
    torch.manual_seed(0)
    inputs, experts = make_inputs(shape, SKEW), make_experts(shape)
    ranks = [RANK] * shape.experts

    def adapted(module: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        return ours(module, shape, ranks, engine="loop")

    modules, held = {"plain": adapted(experts)}, {}
    for name in FORMATS:
        few, wide = packed(experts, name)
        modules[name] = adapted(few)
        wanted, got = (results_of(m, inputs) for m in (adapted(wide), modules[name]))
        for key, value in wanted.items():
            off = (got[key].double() - value.double()).norm() / value.double().norm()
            # The scales of rows are put on the product, which rounds in another order.
            is_late = packed_format(name).row_scale is not None
            if not (off < TOLERANCES[shape.dtype] if is_late else torch.equal(value, got[key])):
                raise WrongResultError(f"{name}: {key} is not that of the numbers it stands for")
        held[name] = sum(p.numel() * p.element_size() for p in few.parameters())
    steps = {name: step_of(module, inputs) for name, module in modules.items()}
    timings = alternate(steps, rounds, warmup=1, seconds=seconds)
    rows = rows_of(f"packed layer {shape.name} r{RANK}", timings, "plain", "", rank=RANK)
    for row in rows:
        row["expert_bytes"] = held.get(row["implementation"])
        row["bitsandbytes"] = version("bitsandbytes") if find_spec("bitsandbytes") else None
    return rows


def main(argv: list[str] | None = None) -> int:
    """Time the chosen cases and append the rows to benchmarks/results/quantised.jsonl."""
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("cases", nargs="*", type=int, help="numbers of shapes, all by default")
    chosen = arguments.parse_args(argv)
    shapes = [SHAPES[number] for number in chosen.cases] or SHAPES
    measure = partial(run, rounds=chosen.rounds, seconds=chosen.seconds)
    run_cases("quantised", shapes, measure, chosen.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
