"""The examples of a recipe's roles: read, cut to their limits, and kept apart."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping

from datasets import Dataset

from drlora.data.draw import draw
from drlora.data.layout import PLACES
from drlora.data.load import data_file, load_placed
from drlora.data.section import DataSection
from drlora.data.slices import base_of
from drlora.errors import DataError, counted


def load_training_data(section: DataSection) -> tuple[Dataset, Dataset]:
    """The training and the held-out examples, each cut to its limit.

    Raises:
        DataError: if they are missing, empty or malformed, or roles share examples.
    """
    whole = {role: _load_whole(section, *section.source(role)) for role in ("train", "eval")}
    train = draw(whole["train"], section.limits.get("train"), "front")
    refuse_overlap(section, {**whole, "train": train})
    return train, draw(whole["eval"], section.limits.get("eval"))


def load_source(section: DataSection | None, source: str, split: str, limit: int | None) -> Dataset:
    """`limit` examples of a source, read as the section `data` says if there is one.

    Of what the section trains on the first are taken, of anything else a random draw. Where an
    example comes from is told by one more column (`drlora.data.load_placed`).
    """
    is_trained_on = section is not None and (source, split) == section.source("train")
    how = "front" if is_trained_on else "random"
    return draw(_load_whole(section, source, split), limit, how)


def _load_whole(section: DataSection | None, source: str, split: str) -> Dataset:
    config, columns = (section.config, section.columns) if section else (None, None)
    return load_placed(source, split=split, config=config, columns=columns)


def refuse_overlap(section: DataSection, loaded: Mapping[str, Dataset]) -> None:
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
    if names_test and any(_same_data(section, "test", role) for role in loaded):
        roles["test"] = _load_whole(section, *section.source("test"))
    for one, other in itertools.combinations(roles, 2):
        is_one = one != "train" and section.source(one) == section.source(other)
        if _same_data(section, one, other) and not is_one:
            _refuse_shared(section, one, other, roles)


def _same_data(section: DataSection, one: str, other: str) -> bool:
    """Whether two roles read the same file, or the same split of a hub data set."""
    (source, split), (another, other_split) = section.source(one), section.source(other)
    files = data_file(source, split), data_file(another, other_split)
    if None in files:
        return source == another and base_of(split) == base_of(other_split)
    return os.path.realpath(str(files[0])) == os.path.realpath(str(files[1]))


def _refuse_shared(
    section: DataSection, one: str, other: str, roles: Mapping[str, Dataset]
) -> None:
    place = next(name for name in PLACES if name in roles[one].column_names)
    shared = set(roles[one][place]) & set(roles[other][place])
    if shared:
        raise DataError(
            f"data.{one} ({section.source(one)[1]!r}) and data.{other} "
            f"({section.source(other)[1]!r}) share {counted(len(shared), 'example')} of "
            f"{roles[one].info.description}, the first in {place} {min(shared)}, so {other} would "
            f"not be held out; name other data, or give each role its own part: data.splits: "
            f"{{train: 'train[:90%]', eval: 'train[90%:]'}}."
        )
