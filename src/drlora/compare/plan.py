"""A plan: which models, tasks, methods and seeds are compared, in one YAML file.

    plan = load_plan("experiments/quick.yaml", ["seeds=[1,2]"])

An entry of models, tasks and methods is a name and the settings of a recipe that it stands for
(`kinds: {data.train: embedded:kinds}`), or just a name: of a model, of data, of a method. What is
not known is refused, with the nearest known name.
"""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from drlora.compare.metrics import METRICS
from drlora.errors import ConfigError
from drlora.io.settings import check_type, read_settings, refuse_unknown, set_in
from drlora.runs.recipe import Recipe

Settings = dict[str, Any]
SPLIT_ROLES = {"dev": "eval", "test": "test"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]*")
# What a plain string stands for in each list.
_SHORT = {"models": "model", "tasks": "data.train", "methods": "method"}


@dataclass(frozen=True)
class Tune:
    """A grid that is tried on a split of its own before anything is compared.

    For each model, task and method the point with the best mean over `seeds` is used.

    Args:
        grid: dotted setting of a recipe -> values to try; every combination is.
        seeds: training seeds, other than the compared ones.
        split: what the points are measured on, `dev` or `test`.
        metric: what decides.
        settings: of a recipe, nested or dotted, that these runs have otherwise than the compared.
        extend: how many values may be added to a list of numbers, one at a time and in its ratio,
            while the best lies at its end; for each model, task and method by itself.
    """

    grid: dict[str, list]
    seeds: list[int]
    split: str = "dev"
    metric: str = "loss"
    settings: dict = field(default_factory=dict)
    extend: int = 0

    def __post_init__(self) -> None:
        _check_split(self.split, "tune.split")
        if self.extend < 0:
            raise ConfigError(f"tune.extend={self.extend} must be 0 or more.")
        refuse_unknown([self.metric], METRICS, "tune.metric")
        _check_seeds(self.seeds, "tune.seeds")
        if not self.grid or not all(isinstance(v, list) and v for v in self.grid.values()):
            raise ConfigError(
                f"tune.grid={self.grid!r} must name settings and a list of values for each, as "
                f"{{training.learning_rate: [1e-3, 2e-3]}}."
            )

    def points(self) -> list[Settings]:
        """Every combination: dotted setting -> value."""
        values = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, point, strict=True)) for point in values]

    def beyond(self, tried: Sequence[Settings], best: Settings, key: str) -> list[Settings]:
        """The next point past the end of `key`'s list that `best` lies at, or none.

        Args:
            tried: all points so far.
            best: the best of them, with the smallest or the largest value of `key`.
            key: a dotted setting of the grid.
        """
        values = sorted({point[key] for point in tried})
        if len(values) - len(set(self.grid[key])) >= self.extend or values[0] <= 0:
            return []
        end, inner = values[:2] if best[key] == values[0] else values[:-3:-1]
        following = float(f"{end * end / inner:.6g}")
        if isinstance(end, int):
            if not following.is_integer():
                return []
            following = int(following)
        return [{**best, key: following}]


