"""The folder of results: the finished cells, the failed ones; reading and pairing.

cells.jsonl.gz, items.jsonl.gz               the finished cells (see drlora.compare.packed)
failed/NAME-KEY.json                         the error of a cell that failed
README.md, figures.svg                       the page
runs/                                        what is under way; never committed
runs/cells/NAME-KEY.json                     a finished cell that is not packed yet
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from drlora.compare.cells import (
    Cell,
    compare_cells,
    deciding,
    is_made_of_other,
    places,
    tune_cells,
)
from drlora.compare.metrics import METRICS, items_of, value_of
from drlora.compare.packed import Result, pack, place_of, read_packed, read_places
from drlora.compare.plan import Plan, Settings
from drlora.errors import CheckpointError
from drlora.io.files import read_json
from drlora.io.jsonl import finite
from drlora.io.writing import write_at_once

Place = tuple[str, str, str]
"""(model, task, method)."""


@dataclass(frozen=True)
class Folder:
    """Where a comparison keeps its results.

    Attributes:
        path: the folder.
        also: folders of other comparisons, whose finished cells count where they are the same runs.
    """

    path: Path
    also: tuple[Path, ...] = ()

    @classmethod
    def of(cls, plan: Plan, root: Path = Path()) -> Folder:
        """The folder of a plan whose paths start at `root`."""
        return cls(root / plan.output_dir, tuple(root / other for other in plan.also))

    @property
    def cells(self) -> Path:
        """Finished cells that are not packed yet."""
        return self.runs / "cells"

    @property
    def failed(self) -> Path:
        """Errors of failed cells."""
        return self.path / "failed"

    @property
    def runs(self) -> Path:
        """Run directories and logs of the cells under way."""
        return self.path / "runs"

    def cell_file(self, cell: Cell) -> Path:
        """Where the result of a cell goes."""
        return self.cells / f"{cell.name}.json"

    def failure_file(self, cell: Cell) -> Path:
        """Where the error of a cell goes."""
        return self.failed / f"{cell.name}.json"

    def results(self, cells: Iterable[Cell]) -> dict[str, Result]:
        """Key -> result of those of `cells` that are finished with the settings they have now."""
        files: dict[str, Path] = {}
        packed: dict[str, Result] = {}
        for folder in (*self.also, self.path):
            packed |= read_packed(folder)
            files |= _by_key(Folder(folder).cells)
        locations = read_places(self.path)
        found = {}
        for cell in cells:
            single = read_result(files[cell.key]) if cell.key in files else None
            placed = packed.get(locations.get(place_of(cell), ""))
            recorded = placed.get("contents") if placed else None  # version 0.1 did not say
            if recorded is not None and is_made_of_other(cell.recipe, recorded):
                placed = None
            for result in (single, packed.get(cell.key), placed):
                if result is not None and _is_of(cell, result):
                    found[cell.key] = result
                    break
        return found

    def pack(self, cells: Iterable[Cell], results: Mapping[str, Result]) -> None:
        """Put the finished cells into files to keep; `results` are those of `cells`."""
        done = {place_of(c): results[c.key]["key"] for c in cells if c.key in results}
        pack(self.path, self.cells, done)

    def failures(self, cells: Iterable[Cell]) -> dict[str, Result]:
        """Key -> error of those of `cells` that failed."""
        files = _by_key(self.failed)
        read = {cell.key: read_result(files[cell.key]) for cell in cells if cell.key in files}
        return {key: failure for key, failure in read.items() if failure is not None}


@dataclass(frozen=True)
class Choice:
    """What tuning chose at one place.

    Attributes:
        settings: the chosen point of the grid.
        means: each point with its mean metric; None where a run diverged.
        at_edge: the tuned settings that lie at an end of what was tried.
    """

    settings: Settings
    means: list[tuple[Settings, float | None]]
    at_edge: list[str]


@dataclass(frozen=True)
class Matrix:
    """A plan beside what is known of it.

    Attributes:
        tune, compare: the cells; of `compare` those whose tuned settings are known.
        choices: place -> what tuning chose, for the places where all of it is finished.
        results: key -> result.
        failures: key -> error, of cells without a result.
        waiting: compared cells that cannot be named before tuning is finished.
    """

    plan: Plan
    tune: list[Cell]
    compare: list[Cell]
    choices: dict[Place, Choice]
    results: dict[str, Result]
    failures: dict[str, Result]
    waiting: int

    @property
    def cells(self) -> list[Cell]:
        """All cells that can be named, each run once."""
        return list({cell.key: cell for cell in (*self.tune, *self.compare)}.values())

    def values(self, metric: str, place: Place) -> dict[int, float]:
        """Seed -> metric of the finished compared cells of a place."""
        return self._by_place.get((metric, *place), {})

    @property
    def _by_place(self) -> dict[tuple[str, str, str, str], dict[int, float]]:
        cached = self.__dict__.get("_values")
        if cached is None:
            cached = {}
            for cell in self.compare:
                if cell.key not in self.results:
                    continue
                for metric in METRICS:
                    value = value_of(metric, self.results[cell.key]["after"])
                    if value is not None:
                        cached.setdefault((metric, *cell.place), {})[cell.seed] = value
            self.__dict__["_values"] = cached
        return cached

    def items(self, metric: str, place: Place, seeds: Collection[int]) -> list[list[float]]:
        """The held-out items of a place's runs, one list a seed; none if one has not kept them."""
        runs = [c for c in self.compare if c.place == place and c.seed in seeds]
        found = [items_of(metric, self.results[c.key]) for c in runs if c.key in self.results]
        return [values for values in found if values] if all(found) else []

    def finished(self, place: Place | None = None) -> list[Result]:
        """Results of the compared cells, of one place or of all."""
        chosen = [c for c in self.compare if place is None or c.place == place]
        return [self.results[cell.key] for cell in chosen if cell.key in self.results]


