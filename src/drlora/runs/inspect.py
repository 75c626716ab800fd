"""What DR-LoRA would do to a model, before anything is downloaded or trained: `drlora inspect`.

    found = inspect("allenai/OLMoE-1B-7B-0924", DrLoraConfig.preset("paper-v3"), steps=38_000)

Only the model's config is read; the model itself is built without memory for its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedConfig, PreTrainedModel

from drlora.adapter.inject import choose_blocks
from drlora.config.adapter import DrLoraConfig
from drlora.config.registry import ALLOCATIONS
from drlora.errors import ConfigError
from drlora.forecast.step import Batch, adapted_on_paper
from drlora.moe.blocks import MoEBlock, active_experts, find_blocks
from drlora.ops.weights import MATRICES
from drlora.ranks.schedule import Competitors, GrowthPlan, make_schedule, plan_of
from drlora.runs.inspection import (
    AdapterSize,
    Beside,
    BlockShape,
    BudgetNotReached,
    GrowthForecast,
    Inspection,
    MeanRank,
    Parameters,
    SizeAtRank,
)
from drlora.runs.loading import load_architecture, model_on_meta
from drlora.runs.memory import LENGTH, TOKENS, adapter_parameters, memory_plan, stored_rank
from drlora.runs.quantise import QuantiseSection
from drlora.runs.recipe import DTYPES

EARLY, LATE, FEW_EVENTS = 0.6, 0.95, 4


def inspect(
    model: str,
    config: DrLoraConfig | None = None,
    steps: int | None = None,
    dtype: str | None = None,
    batch: Batch | None = None,
    quantise: QuantiseSection | None = None,
    optim: str = "adamw_torch",
    trust_remote_code: bool = False,
) -> Inspection:
    """Blocks, parameters, memory and growth plan of an adapter on a model.

    Args:
        model: `embedded`, a folder, the path of a config.json, or a model of the hub.
        config: the adapter to plan for; by default that of the default settings.
        steps: optimizer steps of a run; without it there is no growth plan.
        dtype: of the base weights; by default what the model's config says.
        batch: of a forward and backward pass, that activations are kept for; by default 8 examples
            of 512 tokens.
        quantise: how the base is to be kept; by default as its checkpoint has it.
        optim: the optimizer, by transformers' name.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError: if there is no such model, it has no MoE blocks, its experts cannot be kept so,
            or `dtype` is not known.
    """
    config = config or DrLoraConfig()
    architecture = load_architecture(model, trust_remote_code)
    skeleton = model_on_meta(architecture, trust_remote_code)
    blocks = choose_blocks(skeleton, config)
    weights_dtype = _dtype(dtype, architecture)
    kept = (quantise or QuantiseSection()).of_checkpoint(architecture)
    kept.refuse_unfit(skeleton)
    weight_bytes = kept.weight_bytes(skeleton, weights_dtype, find_blocks(skeleton))
    parameters = _parameters(skeleton, blocks)
    described = tuple(_block(block, skeleton) for block in blocks)
    adapted = adapted_on_paper(skeleton, config, weights_dtype)
    beside = _beside(adapted, config, blocks)
    growth = None if steps is None else _growth(blocks, config, steps)
    return Inspection(
        model=model,
        architecture=type(skeleton).__name__,
        blocks=described,
        parameters=parameters,
        adapter=_adapter(blocks, config, beside),
        memory_gb=memory_plan(
            weight_bytes,
            blocks,
            config,
            beside,
            adapted,
            weights_dtype,
            batch or Batch(max(1, TOKENS // LENGTH), LENGTH),
            str(kept),
            optim,
        ),
        growth=growth,
        warnings=_warnings(growth, config) if isinstance(growth, GrowthForecast) else (),
    )


def _block(block: MoEBlock, skeleton: PreTrainedModel) -> BlockShape:
    return BlockShape(
        name=block.name,
        router=block.router_name,
        experts=block.num_experts,
        top_k=active_experts(skeleton, block),
        hidden_size=block.hidden_size,
        expert_width=block.expert_width,
    )


def _beside(adapted: PeftModel, config: DrLoraConfig, blocks: Sequence[MoEBlock]) -> Beside:
    """Counted on the adapter itself, made without memory."""
    routers = {block.router_name for block in blocks}
    lora: list[int] = []
    saved = {"routers": 0, "modules_to_save": 0}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            pairs = (module.lora_A, module.lora_B)
            lora.append(sum(p.numel() for pair in pairs for p in pair.parameters()))
        elif isinstance(module, ModulesToSaveWrapper):
            kind = "routers" if config.router == "train" and name in routers else "modules_to_save"
            saved[kind] += sum(p.numel() for p in module.modules_to_save.parameters())
    return Beside(len(lora), sum(lora), **saved)


def _parameters(skeleton: PreTrainedModel, blocks: Sequence[MoEBlock]) -> Parameters:
    experts = sum(
        block.num_experts * math.prod(block.shape_of(matrix))
        for block in blocks
        for matrix in MATRICES
    )
    return Parameters(sum(p.numel() for p in skeleton.parameters()), experts)


def _adapter(blocks: Sequence[MoEBlock], config: DrLoraConfig, beside: Beside) -> AdapterSize:
    also = beside.ordinary_lora + beside.modules_to_save + beside.routers

    def at(rank: float) -> SizeAtRank:
        return SizeAtRank(rank, adapter_parameters(blocks, config, rank) + also)

    per_expert = config.r_target * len(config.projections)
    return AdapterSize(
        projections=tuple(config.projections),
        budget_ranks=sum(b.num_experts * per_expert for b in blocks),
        r_init=at(config.r_init),
        r_target=at(config.r_target),
        r_max=at(config.r_max),
        stored=at(stored_rank(config)),
        beside=beside,
    )


def _dtype(name: str | None, architecture: PreTrainedConfig) -> torch.dtype:
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not known; choose one of {list(DTYPES)}.")
    if name is None or name == "auto":
        stored = architecture.dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32
    return getattr(torch, name)


def _growth(
    blocks: Sequence[MoEBlock], config: DrLoraConfig, steps: int
) -> GrowthForecast | BudgetNotReached:
    """The plan of one block; all blocks with as many experts have the same."""
    num_experts, warmup = blocks[0].num_experts, config.resolve_warmup(steps)
    try:
        groups = [Competitors(block.num_experts) for block in blocks]
        schedule = make_schedule(config, groups, steps)
    except ConfigError as error:
        return BudgetNotReached(steps, warmup, str(error))
    plan = plan_of(config, num_experts, schedule)
    curve = _curve(plan, config, num_experts)
    full = [event.step for event in curve if event.mean_rank == config.r_target]
    return GrowthForecast(
        steps=steps,
        warmup_steps=warmup,
        schedule=str(schedule) if plan.event_steps else "no events: ranks stay as they start",
        start_rank=config.r_init,
        events=len(plan.event_steps),
        quota_module_ranks=plan.quota,
        grow_every=schedule.grow_every,
        settle_steps=schedule.settle_steps,
        cap_ranks=schedule.cap,
        reached_at_step=full[0] if full else 0,
        reached_at_share=(full[0] if full else 0) / steps,
        mean_ranks=curve,
    )


def _warnings(growth: GrowthForecast, config: DrLoraConfig) -> tuple[str, ...]:
    """What is unlikely to be wanted, in words, with the way out."""
    if not growth.mean_ranks:
        return ()
    found = []
    steps, at = growth.steps, growth.reached_at_step
    every, settle = growth.grow_every, growth.settle_steps
    done = ALLOCATIONS[config.allocation].done
    if at < EARLY * steps:
        spacing = max(every + 1, math.ceil(0.75 * steps / growth.events))
        found.append(
            f"{done} at {at / steps:.0%} of the run, and what is learned later changes no rank: "
            f"raise grow_every to about {spacing}, or lower settle_steps ({settle})."
        )
    if at > LATE * steps:
        found.append(
            f"{done} at {at / steps:.0%} of the run, which leaves {steps - at} steps to learn with "
            f"all ranks: lower grow_every, or raise settle_steps ({settle})."
        )
    if growth.events < FEW_EVENTS:
        found.append(
            f"there are only {growth.events} events, so ranks follow little of what is "
            f"observed: lower grow_every ({every}) or settle_steps."
        )
    if growth.warmup_steps > every * growth.events:
        found.append(
            f"the warm-up takes {growth.warmup_steps} steps, longer than all growth: lower "
            f"warmup_steps."
        )
    return tuple(found)


def _curve(plan: GrowthPlan, config: DrLoraConfig, num_experts: int) -> tuple[MeanRank, ...]:
    """Step of each event and the mean rank after it."""
    return tuple(
        MeanRank(step, config.r_init + plan.due(event) / num_experts)
        for event, step in enumerate(plan.event_steps, start=1)
    )
