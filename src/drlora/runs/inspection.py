"""What `inspect` finds of a model and an adapter: sizes, memory, growth; and as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BlockShape:
    """One MoE block.

    Attributes:
        name: full name of the module.
        router: full name of its router; None where it is part of the block.
        experts: how many there are.
        top_k: how many of them a token uses; None where that is not known.
        hidden_size: H.
        expert_width: I.
    """

    name: str
    router: str | None
    experts: int
    top_k: int | None
    hidden_size: int
    expert_width: int


@dataclass(frozen=True)
class Parameters:
    """Numbers in the base model, and how many of them are in experts."""

    total: int
    experts: int


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


@dataclass(frozen=True)
class SizeAtRank:
    """Trained numbers if every expert had `rank`, those beside the experts included."""

    rank: float
    parameters: int


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is.

    Attributes:
        projections: that it is on.
        budget_ranks: over all layers and projections.
        r_init, r_target, r_max: its size at each.
        stored: its size with as many rows as are stored, r_target or more.
        beside: what of these is not on experts.
    """

    projections: tuple[str, ...]
    budget_ranks: int
    r_init: SizeAtRank
    r_target: SizeAtRank
    r_max: SizeAtRank
    stored: SizeAtRank
    beside: Beside


@dataclass(frozen=True)
class TrainedParts:
    """GB of an adapter, its gradients and Adam's moments of it."""

    adapter: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class MemoryAtTarget:
    """GB of what is trained, and in all, with another r_target."""

    r_target: int
    trained: float
    total: float


@dataclass(frozen=True)
class Memory:
    """GB (1e9 bytes) of what training keeps.

    Attributes:
        dtype: of the base's weights, of those that are not quantised.
        quantised: what of the base is, in words.
        weights: of the base.
        adapter_at_budget: with gradients and moments, for the rows that are stored.
        adapter_at_r_max_everywhere: the same if every expert had r_max.
        parts: of adapter_at_budget.
        tokens: of a batch, padding included.
        activations: of these, without gradient checkpointing.
        activations_with_checkpointing: and with it.
        by_rank: all of it without checkpointing, for other r_target.
    """

    dtype: str
    quantised: str
    weights: float
    adapter_at_budget: float
    adapter_at_r_max_everywhere: float
    parts: TrainedParts
    tokens: int
    activations: float
    activations_with_checkpointing: float
    by_rank: tuple[MemoryAtTarget, ...]


@dataclass(frozen=True)
class MeanRank:
    """The mean rank after the event at `step`."""

    step: int
    mean_rank: float


@dataclass(frozen=True)
class GrowthForecast:
    """How ranks grow in a run that spends its budget.

    Attributes:
        steps: of the run.
        warmup_steps: of them.
        schedule: in words.
        start_rank: of every expert.
        events: how many there are.
        quota_module_ranks: of a layer and event.
        grow_every, settle_steps: in steps, as they were chosen where the settings are `auto`.
        cap_ranks: most that an expert gains at an event.
        reached_at_step: where the budget is spent, and
        reached_at_share: of the run.
        mean_ranks: after each event.
    """

    steps: int
    warmup_steps: int
    schedule: str
    start_rank: int
    events: int
    quota_module_ranks: int
    grow_every: int
    settle_steps: int
    cap_ranks: int
    reached_at_step: int
    reached_at_share: float
    mean_ranks: tuple[MeanRank, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"reached": True, **asdict(self)}


@dataclass(frozen=True)
class BudgetNotReached:
    """A run that is too short to spend its budget, and the reason with its arithmetic."""

    steps: int
    warmup_steps: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"reached": False, **asdict(self)}


@dataclass(frozen=True)
class Inspection:
    """What DR-LoRA would do to a model.

    Attributes:
        model: as it was named.
        architecture: its class in transformers.
        blocks: those that would be adapted.
        parameters: of the model.
        adapter: its size.
        memory_gb: what training keeps.
        growth: the plan; None if no number of steps was given.
        warnings: what of the plan is unlikely to be wanted, with the way out.
    """

    model: str
    architecture: str
    blocks: tuple[BlockShape, ...]
    parameters: Parameters
    adapter: AdapterSize
    memory_gb: Memory
    growth: GrowthForecast | BudgetNotReached | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `growth` and `warnings` only of a plan."""
        found = asdict(self)
        if self.growth is None:
            del found["growth"], found["warnings"]
        else:
            found["growth"] = self.growth.to_dict()
        return found
