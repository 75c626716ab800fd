"""A whole training step of small OLMoE models: `python -m benchmarks.train_step [CASE]`.

Implementations: frozen base (forward, and backward to the embeddings), ours at one rank, the
paper's masked way at r_max, PEFT's LoRA on the experts. Before timing, ours and the masked way are
checked against PEFT with the same adapter weights: loss and the norm of the gradient, in float32.

Cases 2 and 3 have the sizes of experiments/realistic, in bfloat16 and float32; they take minutes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from benchmarks.checks import WrongResultError, pool_rows
from benchmarks.harness import Row, alternate, parser, rows_of, run_cases
from benchmarks.models import ModelShape, batch_of, masked, ours, peft, training_step, twins
from drlora.adapter.inject import adapted_layers

RANK, R_MAX = 16, 64
SHAPES = [
    ModelShape(512, 256, 64, 8, 4, 1024),
    ModelShape(1024, 512, 64, 8, 2, 128),
]
# Of experiments/realistic: few large experts in many layers, the hard case. By number only.
REALISTIC = [
    ModelShape(576, 1536, 8, 2, 30, 1280, dtype, vocab=49_152, sequences=8)
    for dtype in (torch.bfloat16, torch.float32)
]


def copy_adapter(source: nn.Module, target: nn.Module, experts: int) -> None:
    """PEFT's factors into the first rows of each expert of our pools, which are in order."""
    layers = adapted_layers(target, "default")
    for name, module in source.named_modules():
        if isinstance(module, ParamWrapper):
            block = name.split("base_model.model.")[1].split(".experts")[0]
            projection = "gate_up" if module.parameter_name == "gate_up_proj" else "down"
            pool = layers[block].adapter("default").rank_pools[projection]
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            for ours_RO, theirs_RO in ((pool.lora_A, a), (pool.lora_B, pool_rows(b, experts))):
                theirs_EPO = theirs_RO.unflatten(0, (experts, -1))
                ours_RO.data.unflatten(0, (experts, -1))[:, : theirs_EPO.shape[1]] = theirs_EPO


def loss_and_norm(model: nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Loss of a batch, and the norm of all gradients together."""
    loss = model(input_ids=ids, labels=ids).loss
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.item(), torch.stack([g.float().norm() for g in grads]).norm().item()


def check(
    mine: nn.Module,
    theirs: nn.Module,
    shape: ModelShape,
    device: str = "cpu",
    tolerance: tuple[float, float] = (1e-5, 1e-4),
) -> None:
    """Same adapter, same loss and same gradient norm as PEFT; raises if not."""
    copy_adapter(theirs, mine, shape.experts)
    ids = batch_of(shape, device)[:, :64]
    (loss, norm), (loss_peft, norm_peft) = loss_and_norm(mine, ids), loss_and_norm(theirs, ids)
    close = abs(loss / loss_peft - 1) < tolerance[0] and abs(norm / norm_peft - 1) < tolerance[1]
    if not close:
        raise WrongResultError(
            f"loss {loss:.6g} and gradient norm {norm:.6g}; PEFT has {loss_peft:.6g} and "
            f"{norm_peft:.6g}"
        )


def run(shape: ModelShape, rounds: int, seconds: float | None) -> list[Row]:
    """Check, then time one case; the masked way only in small models."""
    kinds = {
        "hf_frozen": lambda base: base,
        "ours": lambda base: ours(base, RANK),
        "masked r_max": lambda base: masked(base, RANK, R_MAX),
        "peft": lambda base: peft(base, RANK),
    }
    if shape in REALISTIC:
        del kinds["masked r_max"]
    # In 16 bits, or through many layers, rounding alone would send tokens to other experts.
    small = replace(shape, layers=min(shape.layers, 4), dtype=torch.float32)
    checked = twins(small, "cpu", {k: make for k, make in kinds.items() if k != "hf_frozen"})
    for name in checked.keys() - {"peft"}:
        check(checked[name], checked["peft"], small)
    del checked
    models = twins(shape, "cpu", kinds)
    steps = {name: training_step(model, shape) for name, model in models.items()}
    timings = alternate(steps, rounds, seconds=seconds)
    return rows_of(f"step {shape.name} r{RANK}", timings, "hf_frozen", "peft", rank=RANK)


def main(argv: list[str] | None = None) -> int:
    """Time the chosen cases and append the rows to benchmarks/results/train_step.jsonl."""
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument(
        "cases", nargs="*", type=int, help="numbers of cases, 0 and 1 by default"
    )
    chosen = arguments.parse_args(argv)
    shapes = [[*SHAPES, *REALISTIC][number] for number in chosen.cases] or SHAPES
    measure = partial(run, rounds=chosen.rounds, seconds=chosen.seconds)
    run_cases("train_step", shapes, measure, chosen.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
