"""A run as its files tell it: settings, measurements, and the rank of every expert over time.

    run = read_run(Path("runs/embedded"))
    run.maps[0].history          # (events + 1, blocks, E) ranks, at the start and after each event

Read are config.yaml (or adapter_config.json), metrics.jsonl, growth.jsonl, events.jsonl and
result.json, as far as they are there; runs from before events.jsonl are readable too. Where neither
events.jsonl nor result.json tells the ranks, the saved adapter does, or before the first event a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from drlora.config.adapter import with_options_apart
from drlora.errors import CheckpointError, DrLoraError
from drlora.io.files import read_json
from drlora.io.jsonl import read_lines
from drlora.io.run_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINT,
    CONFIG,
    EVENT_LOG,
    FORECAST,
    GROWTH_LOG,
    METRICS,
    RESULT,
)
from drlora.io.settings import read_settings

NO_EXPERT = -1
SIGNALS = ("routing", "importance", "saliency")
_OWNER = ".owner"
_CHOSEN = ("grow_every", "settle_steps", "cap")
_POOLS = ".drlora_adapters.pools."

Ranks = NDArray[np.int64]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Granted:
    """A line of growth.jsonl; `event` counts from 1, `block` is an index."""

    event: int
    block: int
    expert: int
    granted: int
    signals: tuple[float, float, float]


@dataclass(frozen=True)
class RankMap:
    """The ranks of what grows together, and what was known of the experts.

    Attributes:
        projection: the projections that share a rank, joined by "+".
        blocks: names, in the model's order.
        experts: E of each block. Arrays have the largest E; places beyond are NO_EXPERT or NaN.
        events: steps of the events.
        history: (events + 1, blocks, E) ranks at the start and after each event.
        grants: what changed.
        known_at: steps at which signals were written, (K,).
        signals: name -> (K, blocks, E) float64.
    """

    projection: str
    blocks: tuple[str, ...]
    experts: tuple[int, ...]
    events: tuple[int, ...]
    history: Ranks
    grants: tuple[Granted, ...]
    known_at: tuple[int, ...]
    signals: dict[str, NDArray[np.float64]]

    def final(self) -> list[list[int]]:
        """block -> rank of each expert, at the end."""
        return [row[:n].tolist() for row, n in zip(self.history[-1], self.experts, strict=True)]


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: the folder's name.
        recipe: the resolved recipe; {} where there is none.
        adapter: settings of the adapter.
        metrics: entries of metrics.jsonl.
        result: result.json; {} of a run that is not finished.
        forecast: forecast.json, what the run was said to take; {} where there is none.
        maps: one, or one a projection where these have ranks of their own; none before a run has
            written any ranks.
    """

    name: str
    recipe: Entry
    adapter: Entry
    metrics: list[Entry]
    result: Entry
    maps: tuple[RankMap, ...]
    forecast: Entry = field(default_factory=dict)

    @property
    def waits_for_growth(self) -> bool:
        """Whether the run is under way and its first growth event is still to come."""
        grows = self.adapter.get("r_init") != self.adapter.get("r_target")
        is_over = bool(self.result) or any(rank_map.events for rank_map in self.maps)
        return bool(self.recipe) and not is_over and (grows or not self.maps)

    @cached_property
    def logs(self) -> list[Entry]:
        """The entries of the training log that have a loss."""
        return [e for e in self.metrics if e.get("kind") == "log" and _is_number(e.get("loss"))]

    @property
    def steps(self) -> int:
        """The last step that is known."""
        known = [e["step"] for e in self.metrics if isinstance(e.get("step"), int)]
        events = [m.events[-1] for m in self.maps if m.events]
        return max([self.result.get("steps") or 0, *known, *events])

    @property
    def epochs_per_step(self) -> float | None:
        """How much of an epoch a step is; None where the log does not tell."""
        known = [e for e in self.logs if e.get("epoch") and e.get("step")]
        return known[-1]["epoch"] / known[-1]["step"] if known else None

    @property
    def diverged_at(self) -> int | None:
        """The first step without a finite loss; of a run that diverged otherwise, its last."""
        logged = [e for e in self.metrics if e.get("kind") == "log" and "loss" in e]
        lost = [e["step"] for e in logged if not _is_number(e["loss"]) or not isfinite(e["loss"])]
        return lost[0] if lost else self.steps if self.result.get("diverged") else None

    def measured(self, kind: str) -> Entry | None:
        """The held-out measurement `before` or `after` training."""
        found = self.result.get(kind)
        # A run that was given more steps was measured after each of its parts.
        return found or next((e for e in reversed(self.metrics) if e.get("kind") == kind), None)


