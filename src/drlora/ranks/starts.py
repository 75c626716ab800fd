"""Start from other ranks than the same for all: by what a few batches tell before the first step.

drlora.place_ranks(model, batches)                     # as the setting `start` says
ranks = drlora.ranks_from_routing(model, batches)      # or a rank map, to be changed and used
drlora.start_ranks(model, ranks)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from drlora.adapter.experts import ROWS_TO_LAY, ExpertsAdapter
from drlora.adapter.inject import active_adapter, adapted_layers
from drlora.config.adapter import NOTHING, DrLoraConfig
from drlora.config.options import GRADIENT_ALL, HOT_FRACTION
from drlora.config.registry import STARTS
from drlora.distributed import add_up
from drlora.distributed.zero import adopt, refuse_partitioned, zero_of
from drlora.errors import ConfigError
from drlora.ranks.directions import lay_rows, num_found
from drlora.ranks.linear_probe import point_linears
from drlora.ranks.placement import hot_ranks, proportional_ranks, strongest_ranks
from drlora.ranks.probe import (
    Directions,
    Loss,
    gradients_of_batches,
    own_loss,
    probe_gradients,
)
from drlora.ranks.rank_map import adapters_of
from drlora.ranks.saliency import routed_share


def ranks_from_routing(
    model: PeftModel, batches: Iterable[Mapping[str, Tensor]], mean_rank: int | None = None
) -> dict[str, dict[str, list[int]]]:
    """A rank map in proportion to how much the tokens of a few batches use each expert.

    Counted as the configuration says (`routing_signal`), without padding. Nothing of the model
    changes, and no gradient is left behind.

    Args:
        model: carries a trainable DR-LoRA adapter.
        batches: what the model is called with, labels or not; all of them are counted, so of an
            endless iterator give the first few (`itertools.islice`).
        mean_rank: of the map, between 1 and r_target; by default r_init, so that growth goes on
            from there as planned.

    Raises:
        ConfigError: if `mean_rank` is out of range, or there is no batch.
    """
    adapters = adapters_of(model)
    config = next(iter(adapters.values())).config
    mean = config.r_init if mean_rank is None else mean_rank
    if isinstance(mean, bool) or not isinstance(mean, int) or not 1 <= mean <= config.r_target:
        raise ConfigError(
            f"mean_rank={mean_rank!r} must be a whole number from 1 to r_target={config.r_target}."
        )
    shares = _routed_shares(model, list(adapters.values()), batches)
    found = {}
    for (name, adapter), share_E in zip(adapters.items(), shares, strict=True):
        ranks_E = proportional_ranks(share_E, mean * len(share_E), config.r_max)
        found[name] = {projection: list(ranks_E) for projection in adapter.pools}
    return found


def place_ranks(
    model: PeftModel,
    batches: Iterable[Mapping[str, Tensor]],
    adapter: str | None = None,
    *,
    optimizer: object = None,
    loss: Loss | None = None,
) -> None:
    """Place the ranks of a new adapter as its settings `start` and `start_a` say, once.

    Ranks that `start_ranks` gave stay as they are, and rows of A are laid in them.

    Args:
        model: carries a DR-LoRA adapter that owns no row yet.
        batches: of the training data, on any device; with labels if a gradient is to be taken and
            no loss is given. No more than the option `start_batches` says are drawn, so that it may
            be a whole data loader.
        adapter: its name, which has to be active; by default the model's active adapter.
        optimizer: DeepSpeed's `engine.optimizer`, or a wrapper of it, where ZeRO trains the model
            already; any other is not looked at.
        loss: what is to be lowered, as a function of the model and a batch, where that is not the
            model's own loss: `compute_loss` of TRL's trainers for preferences, for instance.

    Raises:
        ConfigError: if there is no batch, ranks are placed already, the adapter is not active, or
            an expert would pass r_max; or ZeRO has the weights, and its optimizer was not given or
            is of an unknown kind.
    """
    adapters = adapters_of(model, adapter)
    config = next(iter(adapters.values())).config
    if not needs_ranks(model, adapter):
        raise ConfigError(f"start={config.start!r}: the ranks are placed already.")
    name = adapter or active_adapter(model)
    _refuse_inactive(model, name)
    ranks_are_given = bool(config.recorded(ROWS_TO_LAY))
    start: Start = STARTS["uniform" if ranks_are_given else config.start]
    _let_zero_be_written(model, optimizer)
    device = next(iter(adapters.values())).frequency.device
    # Dropout must not move the generator, which the order of the data may depend on.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seen = list(islice(batches, config.option("start_batches")))
        evidence = _evidence(model, adapters, config, start, seen, loss)
        if config.option("start_a") == GRADIENT_ALL:
            point_linears(model, seen, name, loss or own_loss)
    if config.option("start_a") != "random":
        _tell_of_unseen([one for of in evidence.values() for one in of.directions.values()])
    for block, found in adapters.items():
        ranks_E = [] if ranks_are_given else start.place(evidence[block], config)
        for projection, pool in found.rank_pools.items():
            if not ranks_are_given:
                pool.grant(ranks_E, step=0)
            if config.option("start_a") != "random":
                length = pool.row_norm * config.option("start_a_scale")
                lay_rows(pool.lora_A, pool.owner, *evidence[block].directions[projection], length)
    if ranks_are_given:
        config.note(**{ROWS_TO_LAY: False})


def _refuse_inactive(model: PeftModel, name: str) -> None:
    for layer in adapted_layers(model, name).values():
        state, way_out = "not active", f"model.set_adapter({name!r})"
        if layer.merged:
            state, way_out = "merged", "model.unmerge_adapter()"
        elif layer.disable_adapters:
            state, way_out = "disabled", "model.base_model.enable_adapter_layers()"
        elif name in layer.active_adapters:
            continue
        raise ConfigError(
            f"adapter {name!r} is {state}, so nothing of it is computed and its ranks cannot be "
            f"placed; call {way_out} first (active: {layer.active_adapters})."
        )


def _tell_of_unseen(directions: list[Directions]) -> None:
    """Say where no row could be laid, for no token of the batches went there."""
    counts = [num_found(one.strength_ED) for one in directions]
    unseen = sum(int((count_E == 0).sum()) for count_E in counts)
    if unseen:
        warnings.warn(
            f"{unseen} of {sum(map(len, counts))} matrices of experts have no gradient in the "
            f"batches that rows are placed by, since no token goes there; their rows of A stay "
            f"random. More batches (options.start_batches) reach more of them.",
            stacklevel=3,
        )


def _let_zero_be_written(model: PeftModel, optimizer: object) -> None:
    """Find out where ZeRO keeps what it trains, before time is spent."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if (zero := zero_of(optimizer)) is not None:
        adopt(zero, trained)
        return
    refuse_partitioned(
        trained,
        "the rows that place_ranks lays cannot be written: give it optimizer=engine.optimizer, or "
        "call it before deepspeed.initialize on a model that is loaded in one piece.",
    )


