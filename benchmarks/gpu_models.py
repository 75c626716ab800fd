"""Cases of `benchmarks.gpu` on whole models, their random weights made on the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from peft import get_peft_model
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import drlora
from benchmarks.gpu_layers import ENGINES
from benchmarks.gpu_setting import Setting, failure
from benchmarks.harness import Row, alternate, rows_of, where
from benchmarks.models import (
    ModelShape,
    optimizer_step,
    ours,
    peft,
    random_model,
    training_step,
    twin_of,
    with_checkpointing,
)
from benchmarks.train_step import check

OLMOE = ModelShape(2048, 1024, 64, 8, 16, 4096, torch.bfloat16, vocab=50304)
QWEN3 = ModelShape(2048, 768, 128, 8, 48, 4096, torch.bfloat16, vocab=151936)
GROWTH = {"r_init": 8, "r_target": 16, "r_max": 32, "grow_every": 2, "warmup_steps": 1,
          "settle_steps": 1, "p_grow": 1.0}  # fmt: skip
GROWTH_STEPS = 4


def olmoe(shape: ModelShape, device: str) -> nn.Module:
    """OLMoE-1B-7B's architecture at the given sizes."""
    config = OlmoeConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=max(1, shape.hidden // 128),
        num_key_value_heads=max(1, shape.hidden // 128), num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    return random_model(OlmoeForCausalLM, config, shape.dtype, device)


def qwen3_config(shape: ModelShape) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's architecture at the given sizes."""
    return Qwen3MoeConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, moe_intermediate_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=max(1, shape.hidden // 64),
        num_key_value_heads=max(1, shape.hidden // 512), head_dim=128,
        num_experts=shape.experts, num_experts_per_tok=shape.top_k, norm_topk_prob=True,
        eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip


def qwen3(shape: ModelShape, device: str) -> nn.Module:
    """A frozen model of it."""
    return random_model(Qwen3MoeForCausalLM, qwen3_config(shape), shape.dtype, device)


class Peak:
    """Device memory beyond what was allocated when this was made."""

    def __init__(self, setting: Setting) -> None:
        self.on_gpu = setting.on_gpu
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def extra_bytes(self) -> int | None:
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def training(shape: ModelShape, rank: int, setting: Setting) -> Iterator[Row]:
    """A training step of OLMoE-1B-7B with gradient checkpointing: tokens/s, and memory.

    Memory is taken of each implementation alone, above the frozen weights: `peak_extra_bytes` is
    beyond what the frozen model's own step takes. Then all take turns.
    """
    case = f"gpu step {shape.name} r{rank} checkpointing"
    base, device = olmoe(shape, setting.device), setting.device
    kinds: dict[str, Callable[[nn.Module], nn.Module]] = {
        "hf_frozen": lambda model: model,
        "peft": lambda model: peft(model, rank),
        "triton": lambda model: ours(model, rank, engine="triton"),
        "grouped": lambda model: ours(model, rank, engine="grouped"),
    }

    def build(name: str) -> tuple[nn.Module, Callable[[], None]]:
        model = with_checkpointing(kinds[name](twin_of(base)))
        make = training_step if name == "hf_frozen" else optimizer_step
        return model, make(model, shape, device=device)

    peaks: dict[str, int | None] = {}
    for name in kinds:
        try:
            if name in ENGINES:
                check_engine(shape, rank, name, device)
            peak = Peak(setting)
            model, step = build(name)
            step()
            step()
            peaks[name] = peak.extra_bytes()
            del model, step
        except Exception as error:
            yield failure(case, name, error)
    if "hf_frozen" not in peaks:
        return
    models = {name: build(name) for name in peaks}
    timings = alternate(
        {n: step for n, (_, step) in models.items()}, max(1, setting.rounds // 3), setting.warmup
    )
    for row in rows_of(case, timings, "hf_frozen", "peft", rank=rank):
        row["tokens_per_s"] = shape.tokens / row["median_s"]
        mine, frozen, theirs = (peaks.get(n) for n in (row["implementation"], "hf_frozen", "peft"))
        row["peak_above_weights_bytes"] = mine
        if mine is not None and frozen is not None:
            row["peak_extra_bytes"] = mine - frozen
        if mine is not None and theirs:
            row["of_peft"] = mine / theirs
        yield row


def check_engine(shape: ModelShape, rank: int, engine: str, device: str) -> None:
    """One layer of the model in float32, trained by `engine` and by PEFT: same loss and gradient.

    More layers or bfloat16 would let a token change its expert by rounding alone.
    """
    small = replace(shape, layers=1, dtype=torch.float32)
    base = olmoe(small, device)
    mine, theirs = ours(twin_of(base), rank, engine=engine), peft(twin_of(base), rank)
    check(with_checkpointing(mine), with_checkpointing(theirs), small, device, (1e-5, 1e-3))


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the trained weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def growing(shape: ModelShape, setting: Setting) -> Iterator[Row]:
    """Steps of Qwen3-30B-A3B with a growth event, at the most tokens that fit on the card."""
    case = f"gpu growth {shape.name} r16 checkpointing"
    base = qwen3(shape, setting.device)
    weights_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    for tokens in (shape.tokens, shape.tokens // 2, shape.tokens // 4):
        try:
            yield {"case": case, **_grow(base, replace(shape, tokens=tokens), setting),
                   "weights_bytes": weights_bytes, **where()}  # fmt: skip
            return
        except torch.OutOfMemoryError as error:
            yield {**failure(case, "ours", error), "tokens": tokens}


def _grow(base: nn.Module, shape: ModelShape, setting: Setting) -> Row:
    peak = Peak(setting)
    config = drlora.DrLoraConfig(**GROWTH)
    model = with_checkpointing(get_peft_model(twin_of(base), config).train())
    dynamics = drlora.RankDynamics(model, GROWTH_STEPS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(1, shape.vocab, (1, shape.tokens), device=setting.device)
    seconds, losses, grants = [], [], 0
    for _ in range(GROWTH_STEPS):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        dynamics.before_optimizer_step()
        optimizer.step()
        grants += len(dynamics.after_optimizer_step(optimizer))
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - started)
    spent, stored = dynamics.budget()
    dynamics.release()
    if not grants or spent != stored or not all(torch.isfinite(torch.tensor(losses))):
        raise RuntimeError(f"{grants} grants, {spent} of {stored} ranks, losses {losses}")
    return {
        "implementation": "ours", "tokens": shape.tokens, "seconds": seconds, "losses": losses,
        "grants": grants, "ranks_spent": spent, "ranks_stored": stored,
        "adapter_bytes": adapter_bytes(model), "peak_above_weights_bytes": peak.extra_bytes(),
        "tokens_per_s": shape.tokens / min(seconds),
    }  # fmt: skip


def toy(shape: ModelShape) -> ModelShape:
    """The same kind of model, small enough for an interpreter."""
    return replace(shape, hidden=128, width=16, experts=4, top_k=2, layers=1, tokens=16, vocab=64)


def sized(shape: ModelShape, is_toy: bool) -> ModelShape:
    """The shape, or a toy of it."""
    return toy(shape) if is_toy else shape


# Name -> (whether at toy sizes, where) -> rows.
CASES: dict[str, Callable[[bool, Setting], Iterator[Row]]] = {
    "step-olmoe": lambda tiny, s: training(sized(OLMOE, tiny), 16, s),
    "step-olmoe-r64": lambda tiny, s: training(sized(OLMOE, tiny), 64, s),
    "growth-qwen3": lambda tiny, s: growing(sized(QWEN3, tiny), s),
}