def read_run(folder: Path) -> RunRecord:
    """Read a run directory, finished or not, or a folder with an adapter and its growth.jsonl.

    Raises:
        CheckpointError: if it holds no run, or files that do not fit each other.
    """
    recipe = _mapping(folder / CONFIG)
    saved = with_options_apart(_mapping(folder / ADAPTER_CONFIG))
    adapter = with_options_apart(recipe["adapter"]) if recipe.get("adapter") else saved
    if not recipe.get("adapter") and not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is no run directory: it has neither {CONFIG} nor {ADAPTER_CONFIG}."
        )
    result = _mapping(folder / RESULT)
    # Settings that are `auto` in the recipe, as they were chosen.
    schedule = (saved["record"] or {}).get("schedule") or result.get("schedule") or {}
    adapter = adapter | {name: schedule[name] for name in _CHOSEN if name in schedule}
    try:
        maps = _maps(folder, result)
    except DrLoraError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the files of {folder} do not fit each other: {type(error).__name__}: {error}"
        ) from error
    metrics = list(read_lines(folder / METRICS))
    forecast = _mapping(folder / FORECAST)
    return RunRecord(folder.resolve().name, recipe, adapter, metrics, result, maps, forecast)


def _mapping(path: Path) -> Entry:
    """What a YAML or JSON file holds; {} if it is not there."""
    if not path.is_file():
        return {}
    return read_json(path) if path.suffix == ".json" else read_settings(path)


def _maps(folder: Path, result: Entry) -> tuple[RankMap, ...]:
    growth = [e for e in read_lines(folder / GROWTH_LOG) if e.keys() >= {"step", "granted"}]
    known = [e for e in read_lines(folder / EVENT_LOG) if e.keys() >= {"step", "ranks"}]
    starts = _starts(folder, result, growth, known)
    events = tuple(sorted({entry["step"] for entry in growth}))
    return tuple(
        _map(
            projection,
            start,
            events,
            [e for e in growth if e["projection"] == projection],
            [e for e in known if e["projection"] == projection],
        )
        for projection, start in starts.items()
    )


def _starts(
    folder: Path, result: Entry, growth: list[Entry], known: list[Entry]
) -> dict[str, dict[str, list[int]]]:
    """projection -> block -> ranks at the start."""
    if known:
        ranks: dict[str, dict[str, list[int]]] = {}
        for entry in known:
            of_blocks = ranks.setdefault(entry["projection"], {})
            if entry["block"] not in of_blocks:
                # These are from just before this step's event.
                earlier = [g for g in growth if g["step"] < entry["step"]]
                of_blocks[entry["block"]] = _less(
                    list(entry["ranks"]), earlier, entry["block"], entry["projection"]
                )
        return ranks
    final = result.get("ranks") or _saved_ranks(folder, growth)
    if not final and (growth or not (folder / CONFIG).is_file()):
        raise CheckpointError(
            f"{folder} does not tell the ranks of its experts: there is no {EVENT_LOG}, "
            f"{RESULT} or saved adapter."
        )
    if not final:
        return {}
    return {
        label: {
            block: _less(list(ranks[label.split("+")[0]]), growth, block, label)
            for block, ranks in final.items()
        }
        for label in _labels(growth, final)
    }


def _saved_ranks(folder: Path, growth: list[Entry]) -> dict[str, dict[str, list[int]]]:
    """block -> projection -> ranks, of the saved adapter, or of a checkpoint before any event."""
    logged = {entry["block"] for entry in growth}
    if found := _ranks_of_adapter(folder / ADAPTER_WEIGHTS, logged):
        return found
    for checkpoint in () if growth else sorted(folder.glob(CHECKPOINT.format("*"))):
        if found := _ranks_of_adapter(checkpoint / ADAPTER_WEIGHTS, logged):
            return found
    return {}