def _evidence(
    model: PeftModel,
    adapters: Mapping[str, ExpertsAdapter],
    config: DrLoraConfig,
    start: Start,
    batches: list[Mapping[str, Tensor]],
    loss: Loss | None,
) -> dict[str, Evidence]:
    """What the settings need to know of each block."""
    shares = [[0.0] * adapter.block.num_experts for adapter in adapters.values()]
    if start.needs_routing:
        shares = _routed_shares(model, list(adapters.values()), batches, loss)
    directions: Mapping[str, Mapping[str, Directions]] = {}
    if start.needs_gradient or config.option("start_a") != "random":
        directions = probe_gradients(model, adapters, batches, config.r_max, loss or own_loss)
    return {
        block: Evidence(share_E, directions.get(block, {}))
        for block, share_E in zip(adapters, shares, strict=True)
    }


def needs_ranks(model: PeftModel, adapter: str | None = None) -> bool:
    """Whether `start` or `start_a` asks for `place_ranks`, and it was not called yet."""
    adapters = adapters_of(model, adapter).values()
    config = next(iter(adapters)).config
    if not config.starts_from_data:
        return False
    return bool(config.recorded(ROWS_TO_LAY)) or not any(
        sum(ranks) for found in adapters for ranks in found.ranks().values()
    )


