"""The examples of a recipe's roles: read, cut to their limits, and kept apart."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace

from drlora.data.files import Loaded, load_placed
from drlora.data.formats import PLACES
from drlora.data.slices import base_of
from drlora.data.sources import data_files
from drlora.errors import DataError, counted
from drlora.evaluation.draw import draw
from drlora.runs.data_section import DataSection, Source


def load_training_data(section: DataSection) -> tuple[Loaded, Loaded]:
    """The training and the held-out examples, each cut to its limit.

    Raises:
        DataError: if they are missing, empty or malformed, or roles share examples.
    """
    whole = {role: _load_whole(section, *section.source(role)) for role in ("train", "eval")}
    train = _drawn(whole["train"], section.limits.get("train"), "front")
    refuse_overlap(section, {**whole, "train": train})
    return train, _drawn(whole["eval"], section.limits.get("eval"), "random")


def load_source(
    section: DataSection | None, source: Source, split: str, limit: int | None
) -> Loaded:
    """`limit` examples of a source, read as the section `data` says if there is one.

    Of what the section trains on the first are taken, of anything else a random draw.
    """
    is_trained_on = section is not None and (source, split) == section.source("train")
    how = "front" if is_trained_on else "random"
    return _drawn(_load_whole(section, source, split), limit, how)


def _drawn(loaded: Loaded, limit: int | None, how: str) -> Loaded:
    return replace(loaded, rows=draw(loaded.rows, limit, how))


def _load_whole(section: DataSection | None, source: Source, split: str) -> Loaded:
    if section is None:
        return load_placed(source, split=split)
    return load_placed(
        source, split=split, config=section.config, columns=section.columns, form=section.format
    )


def refuse_overlap(section: DataSection, loaded: Mapping[str, Loaded]) -> None:
    """Refuse roles that share rows of the same data, whatever their splits are called.

    Args:
        section: says where the examples come from.
        loaded: role -> its examples, as `load_placed` gives them. A test split is read where the
            section names one of the same data.

    Held-out and test data may be one and the same; to share a part of it is a slip.

    Raises:
        DataError: naming the first row that two roles have.
    """
    roles = dict(loaded)
    names_test = section.test is not None or "test" in section.splits
    if names_test and any(_origins(section, "test") & _origins(section, role) for role in loaded):
        roles["test"] = _load_whole(section, *section.source("test"))
    for one, other in itertools.combinations(roles, 2):
        is_one = one != "train" and section.source(one) == section.source(other)
        shared = set() if is_one else _rows(roles[one]) & _rows(roles[other])
        if shared:
            name, number = min(shared)
            place = next(name for name in PLACES if name in roles[one].rows.column_names)
            raise DataError(
                f"data.{one} ({section.source(one)[1]!r}) and data.{other} "
                f"({section.source(other)[1]!r}) share {counted(len(shared), 'example')} of "
                f"{name}, the first in {place} {number}, so {other} would not be held out; name "
                f"other data, or give each role its own part: data.splits: "
                f"{{train: 'train[:90%]', eval: 'train[90%:]'}}."
            )


def _origins(section: DataSection, role: str) -> set[str]:
    """The files, or the splits of hub data sets, that a role reads."""
    found: set[str] = set()
    for one, split in section.paths(role):
        files = data_files(one, split)
        names = (
            [f"{one}, split {base_of(split)}"] if files is None else map(os.path.realpath, files)
        )
        found.update(names)
    return found


def _rows(loaded: Loaded) -> set[tuple[str, int]]:
    """Where each example comes from: its file (or hub data set) and its number there."""
    rows = loaded.rows
    place = next(name for name in PLACES if name in rows.column_names)
    if "file" not in rows.column_names:
        name = _real(loaded.name)
        return {(name, number) for number in rows[place]}
    real = {name: _real(name) for name in rows.unique("file")}
    return {(real[n], k) for n, k in zip(rows["file"], rows[place], strict=True)}


def _real(name: str | os.PathLike[str]) -> str:
    """A file's one name, whatever links lead to it; a hub data set's as it is."""
    return os.path.realpath(name) if os.path.exists(name) else str(name)
