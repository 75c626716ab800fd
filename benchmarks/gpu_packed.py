"""Cases of `benchmarks.gpu` with experts in few bits: one layer, and a model that fits 24 GB."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM

import drlora
from benchmarks.checks import SLACK, WrongResultError, results_of
from benchmarks.gpu_layers import ENGINES, INTERPRETER_SLACK, PUBLISHED, Layer
from benchmarks.gpu_models import QWEN3, Peak, qwen3_config
from benchmarks.gpu_setting import Setting, failure
from benchmarks.harness import Row, alternate, rows_of, where
from benchmarks.layers import Shape, ours, step_of
from benchmarks.models import ModelShape, random_packed_model, with_checkpointing
from benchmarks.quantised import packed
from drlora.evaluation.head import losses_at_targets
from drlora.ops.contract import TOLERANCES
from drlora.ops.trial import row_error

RANK, STORAGES = 16, ("nf4", "int8")
WIDE = f"16-bit grouped r{RANK}"
STEPS = 4
EIGHT_BITS = 2 * (1 + 4 / 256)  # bytes of Adam's two moments of a number, in 8 bits
MIXED = {"r_init": 8, "r_target": RANK, "r_max": 32, "grow_every": 2, "warmup_steps": 1,
         "settle_steps": 1, "p_grow": 1.0}  # fmt: skip


def layer(shape: Shape, setting: Setting) -> Iterator[Row]:
    """Packed experts against those of the numbers that they stand for; then time beside 16 bits."""
    case, made = f"gpu packed layer {shape.name} r{RANK}", Layer(shape, setting, RANK)
    steps: dict[str, Callable[[], None]] = {
        WIDE: step_of(made.adapted(f"r{RANK}", engine="grouped"), made.inputs)
    }
    exact: dict[str, bool] = {}
    for storage in STORAGES:
        few, wide = packed(made.experts, storage)
        for engine in ENGINES:
            try:
                for kind in made.ranks:
                    name = f"{storage} {engine} {kind}"
                    steps[name], exact[name] = _checked(made, kind, engine, few, wide)
            except Exception as error:
                yield failure(case, f"{storage} {engine}", error)
    peaks = {name: made.peak_extra_bytes(step) for name, step in steps.items()}
    timings = alternate(steps, setting.rounds, setting.warmup, calls=setting.calls)
    for row in rows_of(case, timings, WIDE, ""):
        kind = row["implementation"]
        row["to_16_bit"] = row.pop("to_frozen")
        del row["to_frozen_p20"], row["to_frozen_p80"]
        uniform = f"{kind.rpartition(' ')[0]} r{RANK}"
        if uniform in timings and kind != uniform:
            row["to_uniform"] = timings[kind].ratio_to(timings[uniform])[0]
        yield {**row, "peak_extra_bytes": peaks[kind], "to_the_bit": exact.get(kind)}


def _checked(
    made: Layer, kind: str, engine: str, few: nn.Module, wide: nn.Module
) -> tuple[Callable[[], None], bool]:
    """A step of packed experts that gave the right numbers, and whether to the bit.

    It is held against `grouped` on the numbers that they stand for, row by row.
    """
    interpreted = engine == "triton" and not made.setting.on_gpu
    allowed = TOLERANCES[made.shape.dtype] * (INTERPRETER_SLACK if interpreted else SLACK)
    torch.manual_seed(1)
    block = ours(few, made.shape, made.ranks[kind], engine=engine)
    twin = ours(wide, made.shape, made.ranks[kind], engine="grouped")
    twin.load_state_dict(block.state_dict(), strict=False)
    wanted, got = (results_of(module, made.inputs) for module in (twin, block))
    for name, value in wanted.items():
        off = row_error(got[name], value)
        if not off <= allowed:  # NaN is wrong too
            raise WrongResultError(
                f"{kind}: {name} is off by {off:.1e} in a row from the wide ones"
            )
    is_exact = all(torch.equal(value, got[name]) for name, value in wanted.items())
    return step_of(block, made.inputs), is_exact


def model(shape: ModelShape, setting: Setting) -> Iterator[Row]:
    """Qwen3-30B-A3B with experts in NF4: steps with an event, and what they need at the peak.

    Adapters and moments are of 16 bits. `computed_peak_bytes` has 8-bit moments in their place.
    """
    case = f"gpu packed model {shape.name} r{RANK} nf4-nested checkpointing"
    torch.manual_seed(0)
    base = random_packed_model(
        Qwen3MoeForCausalLM, qwen3_config(shape), shape.dtype, "nf4-nested", setting.device, True
    )
    held = sum(p.numel() * p.element_size() for p in base.parameters())
    peak = Peak(setting)
    adapted = with_checkpointing(
        get_peft_model(base, drlora.DrLoraConfig(**MIXED), autocast_adapter_dtype=False).train()
    )
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    dynamics = drlora.RankDynamics(adapted, STEPS)
    ids = torch.randint(1, shape.vocab, (1, shape.tokens), device=setting.device)
    seconds, losses, grants = [], [], 0
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = _loss(base, ids)
        loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        grants += len(dynamics.after_optimizer_step(optimizer))
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    dynamics.release()
    if not grants or not all(torch.isfinite(torch.tensor(losses))):
        raise RuntimeError(f"{grants} grants, losses {losses}")
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    numbers, extra = sum(p.numel() for p in trained), peak.extra_bytes()
    row: Row = {
        "case": case, "implementation": "ours", "tokens": shape.tokens, "seconds": seconds,
        "losses": losses, "grants": grants, "weights_bytes": held, "moments_bytes": moments,
        "trained_numbers": numbers, "peak_above_weights_bytes": extra,
        "tokens_per_s": shape.tokens / min(seconds), **where(),
    }  # fmt: skip
    if extra is not None:
        row["peak_bytes"] = held + extra
        row["computed_peak_bytes"] = held + extra - moments + numbers * EIGHT_BITS
    yield row


def _loss(base: nn.Module, ids: Tensor) -> Tensor:
    """As `drlora train` has it where the vocabulary is large."""
    return losses_at_targets(base, ids, input_ids=ids).mean()


def toy(shape: Shape) -> Shape:
    """Small enough for an interpreter, and rows of whole blocks."""
    return replace(shape, hidden=64, width=64, experts=4, top_k=2, tokens=12)


def toy_model(shape: ModelShape) -> ModelShape:
    """The same of a model."""
    return replace(shape, hidden=128, width=64, experts=4, top_k=2, layers=1, tokens=16, vocab=64)


# Name -> (whether at toy sizes, where) -> rows.
CASES: dict[str, Callable[[bool, Setting], Iterator[Row]]] = {
    "packed-layer": lambda tiny, s: layer(toy(PUBLISHED) if tiny else PUBLISHED, s),
    "packed-qwen3": lambda tiny, s: model(
        toy_model(QWEN3) if tiny else replace(QWEN3, tokens=2048), s
    ),
}
