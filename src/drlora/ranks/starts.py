"""Start from other ranks than the same for all: from a rank map, or from how tokens are routed.

    model = get_peft_model(base, DrLoraConfig(r_init=8, r_target=16, r_max=32))
    ranks = drlora.ranks_from_routing(model, batches)      # or a JSON file with such a map
    drlora.start_ranks(model, ranks)

A rank map is `{block: {projection: [rank of each expert]}}`, as `RankDynamics.ranks()` gives it.
The laws of the budget hold: every rank lies between 1 (0 with start="hot") and r_max, and no pool
owns more rows than it has, E * r_target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from drlora.adapter.experts import ExpertsAdapter
from drlora.adapter.inject import active_adapter, adapted_layers
from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.config.options import HOT_FRACTION
from drlora.config.registry import STARTS
from drlora.distributed import add_up
from drlora.errors import CheckpointError, ConfigError, shown
from drlora.io.files import read_json
from drlora.ranks.directions import lay_rows
from drlora.ranks.placement import hot_ranks, proportional_ranks, strongest_ranks
from drlora.ranks.probe import Directions, gradients_of_batches, probe_gradients
from drlora.ranks.saliency import routed_share

RankMap = Mapping[str, Mapping[str, Sequence[int]]]


def rank_map(model: PeftModel) -> dict[str, dict[str, list[int]]]:
    """Block -> projection -> rank of each expert, of the active adapter; JSON takes it as it is."""
    return {name: adapter.ranks() for name, adapter in _adapters(model).items()}


def start_ranks(model: PeftModel, ranks: RankMap | str | Path) -> None:
    """Give the experts of the active adapter the ranks of a map, before training.

    An adapter that was trained can only grow this way, since taking a row away would change what
    the model computes.

    Args:
        model: carries a DR-LoRA adapter.
        ranks: a rank map, or a JSON file with one.

    Raises:
        CheckpointError: if the file is no rank map, or the map is for another model.
        ConfigError: if a rank lies outside 1 to r_max, the budget is overspent, projections that
            share a rank differ, or a trained expert would shrink. Nothing is changed then.
    """
    for pool, ranks_E in fitting_ranks(model, ranks):
        _assign(pool, ranks_E)


def fitting_ranks(
    model: PeftModel, ranks: RankMap | str | Path
) -> list[tuple[RankPool, list[int]]]:
    """The ranks of a map for each pool of the active adapter, which may be without memory.

    Raises:
        CheckpointError, ConfigError: as `start_ranks` does.
    """
    wanted = read_rank_map(ranks) if isinstance(ranks, (str, Path)) else _checked(ranks, "the map")
    adapters = _adapters(model)
    _refuse_other_keys(wanted, {name: list(a.pools) for name, a in adapters.items()})
    changes = [
        (pool, _fitting(wanted[name][key], pool, adapter.config, f"{name}, {key}"))
        for name, adapter in adapters.items()
        for key, pool in adapter.rank_pools.items()
    ]
    for name, adapter in adapters.items():
        _refuse_unequal(wanted[name], name, adapter.config)
    return changes


def ranks_from_routing(
    model: PeftModel, batches: Iterable[Mapping[str, Tensor]], mean_rank: int | None = None
) -> dict[str, dict[str, list[int]]]:
    """A rank map in proportion to how much the tokens of a few batches use each expert.

    Counted as the configuration says (`routing_signal`), without padding. Nothing of the model
    changes, and no gradient is left behind.

    Args:
        model: carries a trainable DR-LoRA adapter.
        batches: what the model is called with, labels or not.
        mean_rank: of the map, between 1 and r_target; by default r_init, so that growth goes on
            from there as planned.

    Raises:
        ConfigError: if `mean_rank` is out of range, or there is no batch.
    """
    adapters = _adapters(model)
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
    model: PeftModel, batches: Iterable[Mapping[str, Tensor]], adapter: str | None = None
) -> None:
    """Place the ranks of a new adapter as its settings `start` and `start_a` say, once.

    Args:
        model: carries a DR-LoRA adapter that owns no row yet.
        batches: a few batches of the training data, on any device; with labels if a gradient is
            to be taken.
        adapter: its name; by default the model's active adapter.

    Raises:
        ConfigError: if there is no batch, ranks are placed already, or an expert would pass r_max.
    """
    adapters = _adapters(model, adapter)
    config = next(iter(adapters.values())).config
    if not needs_ranks(model, adapter):
        raise ConfigError(f"start={config.start!r}: the ranks are placed already.")
    device = next(iter(adapters.values())).frequency.device
    # Dropout must not move the generator, which the order of the data may depend on.
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        evidence = _evidence(model, adapters, config, list(batches))
    for block, found in adapters.items():
        ranks_E = STARTS[config.start].place(evidence[block], config)
        for projection, pool in found.rank_pools.items():
            pool.grant(ranks_E, step=0)
            if config.option("start_a") == "gradient":
                length = pool.row_norm * config.option("start_a_scale")
                rows_EDI = evidence[block].directions[projection].rows_EDI
                lay_rows(pool.lora_A, pool.owner, rows_EDI * length)


def _evidence(
    model: PeftModel,
    adapters: Mapping[str, ExpertsAdapter],
    config: DrLoraConfig,
    batches: list[Mapping[str, Tensor]],
) -> dict[str, Evidence]:
    """What the settings need to know of each block."""
    start: Start = STARTS[config.start]
    shares = [[0.0] * adapter.block.num_experts for adapter in adapters.values()]
    if start.needs_routing:
        shares = _routed_shares(model, list(adapters.values()), batches)
    directions: Mapping[str, Mapping[str, Directions]] = {}
    if start.needs_gradient or config.option("start_a") == "gradient":
        directions = probe_gradients(model, adapters, batches, config.r_max)
    return {
        block: Evidence(share_E, directions.get(block, {}))
        for block, share_E in zip(adapters, shares, strict=True)
    }


def needs_ranks(model: PeftModel, adapter: str | None = None) -> bool:
    """Whether no expert owns a row yet: `start` or `start_a` asks for `place_ranks`."""
    adapters = _adapters(model, adapter).values()
    return not any(sum(ranks) for found in adapters for ranks in found.ranks().values())


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


def read_rank_map(path: str | Path) -> dict[str, dict[str, list[int]]]:
    """The rank map in a JSON file.

    Raises:
        CheckpointError: if it is missing, too large, or anything but a rank map.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no rank map {path}.")
    return _checked(read_json(path, "the rank map"), str(path))