@dataclass(frozen=True)
class Evidence:
    """What is known of the experts of one block before the first step.

    Attributes:
        share_E: (E,) share of routing; zeros unless the way `needs_routing`.
        directions: of the gradient, by projection; empty unless it `needs_gradient`, or `start_a`
            does.
    """

    share_E: list[float]
    directions: Mapping[str, Directions]


@dataclass(frozen=True)
class Start:
    """A way to place ranks before the first step, which the registry STARTS holds by name.

    Attributes:
        place: from what is known of a block's experts to the rank of each, r_init on average.
        needs_routing: whether routing is counted over the first batches.
        needs_gradient: whether the gradient is probed over them.
        leaves_some_out: whether an expert may get no rank at all.
    """

    place: Callable[[Evidence, DrLoraConfig], list[int]]
    needs_routing: bool = False
    needs_gradient: bool = False
    leaves_some_out: bool = False


def _uniform(found: Evidence, config: DrLoraConfig) -> list[int]:
    return [config.r_init] * len(found.share_E)


def _nobody(found: Evidence, config: DrLoraConfig) -> list[int]:
    return [0] * len(found.share_E)


def _by_routing(found: Evidence, config: DrLoraConfig) -> list[int]:
    return proportional_ranks(found.share_E, len(found.share_E) * config.r_init, config.r_max)


def _hot_only(found: Evidence, config: DrLoraConfig) -> list[int]:
    total = len(found.share_E) * config.r_init
    return hot_ranks(found.share_E, total, config.option("hot_fraction"), config.r_max)


def _by_gradient(found: Evidence, config: DrLoraConfig) -> list[int]:
    """By the part of the squared gradient that a direction holds, which is what a small step along
    it gains; projections count alike."""
    parts = []
    for _, strength_ED in found.directions.values():
        energy_ED = strength_ED.double().cpu().square()
        parts.append(energy_ED / energy_ED.sum().clamp(min=torch.finfo(torch.float64).tiny))
    width = min(part.shape[1] for part in parts)
    worth_ED = sum((part[:, :width] for part in parts[1:]), start=parts[0][:, :width])
    return strongest_ranks(worth_ED.tolist(), len(worth_ED) * config.r_init, config.r_max)


STARTS.add("uniform", Start(_uniform))
STARTS.add("routing", Start(_by_routing, needs_routing=True))
STARTS.add(
    "hot",
    Start(_hot_only, needs_routing=True, leaves_some_out=True),
    {"hot_fraction": HOT_FRACTION},
)
STARTS.add("gradient", Start(_by_gradient, needs_gradient=True))
STARTS.add(NOTHING, Start(_nobody, leaves_some_out=True))


def _routed_shares(
    model: PeftModel,
    adapters: list[ExpertsAdapter],
    batches: Iterable[Mapping[str, Tensor]],
    loss: Loss | None = None,
) -> list[list[float]]:
    """For each block the share of routing that each expert gets.

    The meters count in the backward pass and hand their sums out as gradients, so that any loss
    will do that sees all tokens; one that was given knows how the model is called.
    """
    tallies = [adapter.meter.tally_E1 for adapter in adapters]
    sums = [torch.zeros_like(tally_E1) for tally_E1 in tallies]
    count = 0
    for gradients in gradients_of_batches(model, tallies, batches, loss or _sum_of_logits):
        for total_E1, sum_E1 in zip(sums, gradients, strict=True):
            total_E1 += sum_E1
        count += 1
    if not count:
        raise ConfigError("routing was to be counted over no batch; give a few of the training's.")
    for total_E1 in sums:
        add_up(total_E1)  # also makes processes agree that saw the same batches
    return [routed_share(total_E1[:-1], total_E1[-1]).tolist() for total_E1 in sums]


def _sum_of_logits(model: PeftModel, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).logits.float().sum()
