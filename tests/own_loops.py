"""Loops of one's own on experts that are spread over processes, against one process alone.

Called by fsdp_processes, in each of its processes. The process trains the whole model on all
examples as well, and compares: what is returned are the largest differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from tiny import make_batch, trainable
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import OlmoeForCausalLM
from transformers.distributed import DistributedConfig

import drlora
from drlora.adapter.inject import adapted_layers

STEPS = 12
SETTINGS: dict[str, Any] = dict(
    r_init=2, r_target=6, r_max=16, p_grow=0.2, grow_every=2, warmup_steps=2, settle_steps=2,
    lora_alpha=8.0, router="train", young_rows="inherit",
    options={"move_share": 0.2, "young_a": "gradient"},
)  # fmt: skip


def base_model(folder: Path, is_spread: bool) -> OlmoeForCausalLM:
    """The tiny OLMoE that was saved."""
    spread: dict[str, Any] = {}
    if is_spread:
        spread["distributed_config"] = DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=2)
    return OlmoeForCausalLM.from_pretrained(folder / "model-olmoe", **spread)


def new_model(folder: Path, is_spread: bool, **changes: Any) -> PeftModel:
    """It, with an adapter whose first values are the same each time."""
    base = base_model(folder, is_spread)
    if is_spread:
        base(**make_batch())  # FSDP2 settles at the first call what belongs together
    torch.manual_seed(1)
    return get_peft_model(base, drlora.DrLoraConfig(**SETTINGS | changes)).train()


def examples(seed: int, is_spread: bool) -> dict[str, Tensor]:
    """Four of them, or this process's share."""
    share = 4 // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    return {k: v[mine] if is_spread else v for k, v in make_batch(seed, rows=4).items()}


def train(model: PeftModel, is_spread: bool) -> list[Any]:
    """A loop with accumulation, clipping and weight decay; the ranks after each change of them."""
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.1, eps=1e-6)
    dynamics = drlora.RankDynamics(model, STEPS)
    history = [dynamics.ranks()]
    for step in range(STEPS):
        for micro_batch in range(2):
            (model(**examples(100 * step + micro_batch, is_spread)).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.04)
        dynamics.before_optimizer_step()
        optimizer.step()
        dynamics.after_optimizer_step(optimizer)
        optimizer.zero_grad()
        if dynamics.ranks() != history[-1]:
            history.append(dynamics.ranks())
    return history


