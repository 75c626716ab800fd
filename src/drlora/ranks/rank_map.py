"""Which expert has which rank: read off a model, kept as JSON, and put into a model.

    ranks = drlora.rank_map(model)                  # {block: {projection: [rank of each expert]}}
    json.dump(ranks, file)
    drlora.start_ranks(other, "ranks.json")

The laws of the budget hold: every rank lies between 1 (0 with start="hot") and r_max, and no pool
owns more rows than it has, E * r_target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from drlora.adapter.experts import ROWS_TO_LAY, ExpertsAdapter
from drlora.adapter.inject import active_adapter, adapted_layers
from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.config.options import EQUAL
from drlora.config.registry import STARTS
from drlora.errors import CheckpointError, ConfigError, shown
from drlora.io.files import read_json

# Block -> projection -> rank of each expert: as it is read, and as it may be given.
Ranks = dict[str, dict[str, list[int]]]
RankMap = Mapping[str, Mapping[str, Sequence[int]]]


def adapters_of(model: PeftModel, name: str | None = None) -> dict[str, ExpertsAdapter]:
    """Block -> adapter, of the adapter `name` or the active one.

    Raises:
        ConfigError: if it is no DR-LoRA adapter.
    """
    name = name or active_adapter(model)
    found = {block: layer.adapter(name) for block, layer in adapted_layers(model, name).items()}
    if not found:
        raise ConfigError(f"the model's adapter {name!r} is no DR-LoRA adapter.")
    return found


def rank_map(model: PeftModel) -> Ranks:
    """Block -> projection -> rank of each expert, of the active adapter; JSON takes it as it is."""
    return {name: adapter.ranks() for name, adapter in adapters_of(model).items()}


@dataclass(frozen=True)
class Budget:
    """The ranks of a run.

    Attributes:
        spent: ranks that experts own at the end.
        stored: rows that there are, r_target x experts x layers x projections unless the method
            needs more.
    """

    spent: int
    stored: int
    r_target: int
    experts: int
    layers: int
    projections: int


def budget_of(model: PeftModel) -> Budget:
    """That of the active adapter."""
    adapters = adapters_of(model)
    first = next(iter(adapters.values()))
    pools = _pools(adapters)
    stored = sum(len(pool.book.owner_R) for pool in pools)
    return Budget(
        spent=stored - sum(pool.book.free for pool in pools),
        stored=stored,
        r_target=first.config.r_target,
        experts=first.block.num_experts,
        layers=len(adapters),
        projections=len(first.rank_pools),
    )


def free_parameters(model: PeftModel) -> int:
    """Numbers in rows that no expert owns, or that are copies of others."""
    return sum(pool.spare_numbers for pool in _pools(adapters_of(model)))


def _pools(adapters: Mapping[str, ExpertsAdapter]) -> list[RankPool]:
    return [pool for adapter in adapters.values() for pool in adapter.rank_pools.values()]


def start_ranks(model: PeftModel, ranks: RankMap | str | Path) -> None:
    """Give the experts of the active adapter the ranks of a map, before training.

    An adapter that was trained can only grow this way, since taking a row away would change what
    the model computes. Where `start_a` lays rows of A, `place_ranks` lays them in these ranks.

    Args:
        model: carries a DR-LoRA adapter.
        ranks: a rank map, or a JSON file with one.

    Raises:
        CheckpointError: if the file is no rank map, or the map is for another model.
        ConfigError: if a rank lies outside 1 to r_max, the budget is overspent, projections that
            share a rank differ, a trained expert would shrink, or `start` is yet to place ranks by
            data. Nothing is changed then.
    """
    changes = fitting_ranks(model, ranks)
    is_other = any(pool.book.ranks().tolist() != ranks_E for pool, ranks_E in changes)
    for pool, ranks_E in changes:
        _assign(pool, ranks_E)
    config = next(iter(adapters_of(model).values())).config
    if is_other and config.starts_from_data and config.option("start_a") != "random":
        is_new = not any(bool(pool.lora_B.any()) for pool, _ in changes)
        config.note(**{ROWS_TO_LAY: is_new})


def fitting_ranks(
    model: PeftModel, ranks: RankMap | str | Path
) -> list[tuple[RankPool, list[int]]]:
    """The ranks of a map for each pool of the active adapter, which may be without memory.

    Raises:
        CheckpointError, ConfigError: as `start_ranks` does.
    """
    wanted = read_rank_map(ranks) if isinstance(ranks, (str, Path)) else _checked(ranks, "the map")
    adapters = adapters_of(model)
    _refuse_other_keys(wanted, {name: list(a.pools) for name, a in adapters.items()})
    changes = [
        (pool, _fitting(wanted[name][key], pool, adapter.config, f"{name}, {key}"))
        for name, adapter in adapters.items()
        for key, pool in adapter.rank_pools.items()
    ]
    for name, adapter in adapters.items():
        _refuse_unequal(wanted[name], name, adapter.config)
    _refuse_two_starts(adapters)
    return changes


def read_rank_map(path: str | Path) -> Ranks:
    """The rank map in a JSON file.

    Raises:
        CheckpointError: if it is missing, too large, or anything but a rank map.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no rank map {path}.")
    return _checked(read_json(path, "the rank map"), str(path))


def _checked(found: Any, where: str) -> Ranks:
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


def _refuse_two_starts(adapters: Mapping[str, ExpertsAdapter]) -> None:
    """Where some experts may have no rank, `start` says no more than that: a map may place all."""
    config = next(iter(adapters.values())).config
    if config.start == EQUAL or STARTS[config.start].leaves_some_out:
        return
    if not any(pool.offsets[-1] for pool in _pools(adapters)):
        raise ConfigError(
            f"start={config.start!r} places ranks by data, and a rank map gives them: keep one; "
            f"make the configuration with start={EQUAL!r} to begin with the map."
        )


def _assign(pool: RankPool, ranks_E: list[int]) -> None:
    grants = np.asarray(ranks_E) - pool.book.ranks()
    if (grants >= 0).all():
        pool.grant(grants.tolist(), step=0)
        return
    pool.set_ranks(ranks_E)
