"""What a source of examples stands for: files of known kinds, an embedded task, a hub data set."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError

from drlora.data.lines import PACKED, suffix_of
from drlora.data.slices import base_of
from drlora.errors import DataError
from drlora.io.files import home, local_path

EMBEDDED_PREFIX = "embedded:"
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "embedded" / "tasks"
READERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
OTHER_SUFFIXES = (".arrow", ".zip", ".xlsx", ".xls", ".tar", ".pkl")

Mix = tuple[tuple[str, float | None], ...]
"""Sources and their weights, all or none of which are given."""


def frozen(source: Sequence[Any]) -> Mix:
    """A list of sources as pairs of path and weight.

    Raises:
        DataError: an item is none, or some have a weight and some do not.
    """
    pairs: list[tuple[str, float | None]] = []
    for item in source:
        if isinstance(item, str):
            pairs.append((item, None))
        elif isinstance(item, Mapping) and "path" in item and item.keys() <= {"path", "weight"}:
            pairs.append((_text(item["path"]), item.get("weight")))
        elif isinstance(item, tuple) and len(item) == 2:
            pairs.append(item)
        else:
            raise DataError(
                f"{item!r} in a list of data is no path and no {{path: .., weight: ..}}"
            )
    weights = [weight for _, weight in pairs if weight is not None]
    is_each = not weights or len(weights) == len(pairs)
    if not pairs or not is_each or not all(map(_is_weight, weights)):
        raise DataError(f"{list(source)!r}: give a weight above 0 to every source, or to none")
    return tuple(pairs)


def _text(path: Any) -> str:
    if not isinstance(path, str):
        raise DataError(f"path: {path!r} in a list of data must be a text")
    return path


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def data_files(source: str, split: str) -> list[Path] | None:
    """The files that a source stands for, in order; None for a hub data set.

    Raises:
        DataError: there are none, or they are of no kind that is read.
    """
    if source.startswith(EMBEDDED_PREFIX):
        return [_embedded_file(source, split)]
    if not is_file_name(source):
        return None
    path, base = Path(home(source)), base_of(split)
    if path.is_dir():
        return _files_of_folder(path, base)
    if base != "train":
        raise DataError(
            f"split {split!r} of {source}: a file has no splits; name the file of that split"
        )
    found = [path]
    if glob.has_magic(str(path)) and not path.exists():
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise DataError(f"{source}: no file has such a name")
    for one in found:
        if suffix_of(one) not in READERS:
            raise DataError(f"{one}: cannot read {one.suffix!r} files; use {', '.join(READERS)}")
        if not one.is_file():
            raise DataError(f"{one}: no such file")
    return found


def is_file_name(source: str) -> bool:
    """Whether a source is a file or folder, there or not, and no hub data set or embedded task."""
    return (
        local_path(source) is not None
        or suffix_of(Path(source)) in (*READERS, *OTHER_SUFFIXES, *PACKED)
        or source.startswith(("/", "./", "../", "~"))
        or (glob.has_magic(source) and not source.startswith(EMBEDDED_PREFIX))
    )


def _embedded_file(source: str, split: str) -> Path:
    task = source.removeprefix(EMBEDDED_PREFIX)
    tasks = sorted(path.parent.name for path in EMBEDDED_FOLDER.glob("*/train.jsonl"))
    if task not in tasks:
        raise DataError(f"no embedded task {task!r}; there are {', '.join(tasks)}")
    splits = sorted(path.stem for path in (EMBEDDED_FOLDER / task).glob("*.jsonl"))
    if base_of(split) not in splits:
        raise DataError(f"{source} has no split {split!r}; there are {', '.join(splits)}")
    return EMBEDDED_FOLDER / task / f"{base_of(split)}.jsonl"


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """Of a folder that `save_to_disk` wrote, that of the split; else its files, told as a hub's."""
    if (folder / "dataset_dict.json").is_file():
        return [folder / split]
    if (folder / "state.json").is_file():
        return [folder]
    try:
        by_split = DataFilesDict.from_patterns(get_data_patterns(str(folder)), str(folder))
    except (DatasetsError, OSError) as error:
        raise DataError(f"{folder} is a folder without data files: {error}") from error
    paths = {str(name): [Path(p) for p in found] for name, found in by_split.items()}
    known = {name: [p for p in found if suffix_of(p) in READERS] for name, found in paths.items()}
    known = {name: sorted(found) for name, found in known.items() if found}
    if split not in known:
        raise DataError(
            f"{folder} is a folder with no {split!r} among its files; there are "
            f"{', '.join(known) or 'no ' + ', '.join(READERS) + ' files'}"
        )
    return known[split]
