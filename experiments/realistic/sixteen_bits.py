"""Quality in 16 bits: LoRA on experts by PEFT and by drlora beside the same bfloat16 weights.

    python experiments/realistic/build.py                                   # see there
    .cache/gym/bin/python experiments/realistic/problems.py                 # see there
    python experiments/realistic/sixteen_bits.py --seeds 1 2 3 4 5

PEFT's LoRA on `target_parameters` forms W + s B A in the dtype of W at every pass, so entries of an
update that are less than half of a weight's last bit are lost; drlora adds s B (A x) to W x. Three
arms a seed: PEFT and drlora beside bfloat16 weights, and drlora beside float32 weights, which is
what neither loses anything of (there PEFT and drlora are equal, tests/adapter/test_peft_parity.py).

All arms of a seed have the same A at the start (B is zero), batches, order, learning rate, AdamW
and one rank for all experts; LoRA's own weights are float32 in all. Held-out loss is computed with
the dtype of the arm. `swallowed` is the share of entries of s B A that are not zero and that
W + s B A in bfloat16 gives back as W. sixteen_bits.json keeps what is done, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.data import encode_examples, load_examples, pad_token_id
from drlora.evaluation.evaluate import evaluate_loss
from drlora.runs.environment import processor

HERE = Path(__file__).parent
WORK = Path(".cache/realistic")
PROJECTIONS = {"gate_up_proj": "gate_up", "down_proj": "down"}
# name -> (implementation, dtype of the weights)
ARMS = {
    "peft bfloat16": ("peft", torch.bfloat16),
    "drlora bfloat16": ("drlora", torch.bfloat16),
    "drlora float32": ("drlora", torch.float32),
}
RANK, LENGTH, BATCH = 8, 160, 8


def adapted(implementation: str, dtype: torch.dtype) -> nn.Module:
    """The realistic model with one rank for all experts and B = 0."""
    base = AutoModelForCausalLM.from_pretrained(WORK / "model", dtype=dtype)
    if implementation == "drlora":
        ranks = {"r_init": RANK, "r_target": RANK, "r_max": RANK}
        config: Any = drlora.DrLoraConfig(**ranks, lora_alpha=2 * RANK, router="frozen")
    else:
        names = [f"experts.{name}" for name in PROJECTIONS]
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=names)
    return get_peft_model(base, config).train()


def factors(model: nn.Module) -> Iterator[tuple[str, Any, Any, Tensor, bool]]:
    """Of each matrix of experts: place, A, B, weight (E, out, in) and whether it is PEFT's.

    PEFT has A (E*r, in) and B (out, r*E) with the expert fastest; a pool has both by rows (E*r, .).
    """
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, ParamWrapper)}
    for name, wrapper in wrappers.items():
        block = name.split("base_model.model.")[1].split(".experts")[0]
        place = f"{block} {PROJECTIONS[wrapper.parameter_name]}"
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        yield place, a, b, wrapper.get_param(), True
    for block, layer in ({} if wrappers else adapted_layers(model, "default")).items():
        experts = layer.get_base_layer()
        for parameter, projection in PROJECTIONS.items():
            pool = layer.drlora_adapters["default"].pools[projection]
            yield (f"{block} {projection}", pool.lora_A, pool.lora_B,
                   getattr(experts, parameter), False)  # fmt: skip


def start(model: nn.Module, seed: int) -> None:
    """A as torch's Linear has it, drawn by place: the same in both layouts; B = 0."""
    for index, (_, a, b, _, _) in enumerate(sorted(factors(model), key=lambda one: one[0])):
        draw = torch.Generator().manual_seed(1_000 * seed + index)
        bound = a.shape[1] ** -0.5
        a.data.copy_((torch.rand(a.shape, generator=draw) * 2 - 1) * bound)
        b.data.zero_()


@torch.no_grad()
def swallowed(model: nn.Module) -> float:
    """The share of the updates' entries that bfloat16 loses whole."""
    lost = there = 0
    for _, a, b, weight_EOI, is_pefts in factors(model):
        experts = len(weight_EOI)
        rows = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0) if is_pefts else b
        b_ERO = rows.reshape(experts, RANK, -1)
        a_ERI = a.reshape(experts, RANK, -1)
        for e in range(experts):
            update_OI = 2.0 * (b_ERO[e].T.float() @ a_ERI[e].float())
            wide_OI = weight_EOI[e].to(torch.bfloat16)
            kept_OI = wide_OI + update_OI.to(torch.bfloat16)
            is_there = update_OI != 0
            lost += int(((kept_OI == wide_OI) & is_there).sum())
            there += int(is_there.sum())
    return lost / there if there else 0.0


def train(arm: str, seed: int, steps: int, rate: float, every: int) -> dict[str, Any]:
    """Held-out loss and share of swallowed entries by step."""
    implementation, dtype = ARMS[arm]
    tokenizer = AutoTokenizer.from_pretrained(WORK / "model")
    rows, held_out = (
        encode_examples(load_examples(str(WORK / f"{name}.jsonl")), tokenizer, LENGTH).tokens
        for name in ("train", "test")
    )
    collate = DataCollatorForLanguageModeling(pad_token_id(tokenizer))
    model = adapted(implementation, dtype)
    start(model, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[str, Any] = {"loss": {}, "swallowed": {}, "cpu_s_a_step": 0.0}
    found["processor"] = processor()
    taken = []
    for step in range(steps + 1):
        if step % every == 0:
            found["loss"][step] = evaluate_loss(model, held_out, collate, batch_size=16).loss
            found["swallowed"][step] = swallowed(model)
            print(f"  {seed} {arm:16} step {step:3}: {found['loss'][step]:.4f}, "
                  f"swallowed {found['swallowed'][step]:.1%}", flush=True)  # fmt: skip
        if step == steps:
            break
        began = time.process_time()
        chosen = [order[(step * BATCH + i) % len(order)] for i in range(BATCH)]
        model(**collate([rows[i] for i in chosen])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - began)
    found["cpu_s_a_step"] = statistics.median(taken)
    return found


def main() -> None:
    """Run what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rate", type=float, default=5e-4, help="as recipe.yaml has it")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=HERE / "sixteen_bits.json")
    asked = parser.parse_args()
    known = json.loads(asked.out.read_text("utf-8")) if asked.out.is_file() else {}
    how = {"steps": asked.steps, "rate": asked.rate, "rank": RANK, "batch": BATCH,
           "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    if known.setdefault("how", how) != how:
        raise SystemExit(f"{asked.out} was made with {known['how']}, not {how}: name another --out")
    for seed in asked.seeds:
        for arm in asked.arms:
            if arm not in known.setdefault(str(seed), {}):
                known[str(seed)][arm] = train(arm, seed, asked.steps, asked.rate, asked.every)
                asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