@dataclass(frozen=True)
class Plan:
    """A matrix of runs.

    Args:
        name: for people; by default the name of the plan's file.
        output_dir: the folder of results.
        models, tasks, methods: name -> dotted settings on top of `base`.
        seeds: training seeds; runs with one seed see the same batches in the same order.
        base: settings of a recipe that all runs share.
        baselines: methods that the others are compared with.
        metrics: what is shown, the first one in the figures.
        split: what the compared runs are measured on: `test` or `dev`.
        development: tasks on which methods and settings were chosen.
        confirmation: tasks that were looked at once; with `development`, all tasks.
        confirmation_seeds: seeds of the confirmation tasks, where they are not `seeds`.
        tune: see Tune.
        also: folders of other comparisons, whose finished cells count where they are the same runs.
    """

    name: str
    output_dir: str
    models: dict[str, Settings]
    tasks: dict[str, Settings]
    methods: dict[str, Settings]
    seeds: list[int]
    base: dict = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=lambda: ["loss"])
    split: str = "test"
    development: list[str] = field(default_factory=list)
    confirmation: list[str] = field(default_factory=list)
    confirmation_seeds: list[int] | None = None
    tune: Tune | None = None
    also: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in self.also:
            if not Path(folder).is_dir():
                raise ConfigError(f"also={self.also}: there is no folder {folder}; leave it out.")
        _check_seeds(self.seeds, "seeds")
        if self.confirmation_seeds is not None:
            _check_seeds(self.confirmation_seeds, "confirmation_seeds")
        _check_split(self.split, "split")
        refuse_unknown(self.baselines, self.methods, "baselines")
        refuse_unknown(self.metrics, METRICS, "metrics")
        if not self.metrics:
            raise ConfigError(f"metrics=[] shows nothing; choose from {sorted(METRICS)}.")
        self._check_groups()
        self._check_tuning()

    def _check_groups(self) -> None:
        for key in ("development", "confirmation"):
            refuse_unknown(getattr(self, key), self.tasks, key)
        listed = [*self.development, *self.confirmation]
        if listed and sorted(listed) != sorted(self.tasks):
            raise ConfigError(
                f"development={self.development} and confirmation={self.confirmation} must "
                f"together name each task once; tasks are {sorted(self.tasks)}."
            )

    def _check_tuning(self) -> None:
        if self.tune is None:
            return
        shared = {*self.seeds, *(self.confirmation_seeds or [])} & set(self.tune.seeds)
        if shared:
            raise ConfigError(
                f"tune.seeds={self.tune.seeds} share {sorted(shared)} with the compared seeds; "
                f"give tuning seeds of its own."
            )
        if self.tune.split == self.split:
            raise ConfigError(
                f"tune.split={self.tune.split!r} is also what is compared on; tune on another one."
            )

    def groups(self) -> dict[str, list[str]]:
        """Title -> tasks: development and confirmation, or all of them."""
        groups = {"Development tasks": self.development, "Confirmation tasks": self.confirmation}
        return {title: tasks for title, tasks in groups.items() if tasks} or {
            "Tasks": list(self.tasks)
        }

    def seeds_of(self, task: str) -> list[int]:
        """The compared seeds of a task."""
        is_confirmation = task in self.confirmation and self.confirmation_seeds is not None
        return (self.confirmation_seeds or []) if is_confirmation else self.seeds

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every default filled in; `plan_from` reads them back."""
        return asdict(self)


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan in the YAML file `path`, with `key=value` overrides (dotted keys) on top.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    return plan_from({"name": Path(path).stem, **read_settings(path, overrides)})


def plan_from(tree: dict[str, Any]) -> Plan:
    """A plan from nested plain values, as YAML gives them.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """
    refuse_unknown(tree, [f.name for f in fields(Plan)], "")
    for key in ("output_dir", "models", "tasks", "methods", "seeds"):
        if not tree.get(key):
            raise ConfigError(f"{key} is missing in the plan; add it.")
    given = {key: value for key, value in tree.items() if value is not None}
    for key in _SHORT:
        given[key] = dict(_entries(given[key], key))
    if "tune" in given:
        tune = check_type(given["tune"], dict, "tune")
        refuse_unknown(tune, [f.name for f in fields(Tune)], "tune")
        for key in ("grid", "seeds"):
            if not tune.get(key):
                raise ConfigError(f"tune.{key} is missing in the plan; add it.")
        given["tune"] = Tune(**_typed(tune, Tune, "tune."))
    return Plan(**_typed(given, Plan, ""))


def merged(base: Settings, *layers: Settings) -> dict[str, Any]:
    """`base` with layers of settings on top, as nested values; keys may be dotted or nested."""
    tree: dict[str, Any] = {}
    for layer in (base, *layers):
        for path, value in _leaves(layer):
            set_in(tree, path, deepcopy(value))
    return tree


def _leaves(settings: Settings, at: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for key, value in settings.items():
        path = (*at, *str(key).split("."))
        if isinstance(value, dict):
            yield from _leaves(value, path)
        else:
            yield list(path), value


def _entries(value: Any, key: str) -> Iterator[tuple[str, Settings]]:
    """(name, settings) of each entry of models, tasks or methods."""
    if not isinstance(value, (list, dict)):
        raise ConfigError(f"{key}={value!r} must be a list of names or `name: settings` lines.")
    pairs = value.items() if isinstance(value, dict) else [(None, item) for item in value]
    seen = set()
    for name, settings in pairs:
        if isinstance(settings, str):
            name = name or re.split(r"[/:]", settings.rstrip("/"))[-1]
            settings = {_SHORT[key]: settings}
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in seen:
            raise ConfigError(
                f"{key}: {name!r} is no name, or stands there twice; use letters, digits and "
                f"._@+- (`name: settings`)."
            )
        if settings is not None and not isinstance(settings, dict):
            raise ConfigError(f"{key}.{name}={settings!r} must be settings of a recipe.")
        top = {str(k).partition(".")[0] for k in settings or {}}
        refuse_unknown(top, [f.name for f in fields(Recipe)], f"{key}.{name}")
        seen.add(name)
        yield name, dict(settings or {})


def _typed(given: dict[str, Any], kind: Any, prefix: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {key: check_type(value, hints[key], prefix + key) for key, value in given.items()}


def _check_seeds(seeds: list[int], name: str) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{name}={seeds} must name at least one seed, and none twice.")


def _check_split(split: str, name: str) -> None:
    if split not in SPLIT_ROLES:
        raise ConfigError(f"{name}={split!r} is not known; choose one of {list(SPLIT_ROLES)}.")