def gradients(model: PeftModel, is_spread: bool) -> list[Tensor]:
    """Of a batch, in full."""
    model.zero_grad()
    model(**examples(7, is_spread)).loss.backward()
    found = [p.grad for p in trainable(model)]
    return [g.full_tensor() if is_spread else g for g in found]


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Over all of them, which must be of the same shapes."""
    pairs = zip(found, wanted, strict=True)
    return max(float((f - w).abs().max()) for f, w in pairs)


def adapter_of(model: PeftModel) -> list[Tensor]:
    """A, B and routers, in full."""
    return [v.clone() for k, v in drlora.adapter_state(model).items() if v.is_floating_point()]


def refusals(model: PeftModel, folder: Path) -> list[str]:
    """What is said of what cannot be."""

    def with_tensor_parallelism() -> object:
        spread = DistributedConfig(tp_size=2, ep_size=2)
        base = OlmoeForCausalLM.from_pretrained(folder / "model-olmoe", distributed_config=spread)
        return get_peft_model(base, drlora.DrLoraConfig())

    attempts = (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: PeftModel.from_pretrained(
            base_model(folder, True), folder / "loop-adapter", low_cpu_mem_usage=True
        ),
        lambda: new_model(folder, True, modules_to_save=["lm_head"]),
        *([with_tensor_parallelism] if dist.get_world_size() == 2 else []),
    )
    said = []
    for attempt in attempts:
        try:
            attempt()
            said.append("nothing")
        except drlora.ConfigError as error:
            said.append(str(error))
    return said


def compare(folder: Path) -> dict[str, Any]:
    """All comparisons, by name."""
    one, spread = new_model(folder, False), new_model(folder, True)
    frozen = spread.get_base_model().model.layers[0].mlp.experts.base_layer
    found: dict[str, Any] = {
        "experts held": frozen.num_experts,
        "history": [train(one, False), train(spread, True)],
        "trained": largest_difference(adapter_of(spread), adapter_of(one)),
    }
    batch = make_batch(11 + dist.get_rank())
    with torch.no_grad():
        of_one, of_spread = one(**batch).logits, spread(**batch).logits
        with one.disable_adapter(), spread.disable_adapter():
            found["without adapter"] = float(
                (one(**batch).logits - spread(**batch).logits).abs().max()
            )
    found["logits"] = float((of_one - of_spread).abs().max())

    adapter = drlora.adapter_state(spread)
    if dist.get_rank() == 0:
        spread.save_pretrained(folder / "loop-adapter", state_dict=adapter)
    dist.barrier()
    again = PeftModel.from_pretrained(base_model(folder, True), folder / "loop-adapter").eval()
    alone = PeftModel.from_pretrained(base_model(folder, False), folder / "loop-adapter").eval()
    with torch.no_grad():
        found["loaded spread"] = float((again(**batch).logits - of_spread).abs().max())
        found["loaded alone"] = float((alone(**batch).logits - of_one).abs().max())

    # Every token to the first process's experts.
    hooks = [
        module.register_forward_hook(
            lambda _, args, out: tuple(o if o.is_floating_point() else o % 3 for o in out)
        )
        for model in (one, spread)
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    found["no token"] = largest_difference(gradients(spread, True), gradients(one, False))
    layers = [adapted_layers(model, "default") for model in (one, spread)]
    met = [layer.adapter("default").meter.sum_E for layer in layers[1].values()]
    found["tokens of the second"] = float(sum(sum_E[3:].sum() for sum_E in met))
    for hook in hooks:
        hook.remove()

    for of_model in layers:
        for layer in of_model.values():
            for pool in layer.adapter("default").rank_pools.values():
                pool.set_ranks([4, 0, 8, 0, 0, 0])
    found["no row"] = largest_difference(gradients(spread, True), gradients(one, False))
    found["said"] = refusals(spread, folder)
    frozen_forward = spread.unload().model.layers[0].mlp.experts.forward
    found["left behind"] = frozen_forward.__module__

    placed = {"options": {"start_a": "gradient"}}
    models = new_model(folder, False, **placed), new_model(folder, True, **placed)
    for model, is_spread in zip(models, (False, True), strict=True):
        drlora.place_ranks(model, [examples(n, is_spread) for n in range(2)])
    found["probed"] = largest_difference(*(adapter_of(model) for model in reversed(models)))
    return found | {"collectives": collectives(models[1], folder)}


def collectives(model: PeftModel, folder: Path) -> dict[str, Any]:
    """How many there are in a step of one batch: with the adapter, without, to grow and to save."""
    dynamics = drlora.RankDynamics(model, STEPS, step=1)
    model.zero_grad()
    counted: dict[str, Any] = {}
    with CommDebugMode() as mode:
        loss = model(**examples(0, True)).loss
    counted["forward"] = by_name(mode)
    with CommDebugMode() as mode:
        loss.backward()
    counted["backward"] = by_name(mode)
    with CommDebugMode() as mode, all_reduces() as sizes:
        dynamics.before_optimizer_step()
    counted["dynamics"], counted["numbers summed"] = by_name(mode), sizes
    with CommDebugMode() as mode:
        dynamics._agree()
    counted["agreement"] = by_name(mode)
    with CommDebugMode() as mode, torch.no_grad(), model.disable_adapter():
        model(**examples(0, True))
    counted["frozen forward"] = by_name(mode)
    with CommDebugMode() as mode:
        model.save_pretrained(folder / "saved", is_main_process=dist.get_rank() == 0)
    counted["save"] = by_name(mode)
    return counted


@contextmanager
def all_reduces() -> Iterator[list[int]]:
    """How many numbers each all-reduce adds up meanwhile."""
    sizes, real = [], dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = real


def by_name(mode: CommDebugMode) -> dict[str, int]:
    """Name of a collective -> how often it was called."""
    found: dict[str, int] = {}
    for operator, count in mode.get_comm_counts().items():
        name = str(operator).rpartition(".")[2].strip("_")
        found[name] = found.get(name, 0) + count
    return found
