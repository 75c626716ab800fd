"""A whole training step of small OLMoE models: `python -m benchmarks.train_step [CASE]`.

Implementations: frozen base (forward, and backward to the embeddings), ours at one rank, the
paper's masked way at r_max, PEFT's LoRA on the experts. Before timing, ours is checked against
PEFT with the same adapter weights: loss and the norm of every gradient.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.harness import alternate, append, rows_of
from benchmarks.models import (
    ModelShape,
    masked,
    ours,
    peft,
    training_step,
    twins,
)

RANK, R_MAX = 16, 64
SHAPES = [
    ModelShape(512, 256, 64, 8, 4, 1024),
    ModelShape(1024, 512, 64, 8, 2, 128),
]


def copy_adapter(source: torch.nn.Module, target: torch.nn.Module, experts: int) -> None:
    """PEFT's factors into our pools (A at row e*r + k there too; B at column k*E + e)."""
    from peft.tuners.lora.layer import ParamWrapper

    from drlora.inject import adapted_layers

    layers = adapted_layers(target, "default")
    for name, module in source.named_modules():
        if isinstance(module, ParamWrapper):
            block = name.split("base_model.model.")[1].split(".experts")[0]
            projection = "gate_up" if module.parameter_name == "gate_up_proj" else "down"
            pool = layers[block].adapter("default").rank_pools[projection]
            b = module.lora_B["default"].weight.data
            pool.lora_A.data.copy_(module.lora_A["default"].weight.data)
            b = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0).reshape(-1, b.shape[0])
            pool.lora_B.data.copy_(b)


def check(mine: torch.nn.Module, theirs: torch.nn.Module, shape: ModelShape) -> None:
    """Same adapter, same loss and same total gradient norm; raises if not."""
    copy_adapter(theirs, mine, shape.experts)
    ids = torch.randint(1, shape.vocab, (1, min(64, shape.tokens)))
    seen = []
    for model in (mine, theirs):
        loss = model(input_ids=ids, labels=ids).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, trained)
        seen.append((loss.item(), torch.cat([g.flatten() for g in grads]).norm().item()))
    (loss, norm), (loss_peft, norm_peft) = seen
    if abs(loss / loss_peft - 1) > 1e-5 or abs(norm / norm_peft - 1) > 1e-4:
        raise RuntimeError(f"ours {seen[0]} and PEFT {seen[1]} differ (loss, norm); not timed.")


def run(shape: ModelShape, rounds: int) -> list[dict]:
    """Check, then time one case."""
    models = twins(
        shape,
        "cpu",
        {
            "hf_frozen": lambda base: base,
            "ours": lambda base: ours(base, RANK),
            "masked r_max": lambda base: masked(base, RANK, R_MAX),
            "peft": lambda base: peft(base, RANK),
        },
    )
    check(models["ours"], models["peft"], shape)
    steps = {name: training_step(model, shape) for name, model in models.items()}
    timings = alternate(steps, rounds)
    return rows_of(f"step {shape.name} r{RANK}", timings, "hf_frozen", "peft", rank=RANK)


def main(argv: list[str] | None = None) -> int:
    """Time the chosen cases and append the rows to benchmarks/results/train_step.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", type=int, help="numbers of cases, all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    arguments = parser.parse_args(argv)
    for number in arguments.cases or range(len(SHAPES)):
        rows = run(SHAPES[number], arguments.rounds)
        for row in rows:
            print(
                f"{row['case']:50} {row['implementation']:13} {row['median_s'] * 1e3:8.1f} ms  "
                f"to frozen {row['to_frozen']:.3f} [{row['to_frozen_p20']:.3f}, "
                f"{row['to_frozen_p80']:.3f}]  PEFT/this {row['peft_over_this']:.2f}", flush=True,
            )  # fmt: skip
        if not arguments.dry:
            append("train_step", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
