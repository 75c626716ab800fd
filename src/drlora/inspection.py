"""What DR-LoRA would do to a model, before anything is downloaded or trained: `drlora inspect`.

    found = inspect_model("allenai/OLMoE-1B-7B-0924", DrLoraConfig.preset("paper-v3"), steps=38_000)

Only the model's config is read; the model itself is built without memory for its weights.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from drlora.assemble import load_architecture, model_on_meta
from drlora.blocks import MoEBlock, active_experts
from drlora.config import DrLoraConfig
from drlora.errors import ConfigError
from drlora.inject import choose_blocks
from drlora.ops.parts import MATRICES
from drlora.recipe import DTYPES
from drlora.schedule import GrowthPlan, plan_growth

GB = 1e9
# A trained adapter number in float32: itself, its gradient, Adam's two moments.
TRAINED_BYTES = 4 * 4
EVENTS_SHOWN = 12


def inspect_model(
    model: str, config: DrLoraConfig, steps: int | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Blocks, parameters, memory and growth plan, as plain values.

    Args:
        model: `embedded`, a folder, the path of a config.json, or a model of the hub.
        config: the adapter to plan for.
        steps: optimizer steps of a run; without it there is no growth plan.
        dtype: of the base weights; by default what the model's config says.

    Returns:
        A JSON-ready mapping: `blocks`, `parameters`, `adapter` (trained parameters if every expert
        had a rank, and those `beside` the experts, which are part of them), `memory_gb`, and with
        `steps` `growth`. A plan that cannot spend the budget has `reached: false` and the reason.

    Raises:
        ConfigError: if there is no such model, it has no MoE blocks, or `dtype` is not known.
    """
    architecture = load_architecture(model)
    skeleton = model_on_meta(architecture)
    blocks = choose_blocks(skeleton, config)
    weights_dtype = _dtype(dtype, architecture)
    parameters = _parameters(skeleton, blocks)
    described = [_block(block, architecture, skeleton) for block in blocks]
    beside = _beside(skeleton, config)
    found = {
        "model": model,
        "architecture": type(skeleton).__name__,
        "blocks": described,
        "parameters": parameters,
        "adapter": _adapter(blocks, config, beside),
        "memory_gb": _memory(parameters["total"], blocks, config, beside, weights_dtype),
    }
    if steps is not None:
        found["growth"] = _growth(blocks, config, steps)
    return found


@dataclass(frozen=True)
class Beside:
    """What is trained beside the experts, in numbers.

    Attributes:
        ordinary_lora: A and B on `target_modules`, of `layers` linear layers.
        modules_to_save: modules that are trained in full, in the dtype of the model.
        routers: trained in float32.
    """

    layers: int
    ordinary_lora: int
    modules_to_save: int
    routers: int


def adapter_parameters(blocks: Sequence[MoEBlock], config: DrLoraConfig, rank: int) -> int:
    """Numbers in A and B if every expert had `rank`."""
    return sum(
        block.num_experts * rank * sum(block.shape_of(projection))
        for block in blocks
        for projection in config.projections
    )


def _block(
    block: MoEBlock, architecture: PreTrainedConfig, skeleton: PreTrainedModel
) -> dict[str, Any]:
    return {
        "name": block.name,
        "router": block.router_name,
        "experts": block.num_experts,
        "top_k": active_experts(skeleton, block),
        "hidden_size": block.hidden_size,
        "expert_width": block.expert_width,
    }


def _beside(skeleton: PreTrainedModel, config: DrLoraConfig) -> Beside:
    """Counted on the adapter itself, made without memory; `skeleton` is used up."""
    routers = {block.router_name for block in choose_blocks(skeleton, config)}
    get_peft_model(skeleton, copy.deepcopy(config), low_cpu_mem_usage=True)
    lora: list[int] = []
    saved = {"routers": 0, "modules_to_save": 0}
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer):
            pairs = (module.lora_A, module.lora_B)
            lora.append(sum(p.numel() for pair in pairs for p in pair.parameters()))
        elif isinstance(module, ModulesToSaveWrapper):
            kind = "routers" if config.router == "train" and name in routers else "modules_to_save"
            saved[kind] += sum(p.numel() for p in module.modules_to_save.parameters())
    return Beside(len(lora), sum(lora), **saved)


def _parameters(skeleton: PreTrainedModel, blocks: Sequence[MoEBlock]) -> dict[str, int]:
    experts = sum(
        block.num_experts * math.prod(block.shape_of(matrix))
        for block in blocks
        for matrix in MATRICES
    )
    return {"total": sum(p.numel() for p in skeleton.parameters()), "experts": experts}


def _adapter(blocks: Sequence[MoEBlock], config: DrLoraConfig, beside: Beside) -> dict[str, Any]:
    ranks = {name: getattr(config, name) for name in ("r_init", "r_target", "r_max")}
    also = beside.ordinary_lora + beside.modules_to_save + beside.routers
    return {
        "projections": list(config.projections),
        "budget_ranks": sum(
            b.num_experts * config.r_target * len(config.projections) for b in blocks
        ),
        **{
            name: {"rank": rank, "parameters": adapter_parameters(blocks, config, rank) + also}
            for name, rank in ranks.items()
        },
        "beside": asdict(beside),
    }


