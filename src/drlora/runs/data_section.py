"""The section `data` of a recipe: where the examples of a run come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drlora.data.formats import FORMS, KNOWN_COLUMNS
from drlora.data.sources import Mix, frozen, is_file_name
from drlora.errors import ConfigError
from drlora.io.files import home
from drlora.io.settings import check_type, refuse_unknown

Source = str | Mix
ROLES = ("train", "eval", "test")
EMBEDDED_SPLITS = {"train": "train", "eval": "dev", "test": "test"}
HUB_SPLITS = {"train": "train", "eval": "validation", "test": "test"}


@dataclass(frozen=True)
class DataSection:
    """Where the examples come from.

    Args:
        train: a hub data set, a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, also packed), a
            pattern of files, a folder, `embedded:TASK`, or a list of these, each maybe with a
            weight: `[{path: a.jsonl, weight: 0.7}, {path: b.csv, weight: 0.3}]`.
        eval: held-out data; by default the split `splits.eval` of `train`.
        test: data for `drlora eval --split test`; by default the split `splits.test` of `train`.
        splits: role (train, eval, test) -> name of a split, which may carry a slice
            (`train[:90%]`).
        config: configuration of a hub data set that has several.
        columns: standard column (prompt, completion, answers, messages, text) -> its name in the
            data.
        format: what the data is read as (text, completion, messages, preference, prompt, sharegpt,
            alpaca, question); by default its columns say.
        max_length: longest example in tokens; by default what the model takes, at most 1024.
        limits: role -> use only so many examples: of train the first, of eval and test a random
            draw.
    """

    train: str | list[Any]
    eval: str | list[Any] | None = None
    test: str | list[Any] | None = None
    splits: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    columns: dict[str, str] | None = None
    format: str | None = None
    max_length: int | None = None
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_unknown(self.splits, ROLES, "data.splits")
        refuse_unknown(self.limits, ROLES, "data.limits")
        refuse_unknown(self.columns or {}, KNOWN_COLUMNS, "data.columns")
        if self.format is not None and self.format not in FORMS:
            raise ConfigError(
                f"data.format={self.format!r} is not known; choose one of {list(FORMS)}."
            )
        for role, limit in self.limits.items():
            if check_type(limit, int, f"data.limits.{role}") < 1:
                raise ConfigError(f"data.limits.{role}={limit} must be at least 1.")
        if self.source("eval") == self.source("train"):
            raise ConfigError(
                f"data.train={self.train!r} is also what would be held out; name other data as "
                f"data.eval, or split it: data.splits: {{train: 'train[:90%]', "
                f"eval: 'train[90%:]'}}."
            )

    def resolved(self) -> DataSection:
        """The same with paths of local files from the root on."""
        return self.moved(absolute)

    def moved(self, find: Callable[[str], str]) -> DataSection:
        """The same with what `find` makes of the name of each source."""
        given: dict[str, Any] = {role: getattr(self, role) for role in ROLES}
        names: dict[str, Any] = {role: _renamed(n, find) for role, n in given.items() if n}
        return replace(self, **names)

    def of(self, role: str) -> str | list[Any]:
        """What is named for a role, or else for training."""
        return getattr(self, role) or self.train

    def paths(self, role: str) -> list[tuple[str, str]]:
        """(file or data set, split) of all that a role reads."""
        source, split = self.source(role)
        names = [source] if isinstance(source, str) else [path for path, _ in source]
        return [(name, split) for name in names]

    def source(self, role: str) -> tuple[Source, str]:
        """(source, split) of a role, as `drlora.data.load_examples` takes them."""
        source = self.of(role)
        split = self.splits.get(role) or default_split(source, role)
        return source if isinstance(source, str) else frozen(source), split


def absolute(name: str) -> str:
    """The name of a source with the path of a local file from the root on."""
    return os.path.abspath(name) if is_file_name(name) else name


def _renamed(source: str | list[Any], find: Callable[[str], str]) -> str | list[Any]:
    if isinstance(source, str):
        return find(home(source))
    return [
        {**item, "path": find(home(item["path"]))} if isinstance(item, dict) else find(home(item))
        for item in source
    ]


def default_split(source: str | Sequence[Any], role: str) -> str:
    """The split of `source` that stands for a role where the recipe names none."""
    if not isinstance(source, str):
        return "train"
    if source.startswith("embedded:"):
        return EMBEDDED_SPLITS[role]
    is_file = is_file_name(source) and not Path(home(source)).is_dir()
    return "train" if is_file else HUB_SPLITS[role]
