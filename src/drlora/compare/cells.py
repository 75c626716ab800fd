"""One cell of a plan: one recipe, and a key of everything that decides its result.

The key is made of what the recipe sets otherwise than by default, and of the contents of its
model and data where these are local. So a changed setting, weight or example makes a new cell; an
unchanged one has its old key, also if its method was renamed or drlora got new settings. It does
not see a change in drlora's code: results carry the versions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from drlora.compare.plan import SPLIT_ROLES, Plan, Settings, merged
from drlora.config.methods import method_settings
from drlora.data.sources import data_files
from drlora.embedded import resolve_model
from drlora.errors import ConfigError, DataError
from drlora.io.files import local_path
from drlora.runs.recipe import Recipe, recipe_from, settings_of

KEY_LENGTH = 12
HASHED_WHOLE = 64 << 20
ENDS = 1 << 20
# Fields of TrainingArguments that leave the weights as they are.
NOT_DECIDING = ("save_", "logging_", "report_to", "per_device_eval_batch_size")
# Of a file, or of the files in a folder; what is not local is a name.
_HASHES = re.compile(r"[0-9a-f]{64}|\S+=[0-9a-f]{64}( \S+=[0-9a-f]{64})*")
# What a recipe names beside the model and the data.
_FILES = ("chat_template", "start_from", "start_from_ranks", "start_ranks")
TUNE, COMPARE = "tune", "compare"


@dataclass(frozen=True)
class Cell:
    """One run of a plan.

    Attributes:
        stage: `tune` or `compare`.
        model, task, method, seed: where it is in the matrix.
        tuned: the settings of the grid that it has, dotted.
        recipe: the run; its output_dir is of no meaning.
        key: of all that decides the result.
    """

    stage: str
    model: str
    task: str
    method: str
    seed: int
    tuned: Settings
    recipe: Recipe
    key: str

    @property
    def name(self) -> str:
        """For people and files; only the key in it counts."""
        return f"{self.model}.{self.task}.{self.method}.s{self.seed}-{self.key}"

    @property
    def place(self) -> tuple[str, str, str]:
        """(model, task, method)."""
        return self.model, self.task, self.method


def make_cell(
    plan: Plan, stage: str, model: str, task: str, method: str, seed: int, tuned: Settings
) -> Cell:
    """The cell at a place of the plan.

    Raises:
        ConfigError: what is wrong with the recipe that the plan makes there; a setting beside
            `method:` that the method fixes at another value.
    """
    tree = merged(
        {"output_dir": "-"},
        plan.base,
        plan.models[model],
        plan.tasks[task],
        plan.methods[method],
        tuned,
        {"training.seed": seed},
        plan.tune.settings if stage == TUNE and plan.tune else {},
    )
    split = plan.tune.split if stage == TUNE and plan.tune else plan.split
    recipe = _measured_on(recipe_from(tree), SPLIT_ROLES[split])
    _refuse_unused(method, merged(plan.methods[method]).get("adapter", {}), recipe)
    return Cell(stage, model, task, method, seed, tuned, recipe, key_of(recipe))


def tune_cells(plan: Plan, points: Mapping[tuple[str, str, str], Sequence[Settings]]) -> list[Cell]:
    """Every run of the grid, of which each place has its own `points`."""
    if plan.tune is None:
        return []
    return [
        make_cell(plan, TUNE, *place, seed, point)
        for seed in plan.tune.seeds
        for place in places(plan)
        for point in points[place]
    ]


def compare_cells(plan: Plan, chosen: Mapping[tuple[str, str, str], Settings]) -> list[Cell]:
    """The compared runs of the places whose tuned settings are known, one seed after the other."""
    seeds = dict.fromkeys(seed for task in plan.tasks for seed in plan.seeds_of(task))
    return [
        make_cell(plan, COMPARE, *place, seed, chosen[place])
        for seed in seeds
        for place in places(plan)
        if place in chosen and seed in plan.seeds_of(place[1])
    ]


def places(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(model, task, method) of the whole matrix."""
    for model in plan.models:
        for task in plan.tasks:
            for method in plan.methods:
                yield model, task, method


def _refuse_unused(name: str, given: Settings, recipe: Recipe) -> None:
    """Refuse an adapter setting of a method's own entry that its `method` fixes at another value.

    In `base` the method wins, for one base serves all methods; in the entry itself it would be
    another run than the entry says.
    """
    fixed = method_settings(recipe.method, settings_of(recipe.adapter)) if recipe.method else {}
    wanted, set_to = _flat(given), _flat(fixed)
    for key in wanted.keys() & set_to.keys():
        if wanted[key] != set_to[key]:
            raise ConfigError(
                f"methods.{name}: adapter.{key}={wanted[key]!r} is not used, for method="
                f"{recipe.method!r} sets it to {set_to[key]!r}. Leave adapter.{key} out, or leave "
                "method out and give its settings (docs/methods.md) with your own."
            )


def _flat(settings: Settings) -> Settings:
    """Settings and, with dotted names, options."""
    options = settings.get("options") or {}
    plain = {key: value for key, value in settings.items() if key != "options"}
    return plain | {f"options.{key}": value for key, value in options.items()}


