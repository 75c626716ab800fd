"""Results as they are kept: two files of all finished cells, and the place of each in the plan.

    cells.jsonl.gz    one line a cell, sorted, all but its items; then one line a place in the plan,
                      with the key of the cell that stands there (in this folder or another)
    items.jsonl.gz    one line a cell: what each held-out example came to

While a plan runs, a finished cell is one file (runs/cells, ignored by git), so that no two
processes write to one; `pack` puts these into the two. A place is known by the plan's own names,
so it is found also when drlora's settings are called otherwise by now, and for results of version
0.1, which do not say what their data were, when the data are not at hand. Results of before are in
a cells.jsonl, which is read too, and compressed when it is packed again.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from drlora.compare.cells import Cell
from drlora.errors import CheckpointError
from drlora.io.files import read_json
from drlora.io.jsonl import finite
from drlora.io.writing import move_into_place

CELLS, ITEMS = "cells.jsonl.gz", "items.jsonl.gz"
_PLAIN = "cells.jsonl"

Result = dict[str, Any]


def place_of(cell: Cell) -> str:
    """Where a cell stands in its plan, as one string."""
    tuned = json.dumps(cell.tuned, sort_keys=True)
    return f"{cell.stage} {cell.model} {cell.task} {cell.method} {cell.seed} {tuned}"


def read_packed(folder: Path) -> Mapping[str, Result]:
    """Key -> result of all cells that are packed in a folder of results.

    Raises:
        CheckpointError: if the two files do not fit each other or are damaged.
    """
    return _packed(folder)[0]


def read_places(folder: Path) -> Mapping[str, str]:
    """Place -> key, of the plan whose results the folder holds."""
    return _packed(folder)[1]


def _packed(folder: Path) -> tuple[dict[str, Result], dict[str, str]]:
    if not any((folder / name).is_file() for name in (CELLS, _PLAIN)):
        return {}, {}
    stamps = tuple((folder / n).stat().st_mtime_ns if (folder / n).is_file() else 0
                   for n in (CELLS, _PLAIN, ITEMS))  # fmt: skip
    return _read(folder, stamps)


def pack(folder: Path, single: Path, places: Mapping[str, str]) -> None:
    """Take the finished cells in the folder `single` into the packed files, and remove them.

    Killed at any moment nothing is lost: a single file goes when its line is on the disk.

    Args:
        folder: holds, or will hold, the packed files.
        single: one JSON file a finished cell.
        places: place -> key of the plan's finished cells, to be kept beside those known already.
    """
    files = sorted(single.glob("*.json"))
    known = dict(read_packed(folder))
    for path in files:
        result = read_json(path)
        known[result["key"]] = result
    together = {**read_places(folder), **places}
    if files or together != read_places(folder):
        lines = sorted(known.values(), key=_order)
        if files:
            _write_items(folder / ITEMS, lines)
        write_packed(folder, lines, together)
    for path in files:
        path.unlink()


def write_packed(folder: Path, lines: list[Result], places: Mapping[str, str]) -> None:
    """Write the cells, without their items, and the places."""
    cells = ({k: v for k, v in line.items() if k != "items"} for line in lines)
    placed = ({"place": place, "key": key} for place, key in sorted(places.items()))
    text = "".join(f"{json.dumps(finite(one))}\n" for one in (*cells, *placed))
    _write_compressed(folder / CELLS, text)
    (folder / _PLAIN).unlink(missing_ok=True)


def _order(result: Result) -> tuple[str, ...]:
    names = ("model", "task", "method", "stage", "seed", "key")
    return tuple(str(result.get(name, "")).rjust(6) for name in names)


def _write_items(path: Path, lines: list[Result]) -> None:
    text = "".join(
        json.dumps({"key": line["key"], "items": line.get("items")}) + "\n" for line in lines
    )
    _write_compressed(path, text)


def _write_compressed(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the time, so that equal contents are equal bytes.
    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    move_into_place(temporary, path)


@lru_cache(maxsize=32)
def _read(folder: Path, stamps: tuple[int, ...]) -> tuple[dict[str, Result], dict[str, str]]:
    """`stamps`, the times of the files, keep what changed since from coming out of the cache."""
    try:
        is_plain = not (folder / CELLS).is_file()
        raw = (folder / (_PLAIN if is_plain else CELLS)).read_bytes()
        lines = (raw if is_plain else gzip.decompress(raw)).decode().splitlines()
        parsed = [json.loads(line) for line in lines]
        places = {one["place"]: one["key"] for one in parsed if "place" in one}
        found = {one["key"]: one for one in parsed if "place" not in one}
        if not found:
            return {}, places
        with gzip.open(folder / ITEMS, "rt", encoding="utf-8") as items:
            for line in items:
                one = json.loads(line)
                if one["key"] in found:
                    found[one["key"]]["items"] = one["items"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the packed results in {folder} are damaged: {error}") from error
    missing = [key for key, one in found.items() if "items" not in one]
    if missing:
        raise CheckpointError(f"{folder / ITEMS} lacks {len(missing)} of the cells in {CELLS}.")
    return found, places