def read_matrix(plan: Plan, folder: Folder) -> Matrix:
    """What the folder knows of a plan.

    Raises:
        ConfigError: what is wrong with a recipe that the plan makes.
    """
    tune, choices, results = _tuning(plan, folder)
    compare = compare_cells(plan, {place: choice.settings for place, choice in choices.items()})
    results |= folder.results(compare)
    failures = {
        key: failure
        for key, failure in folder.failures([*tune, *compare]).items()
        if key not in results
    }
    total = sum(len(plan.seeds_of(task)) for _, task, _ in places(plan))
    return Matrix(plan, tune, compare, choices, results, failures, total - len(compare))


def _tuning(
    plan: Plan, folder: Folder
) -> tuple[list[Cell], dict[Place, Choice], dict[str, Result]]:
    """The tuning cells that can be named, what they chose where they are finished, and results.

    A list of values whose best lies at its end is extended as the plan allows; whoever does must
    wait for the new cells, so such a place has no choice yet.
    """
    points = {place: plan.tune.points() if plan.tune else [] for place in places(plan)}
    results: dict[str, Result] = {}
    while True:
        cells = tune_cells(plan, points)
        results |= folder.results(cell for cell in cells if cell.key not in results)
        choices = choose(plan, cells, results)
        more = {place: _beyond(plan, points[place], choice) for place, choice in choices.items()}
        if not any(more.values()):
            return cells, choices, results
        points |= {place: [*points[place], *new] for place, new in more.items()}


def _beyond(plan: Plan, tried: list[Settings], choice: Choice) -> list[Settings]:
    """Points past the ends at which the choice lies; none if every run diverged."""
    if plan.tune is None or all(mean is None for _, mean in choice.means):
        return []
    return [p for k in choice.at_edge for p in plan.tune.beyond(tried, choice.settings, k)]


def choose(plan: Plan, cells: Iterable[Cell], results: Mapping[str, Result]) -> dict[Place, Choice]:
    """What tuning chose, for each place where every point has been tried with every seed.

    A point with a run that diverged (its metric is not finite) is never chosen, unless all did;
    of equal points the first in the plan is.
    """
    if plan.tune is None:
        return {place: Choice({}, [], []) for place in places(plan)}
    found: dict[Place, dict[str, list[float | None]]] = {}
    for cell in cells:
        point = json.dumps(cell.tuned)
        values = found.setdefault(cell.place, {}).setdefault(point, [])
        if cell.key in results:
            values.append(value_of(plan.tune.metric, results[cell.key]["after"]))
    return {
        place: _choice(plan, points)
        for place, points in found.items()
        if all(len(values) == len(plan.tune.seeds) for values in points.values())
    }


def _choice(plan: Plan, points: Mapping[str, list[float | None]]) -> Choice:
    assert plan.tune is not None
    sign = 1 if METRICS[plan.tune.metric].higher_is_better else -1
    means: list[tuple[Settings, float | None]] = []
    for point, values in points.items():
        known = [value for value in values if value is not None]
        means.append((json.loads(point), fmean(known) if len(known) == len(values) else None))
    best, _ = max(means, key=lambda pair: float("-inf") if pair[1] is None else sign * pair[1])
    tried = {key: [point[key] for point, _ in means] for key in best}
    return Choice(best, means, [k for k, v in tried.items() if _is_at_edge(best[k], v)])


def _is_at_edge(value: Any, tried: list) -> bool:
    """Whether a number is the smallest or the largest of several that were tried."""
    are_numbers = all(isinstance(one, (int, float)) for one in tried)
    return are_numbers and len(set(tried)) > 1 and value in (min(tried), max(tried))


def read_result(path: Path) -> Result | None:
    """The object in a file; None if it is damaged."""
    try:
        return read_json(path)
    except CheckpointError:
        return None


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write an object at once or not at all, one line a top-level entry."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in finite(dict(result)).items()]
    write_at_once(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _by_key(folder: Path) -> dict[str, Path]:
    return {path.stem.rpartition("-")[2]: path for path in sorted(folder.glob("*.json"))}


def _is_of(cell: Cell, result: Result) -> bool:
    """Whether `result` is one, and of this cell; a damaged one is run again."""
    try:
        for metric in METRICS:
            value_of(metric, result["after"])
            items_of(metric, result)
        return _agrees(result["recipe"], cell)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _agrees(written: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a result was made with the cell's settings, as far as both know them.

    The key leaves out what is a default; this notices a default that has changed since.
    """
    return _same(deciding(dict(written)), deciding(cell.recipe.to_dict()))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one[key], other[key]) for key in one.keys() & other.keys())
    return one == other