def _measured_on(recipe: Recipe, role: str) -> Recipe:
    """The recipe with the split of `role` as what is held out."""
    source, split = recipe.data.source(role)
    if (source, split) == recipe.data.source("train"):
        raise ConfigError(
            f"data.train={source!r} has no split of its own for {role}; name other data as "
            f"data.{role}, or a split as data.splits.{role}."
        )
    splits = {k: v for k, v in recipe.data.splits.items() if k != "test"} | {"eval": split}
    limits = {k: v for k, v in recipe.data.limits.items() if k == "train"}
    if role in recipe.data.limits:
        limits["eval"] = recipe.data.limits[role]
    data = replace(recipe.data, eval=recipe.data.of(role), test=None, splits=splits, limits=limits)
    return replace(recipe, data=data)


def key_of(recipe: Recipe) -> str:
    """A short hash of all that decides the result of a run."""
    contents = contents_of(recipe)
    contents.pop("forgetting", None)  # it is measured and decides nothing
    parts = {"settings": _unusual(recipe), **contents}
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def contents_of(recipe: Recipe) -> dict[str, Any]:
    """What a run is made of by its contents, where these are local.

    `model`, `tokenizer` and `data`, and what else the recipe names: a chat template, an adapter or
    ranks to start from, data for `forgetting`.
    """
    sources = {pair for role in ("train", "eval") for pair in recipe.data.paths(role)}
    others = {name: getattr(recipe, name) for name in _FILES if getattr(recipe, name)}
    found = {
        "model": _contents(resolve_model(recipe.model)),
        "tokenizer": _contents(resolve_model(recipe.tokenizer or "-")),
        "data": sorted(_data_contents(*source) for source in sources),
        **{name: _contents(source) for name, source in others.items()},
    }
    if recipe.evaluation.forgetting:
        found["forgetting"] = _data_contents(recipe.evaluation.forgetting, "train")
    return found


def is_made_of_other(recipe: Recipe, recorded: Mapping[str, Any]) -> bool:
    """Whether a result was made of other contents than those at hand.

    What is not at hand cannot differ: such as the data of a task that its licence keeps out of a
    repository, whose results are in it.

    Args:
        recipe: of the cell.
        recorded: `contents_of` the recipe that the result was made with; an earlier version had
            fewer parts.
    """
    for part, now in contents_of(recipe).items():
        if part not in recorded:
            continue
        there = recorded[part]
        here, made_of = ([one] if isinstance(one, str) else list(one or ()) for one in (now, there))
        if len(here) != len(made_of):
            return True
        if any(_HASHES.fullmatch(one) and one not in made_of for one in here):
            return True
    return False


def deciding(recipe: dict[str, Any]) -> dict[str, Any]:
    """Of a recipe's plain values those that decide its result, local paths left out.

    Folders and files are known by their contents, so that a checkout may lie anywhere.
    """
    found = {key: value for key, value in recipe.items() if key != "output_dir"}
    found["training"] = {
        k: v for k, v in recipe["training"].items() if not k.startswith(NOT_DECIDING)
    }
    found["data"] = dict(recipe["data"])
    for section, keys in ((found, ("model", "tokenizer")), (found["data"], ("train", "eval"))):
        for key in keys:
            if isinstance(section[key], str) and local_path(section[key]):
                del section[key]
            elif isinstance(section[key], list):  # of data
                section[key] = [_nameless(item) for item in section[key]]
    return found


def _nameless(item: Any) -> Any:
    path = item["path"] if isinstance(item, dict) else item
    name = "" if local_path(path) else path
    return {**item, "path": name} if isinstance(item, dict) else name


def _unusual(recipe: Recipe) -> dict[str, Any]:
    """The deciding settings that are not what a recipe has without saying so."""
    return _difference(deciding(recipe.to_dict()), deciding(_usual()))


@cache
def _usual() -> dict[str, Any]:
    return recipe_from({"model": "-", "output_dir": "-", "data": {"train": "-"}}).to_dict()


def _difference(own: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in own.items():
        other = usual.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            value = _difference(value, other)
            if value:
                found[key] = value
        elif key not in usual or value != other:
            found[key] = value
    return found


def _data_contents(source: str, split: str) -> str:
    """A hash of each file that a source of examples stands for; of a hub data set its name."""
    try:
        files = data_files(source, split)
    except DataError:  # not here, such as what a licence keeps out of a repository
        return source
    if files is None:
        return source
    if len(files) == 1 and files[0].is_file():
        return _digest(files[0], files[0].stat().st_mtime_ns)
    # A folder that `save_to_disk` wrote is one of them.
    parts = sorted(
        part for file in files for part in (file.rglob("*") if file.is_dir() else [file])
    )
    return " ".join(
        f"{part.name.replace(' ', '_')}={_digest(part, part.stat().st_mtime_ns)}"
        for part in parts
        if part.is_file()
    )


def _contents(source: str) -> str:
    """A hash of a local file or of the files in a local folder; of anything else, its name."""
    path = local_path(source)
    if path is None:
        return source
    if path.is_file():
        return _digest(path, path.stat().st_mtime_ns)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".model"))
        return " ".join(f"{file.name}={_digest(file, file.stat().st_mtime_ns)}" for file in files)
    return source


@cache
def _digest(path: Path, changed_ns: int) -> str:
    """SHA-256 of a file; of a large one, of its size, its first and its last MiB.

    `changed_ns` only keeps the hash of a file that changed from being taken from the cache.
    """
    size = path.stat().st_size
    if size <= HASHED_WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size}".encode() + file.read(ENDS))
        file.seek(size - ENDS)
        digest.update(file.read())
    return digest.hexdigest()