def _memory(
    num_weights: int,
    blocks: Sequence[MoEBlock],
    config: DrLoraConfig,
    beside: Beside,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """GB (1e9 bytes) of weights and of what training keeps for the adapter; no activations."""
    weights = num_weights * dtype.itemsize
    # Of a module that is trained in full the frozen one stays too; all four are in its dtype.
    saved = beside.modules_to_save * 4 * dtype.itemsize
    also = (beside.ordinary_lora + beside.routers) * TRAINED_BYTES + saved

    def trained(rank: int) -> float:
        return (adapter_parameters(blocks, config, rank) * TRAINED_BYTES + also) / GB

    return {
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights / GB,
        "adapter_at_budget": trained(config.r_target),
        "adapter_at_r_max_everywhere": trained(config.r_max),
    }


def _dtype(name: str | None, architecture: PreTrainedConfig) -> torch.dtype:
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not known; choose one of {list(DTYPES)}.")
    if name is None or name == "auto":
        stored = architecture.dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32
    return getattr(torch, name)


def _growth(blocks: Sequence[MoEBlock], config: DrLoraConfig, steps: int) -> dict[str, Any]:
    """The plan of one block; all blocks with as many experts have the same."""
    num_experts = blocks[0].num_experts
    common: dict[str, Any] = {"steps": steps, "warmup_steps": config.resolve_warmup(steps)}
    try:
        plans = {n: plan_growth(config, n, steps) for n in {b.num_experts for b in blocks}}
    except ConfigError as error:
        return {**common, "reached": False, "reason": str(error)}
    plan = plans[num_experts]
    curve = _curve(plan, config, num_experts)
    full = [event["step"] for event in curve if event["mean_rank"] == config.r_target]
    return {
        **common,
        "events": len(plan.event_steps),
        "quota_module_ranks": plan.quota,
        "cap_ranks": config.grant_cap,
        "reached": True,
        "reached_at_step": full[0] if full else 0,
        "mean_ranks": curve,
    }


def _curve(plan: GrowthPlan, config: DrLoraConfig, num_experts: int) -> list[dict[str, Any]]:
    """Step of each event and the mean rank after it."""
    return [
        {"step": step, "mean_rank": config.r_init + plan.due(event) / num_experts}
        for event, step in enumerate(plan.event_steps, start=1)
    ]


def print_inspection(found: dict[str, Any], console: Console | None = None) -> None:
    """Show what `inspect_model` found."""
    console = console or Console(highlight=False, soft_wrap=True)
    parameters, adapter, memory = found["parameters"], found["adapter"], found["memory_gb"]
    console.print(
        f"{found['model']} ({found['architecture']}): {parameters['total']:,} parameters, "
        f"{parameters['experts']:,} of them in experts"
    )
    console.print(_block_table(found["blocks"]))
    console.print(f"adapter on {', '.join(adapter['projections'])} of every expert:")
    for name in ("r_init", "r_target", "r_max"):
        row = adapter[name]
        console.print(f"  {name:8} {row['rank']:4}  {row['parameters']:>15,} parameters")
    _print_beside(adapter["beside"], console)
    console.print(f"  budget   {adapter['budget_ranks']:,} ranks over all layers and projections")
    console.print(
        f"memory without activations: weights {memory['weights']:.2f} GB ({memory['dtype']}), "
        f"adapter{'' if adapter['beside']['modules_to_save'] else ' in float32'} with gradients "
        f"and Adam moments {memory['adapter_at_budget']:.2f} GB "
        f"(r_max for every expert would be {memory['adapter_at_r_max_everywhere']:.2f} GB)"
    )
    if "growth" in found:
        _print_growth(found["growth"], console)


def _print_beside(beside: dict[str, int], console: Console) -> None:
    if beside["layers"]:
        lora = f"{beside['ordinary_lora']:,} in LoRA on {beside['layers']} other layers"
        console.print(f"    of them {lora}")
    if beside["routers"]:
        console.print(f"    of them {beside['routers']:,} in routers")
    if beside["modules_to_save"]:
        console.print(f"    of them {beside['modules_to_save']:,} in modules trained in full")


def _block_table(blocks: list[dict[str, Any]]) -> Table:
    """One row for each run of blocks of the same shape."""
    table = Table(title=f"{len(blocks)} MoE blocks", box=None, pad_edge=False)
    for name in ("blocks", "experts", "top-k", "gate_up (E, 2I, H)", "down (E, H, I)"):
        table.add_column(name)
    shape = itemgetter("experts", "top_k", "hidden_size", "expert_width")
    for (e, k, h, i), run in itertools.groupby(blocks, key=shape):
        names = [block["name"] for block in run]
        label = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        shapes = (str((e, 2 * i, h)), str((e, h, i)))
        table.add_row(label, str(e), str(k or "?"), *shapes)
    return table


def _print_growth(growth: dict[str, Any], console: Console) -> None:
    console.print(f"growth over {growth['steps']:,} steps:")
    if not growth["reached"]:
        console.print(f"  the budget is not reached: {growth['reason']}")
        return
    console.print(
        f"  {growth['events']} events, quota {growth['quota_module_ranks']} module ranks a layer "
        f"and event, cap {growth['cap_ranks']} ranks an expert and event"
    )
    for event in _thinned(growth["mean_ranks"]):
        console.print(f"  after step {event['step']:6}: mean rank {event['mean_rank']:.2f}")
    console.print(f"  the budget is reached at step {growth['reached_at_step']:,}")


def _thinned(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about EVENTS_SHOWN of them, the first and the last included."""
    stride = max(1, -(-len(events) // EVENTS_SHOWN))
    return events[::stride] + ([events[-1]] if (len(events) - 1) % stride else [])