def _labels(growth: list[Entry], final: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    """What grew together; where nothing grew, what has equal ranks."""
    if growth:
        return list(dict.fromkeys(entry["projection"] for entry in growth))
    projections = list(next(iter(final.values())))
    together = all(len({tuple(r) for r in ranks.values()}) == 1 for ranks in final.values())
    return ["+".join(projections)] if together else projections


def _less(ranks: list[int], grants: Iterable[Entry], block: str, projection: str) -> list[int]:
    """The ranks before these grants."""
    for grant in grants:
        if grant["block"] == block and grant["projection"] == projection:
            ranks[grant["expert"]] -= grant["granted"]
    return ranks


def _ranks_of_adapter(path: Path, logged: Container[str]) -> dict[str, dict[str, list[int]]]:
    """block -> projection -> rank of each expert, from a saved adapter; {} if there is none."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, list[int]]] = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in sorted(file.keys(), key=_natural):
                if key.endswith(_OWNER) and _POOLS in key:
                    module, _, rest = key.removeprefix("base_model.model.").partition(_POOLS)
                    block = _block_name(module, logged)
                    frequency = key.partition(".pools.")[0] + ".frequency"
                    experts = file.get_slice(frequency).get_shape()[0]
                    owner_R = file.get_tensor(key)
                    counts_E = np.bincount(owner_R[owner_R >= 0], minlength=experts)
                    found.setdefault(block, {})[rest.removesuffix(_OWNER)] = counts_E.tolist()
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found


def _block_name(module: str, logged: Container[str]) -> str:
    """The name of the block, as logs have it, of a module that an adapter takes the place of.

    That is the module of the experts, or the whole block where no module has the experts alone.
    """
    parent, _, child = module.rpartition(".")
    if module in logged or parent in logged:
        return module if module in logged else parent
    return parent if child == "experts" and parent else module


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _map(
    projection: str,
    start: Mapping[str, list[int]],
    events: tuple[int, ...],
    growth: list[Entry],
    known: list[Entry],
) -> RankMap:
    blocks = tuple(start)
    place = {block: number for number, block in enumerate(blocks)}
    experts = tuple(len(ranks) for ranks in start.values())
    shape = (len(blocks), max(experts))
    number_of = {step: number for number, step in enumerate(events, start=1)}
    change = np.zeros((len(events) + 1, *shape), dtype=np.int64)
    change[0] = NO_EXPERT
    for number, ranks in enumerate(start.values()):
        change[0, number, : len(ranks)] = ranks
    grants = []
    for entry in growth:
        event, block, expert = number_of[entry["step"]], place[entry["block"]], entry["expert"]
        if not 0 <= expert < experts[block]:
            raise IndexError(f"{entry['block']} has {experts[block]} experts, but {expert} grew")
        change[event, block, expert] += entry["granted"]
        f, g, saliency = (float(entry.get(name) or 0.0) for name in SIGNALS)
        grants.append(Granted(event, block, expert, int(entry["granted"]), (f, g, saliency)))
    known_at = tuple(sorted({entry["step"] for entry in known}))
    return RankMap(
        projection,
        blocks,
        experts,
        events,
        change.cumsum(axis=0),
        tuple(grants),
        known_at,
        _signals(known, known_at, place, shape),
    )


def _signals(
    known: list[Entry], known_at: tuple[int, ...], place: Mapping[str, int], shape: tuple[int, int]
) -> dict[str, NDArray[np.float64]]:
    arrays = {name: np.full((len(known_at), *shape), np.nan) for name in SIGNALS}
    row = {step: number for number, step in enumerate(known_at)}
    for entry in known:
        for name, array in arrays.items():
            values = [np.nan if value is None else value for value in entry[name]]
            array[row[entry["step"]], place[entry["block"]], : len(values)] = values
    return arrays


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