def _checked(found: Any, where: str) -> dict[str, dict[str, list[int]]]:
    """`found` if it is of the form of a rank map."""
    form = f"{where} is no rank map {{block: {{projection: [rank, ...]}}}}"
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{form}: it is a {type(found).__name__} of {shown(found)}.")
    for block, projections in found.items():
        if not isinstance(projections, Mapping) or not projections:
            raise CheckpointError(f"{form}: {block!r} holds {shown(projections)}.")
        for projection, ranks in projections.items():
            if not isinstance(ranks, (list, tuple)):
                raise CheckpointError(f"{form}: {block}, {projection} holds {shown(ranks)}.")
            for rank in ranks:
                if isinstance(rank, bool) or not isinstance(rank, int):
                    raise CheckpointError(
                        f"{form}: a rank of {block}, {projection} is {shown(rank)}."
                    )
    return {block: {p: list(r) for p, r in inner.items()} for block, inner in found.items()}


def _refuse_other_keys(wanted: RankMap, here: Mapping[str, list[str]]) -> None:
    pairs = {(block, key) for block, inner in wanted.items() for key in inner}
    own = {(block, key) for block, keys in here.items() for key in keys}
    if pairs != own:
        missing, unknown = sorted(own - pairs)[:2], sorted(pairs - own)[:2]
        raise CheckpointError(
            f"the rank map is for another model or other projections: missing are {missing}, not "
            f"in the model are {unknown}."
        )


def _fitting(ranks: Sequence[int], pool: RankPool, config: DrLoraConfig, where: str) -> list[int]:
    """`ranks` if the pool can hold them."""
    if len(ranks) != pool.book.num_experts:
        raise CheckpointError(
            f"{where}: the rank map has {len(ranks)} ranks for {pool.book.num_experts} experts."
        )
    for expert, rank in enumerate(ranks):
        lowest = 0 if STARTS[config.start].leaves_some_out else 1
        if not lowest <= rank <= config.r_max:
            raise ConfigError(
                f"{where}: expert {expert} is to have rank {rank}; ranks lie between {lowest} and "
                f"r_max={config.r_max}."
            )
    rows = len(pool.book.owner_R)
    if sum(ranks) > rows:
        raise ConfigError(
            f"{where}: the ranks add up to {sum(ranks)}, but the budget is E * r_target = {rows}; "
            f"raise r_target or lower the ranks."
        )
    shrinking = [e for e, now in enumerate(pool.book.ranks()) if ranks[e] < now]
    if shrinking and not pool.lora_B.is_meta and bool(pool.lora_B.any()):
        raise ConfigError(
            f"{where}: expert {shrinking[0]} would lose rank, but the adapter is trained already; "
            f"set ranks before training, or ranks that are nowhere smaller."
        )
    return list(ranks)


def _refuse_unequal(ranks: Mapping[str, Sequence[int]], block: str, config: DrLoraConfig) -> None:
    if config.option("rank_per") == "expert" and len({tuple(r) for r in ranks.values()}) > 1:
        raise ConfigError(
            f"{block}: the projections have different ranks in the rank map, but share one with "
            f"rank_per='expert'; set rank_per='projection'."
        )


def _assign(pool: RankPool, ranks_E: list[int]) -> None:
    grants = np.asarray(ranks_E) - pool.book.ranks()
    if (grants >= 0).all():
        pool.grant(grants.tolist(), step=0)
        return
    pool.set_ranks(ranks_E)


def _routed_shares(
    model: PeftModel, adapters: list[ExpertsAdapter], batches: Iterable[Mapping[str, Tensor]]
) -> list[list[float]]:
    """For each block the share of routing that each expert gets.

    The meters count in the backward pass and hand their sums out as gradients.
    """
    tallies = [adapter.meter.tally_E1 for adapter in adapters]
    sums = [torch.zeros_like(tally_E1) for tally_E1 in tallies]
    count = 0
    for gradients in gradients_of_batches(model, tallies, batches, _sum_of_logits):
        for total_E1, sum_E1 in zip(sums, gradients, strict=True):
            total_E1 += sum_E1
        count += 1
    if not count:
        raise ConfigError("routing was to be counted over no batch; give a few of the training's.")
    for total_E1 in sums:
        add_up(total_E1)  # also makes processes agree that saw the same batches
    return [routed_share(total_E1[:-1], total_E1[-1]).tolist() for total_E1 in sums]


def _sum_of_logits(output: Any) -> Tensor:
    return output.logits.float().sum()


def _adapters(model: PeftModel, name: str | None = None) -> dict[str, ExpertsAdapter]:
    name = name or active_adapter(model)
    found = {block: layer.adapter(name) for block, layer in adapted_layers(model, name).items()}
    if not found:
        raise ConfigError(f"the model's adapter {name!r} is no DR-LoRA adapter.")
    return found
