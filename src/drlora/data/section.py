"""The section `data` of a recipe: where the examples of a run come from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from drlora.data.layout import KNOWN_COLUMNS
from drlora.data.load import is_file_name
from drlora.errors import ConfigError
from drlora.io.files import home
from drlora.io.settings import check_type, refuse_unknown

ROLES = ("train", "eval", "test")
EMBEDDED_SPLITS = {"train": "train", "eval": "dev", "test": "test"}
HUB_SPLITS = {"train": "train", "eval": "validation", "test": "test"}


@dataclass(frozen=True)
class DataSection:
    """Where the examples come from.

    Args:
        train: a hub data set, a .json, .jsonl or .parquet file, or `embedded:TASK`.
        eval: held-out data; by default the split `splits.eval` of `train`.
        test: data for `drlora eval --split test`; by default the split `splits.test` of `train`.
        splits: role (train, eval, test) -> name of a split, which may carry a slice
            (`train[:90%]`).
        config: configuration of a hub data set that has several.
        columns: standard column (prompt, completion, answers, messages, text) -> its name in the
            data.
        max_length: longest example in tokens; by default what the model takes, at most 1024.
        limits: role -> use only so many examples: of train the first, of eval and test a random
            draw.
    """

    train: str
    eval: str | None = None
    test: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    columns: dict[str, str] | None = None
    max_length: int | None = None
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_unknown(self.splits, ROLES, "data.splits")
        refuse_unknown(self.limits, ROLES, "data.limits")
        refuse_unknown(self.columns or {}, KNOWN_COLUMNS, "data.columns")
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
        paths: dict[str, Any] = {role: home(n) for role in ROLES if (n := getattr(self, role))}
        return replace(
            self, **{r: os.path.abspath(n) if is_file_name(n) else n for r, n in paths.items()}
        )

    def source(self, role: str) -> tuple[str, str]:
        """(source, split) of a role, as `drlora.data.load_examples` takes them."""
        source = getattr(self, role) or self.train
        return source, self.splits.get(role) or default_split(source, role)


def default_split(source: str, role: str) -> str:
    """The split of `source` that stands for a role where the recipe names none."""
    if source.startswith("embedded:"):
        return EMBEDDED_SPLITS[role]
    return "train" if is_file_name(source) else HUB_SPLITS[role]
