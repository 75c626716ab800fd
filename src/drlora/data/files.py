"""Load examples: of files as people have them, of an embedded task, or of a hub data set.

    load_examples("chats/*.jsonl.gz")
    load_examples([{"path": "a.jsonl", "weight": 0.7}, {"path": "b.csv", "weight": 0.3}])

`datasets` does the reading. Where it fails, the file is gone through line by line, to name the one
that is wrong; good files are read once.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets

from drlora.data.checks import check_record, parsed, suspects
from drlora.data.foreign import standard
from drlora.data.formats import (
    KNOWN_COLUMNS,
    OF_THE_DATA,
    PLACES,
    SETTINGS,
    choose_form,
    is_conversation,
    unused_columns,
    where_of,
)
from drlora.data.lines import PACKED, diagnose, line_numbers, list_in, opened, suffix_of
from drlora.data.slices import base_of, rows_of
from drlora.data.sources import READERS, Mix, data_files, frozen
from drlora.errors import DataError, counted
from drlora.io.files import home

MIX_SEED = 20260111
# `datasets` takes the types in the first 10 MB of a JSON file for those of the whole.
_PIECE_BYTES, _ONE_PIECE = 10 * 2**20, 2**31 - 1

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TEXTS = (datasets.Value("string"), datasets.Value("large_string"))


@dataclass(frozen=True)
class Loaded:
    """Examples as they were read.

    Attributes:
        rows: columns by TRL's names, and where each example comes from, counted from 1: a column
            `line`, `item` (of a list) or `row`; of several files `file` has each one's.
        name: the file, or the hub data set and its split; of several files, all names.
        said: what they were read as, `read as ShareGPT conversations: 1,204`.
    """

    rows: datasets.Dataset
    name: str = ""
    said: str = ""


def load_examples(
    source: str | Sequence[Any] | Mix,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    form: str | None = None,
) -> datasets.Dataset:
    """Examples under TRL's column names (see `drlora.data.formats`), all others dropped.

    Args:
        source: `embedded:TASK`; the path of a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, also
            .gz, .bz2, .xz or .zst of these), a pattern of such paths, a folder of them or one that
            `save_to_disk` wrote; a hub data set; or a list of these, each maybe with a weight.
        split: name of the split, which may carry a slice (`train[:100]`). A file is one split,
            called train.
        config: configuration of a hub data set that has several.
        columns: the data's names for standard columns, as `{"prompt": "question"}`.
        form: what the data is read as; by default its columns say.

    Raises:
        DataError: the source, the split or a column does not exist, or a record is malformed.
    """
    found = load_placed(source, split=split, config=config, columns=columns, form=form).rows
    return found.remove_columns([name for name in found.column_names if name in PLACES])


def load_placed(
    source: str | Sequence[Any] | Mix,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    form: str | None = None,
) -> Loaded:
    """As `load_examples`, and where each example comes from."""
    if not isinstance(source, str):
        return _mixed(frozen(source), split, config, columns, form)
    files = data_files(source, split)
    if files is None:
        return _finished(_load_hub(source, split, config), columns, form)
    parts = [_finished(_load_file(path, columns), columns, form) for path in files]
    found = parts[0] if len(parts) == 1 else _joined(parts)
    total = len(found.rows)
    is_named = len(files) == 1 and not Path(home(source)).is_dir()
    name = str(files[0]) if is_named else source
    chosen = [row for _, rows in rows_of(split, {base_of(split): total}) for row in rows]
    if not chosen:
        raise DataError(f"{name} has no examples in {split!r}; it has {total} in all")
    return found if len(chosen) == total else replace(found, rows=found.rows.select(chosen))


def _mixed(
    mix: Mix, split: str, config: str | None, columns: Mapping[str, str] | None, form: str | None
) -> Loaded:
    parts = [
        load_placed(path, split=split, config=config, columns=columns, form=form) for path, _ in mix
    ]
    weights = [weight for _, weight in mix if weight is not None]
    return _joined(parts, [weight / sum(weights) for weight in weights])


def _joined(parts: Sequence[Loaded], shares: Sequence[float] = ()) -> Loaded:
    """The parts one after the other, or drawn by their shares until one of them is used up."""
    placed = [_with_file(part) for part in parts]
    names = ", ".join(dict.fromkeys(part.name for part in parts))
    try:
        if len({choose_form(part.rows.column_names, None, "").name for part in parts}) > 1:
            raise ValueError("they are of several forms")
        placed = _alike(placed)
        if shares:
            found = datasets.interleave_datasets(placed, list(shares), seed=MIX_SEED)
        else:
            found = datasets.concatenate_datasets(placed)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{names} cannot be joined: {error}; give them the same columns, of the same types"
        ) from error
    total = sum(len(part.rows) for part in parts)
    used = f"; {len(found):,} of {total:,} by weight" if shares else ""
    return Loaded(found, names, "; ".join(dict.fromkeys(part.said for part in parts)) + used)


def _alike(parts: Sequence[datasets.Dataset]) -> list[datasets.Dataset]:
    """The parts with one type for texts and one for lists, where theirs differ.

    Of conversations each file has the keys that its own turns have.
    """
    wanted: dict[str, Any] = {}
    for name in set.intersection(*(set(part.column_names) for part in parts)):
        types = [part.features[name] for part in parts]
        if any(one != types[0] for one in types):
            if all(one in _TEXTS for one in types):
                wanted[name] = datasets.Value("string")
            elif all(isinstance(one, datasets.List) for one in types):
                wanted[name] = datasets.List(datasets.Json())
            elif name == "tools":  # of which some are JSON in a text
                parts = [_with_lists(part, name) for part in parts]
                wanted[name] = datasets.List(datasets.Json())
    for name, feature in wanted.items():
        parts = [part.cast_column(name, feature) for part in parts]
    return list(parts)


def _with_lists(part: datasets.Dataset, name: str) -> datasets.Dataset:
    """Texts of JSON in a column as the lists that they are."""
    if part.features[name] not in _TEXTS:
        return part
    features = datasets.Features({**part.features, name: datasets.List(datasets.Json())})

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: parsed(row[name], f"{where_of(row)}: {name}") if row[name] else None}

    return part.map(read, features=features)


def _with_file(part: Loaded) -> datasets.Dataset:
    rows = part.rows
    place = next(name for name in PLACES if name in rows.column_names)
    rows = rows.rename_column(place, "row") if place != "row" else rows
    if "file" in rows.column_names:
        return rows
    return rows.add_column("file", [part.name] * len(rows))


def _load_file(path: Path, columns: Mapping[str, str] | None) -> tuple[datasets.Dataset, str]:
    """The examples of a file with their place, and its name."""
    if path.is_dir():
        hint = "was it written by save_to_disk, and is the split in it?"
        found = _read(lambda: datasets.load_from_disk(str(path)), str(path), hint)
        return _placed(found, "row", range(1, len(found) + 1)), str(path)
    reader = READERS[suffix_of(path)]
    hint = f"is it empty, or not really a {suffix_of(path)} file?"
    known, key = {*KNOWN_COLUMNS, *(columns or {}).values()}, None
    try:
        if reader == "json":
            key = _tried(lambda: list_in(path, known), str(path), hint)
        found = _read(lambda: _whole(path, reader, key), str(path), hint)
        is_lines = reader == "json" and key is None
        numbers = line_numbers(path, len(found)) if is_lines else range(1, len(found) + 1)
    except DataError:
        if reader == "json":
            _tried(lambda: diagnose(path, is_list=key == ""), str(path), hint)
        raise
    place = "line" if is_lines or reader == "text" else "item" if reader == "json" else "row"
    found = _placed(found, place, numbers)
    return _without_blanks(found, str(path)) if reader == "text" else found, str(path)


def _whole(path: Path, reader: str, key: str | None) -> datasets.Dataset:
    options: dict[str, Any] = {"field": key} if key else {}
    if reader == "csv":
        options["sep"] = "\t" if suffix_of(path) == ".tsv" else ","
        with opened(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            names = next(csv.reader(text, delimiter=options["sep"]))
        names = [name or f"Unnamed: {n}" for n, name in enumerate(names)]  # as pandas reads it
        options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
        options["keep_default_na"] = False
    if reader in ("csv", "text"):
        options["encoding"] = "utf-8-sig"

    def load(**more: Any) -> datasets.Dataset:
        given = {**options, **more}
        return datasets.load_dataset(reader, data_files=str(path), split="train", **given)

    try:
        found = load()
    except Exception:
        is_small = path.stat().st_size <= _PIECE_BYTES and path.suffix not in PACKED
        if reader == "json" and key:
            return _of_records(path, key)
        if reader != "json" or key is not None or is_small:
            raise
        found = load(chunksize=_ONE_PIECE)
    found.data.table.validate(full=True)  # what says it is text may be none
    return found


def _of_records(path: Path, key: str) -> datasets.Dataset:
    """The list under a key, where its items have values of several types."""
    with opened(path) as file:
        records = json.loads(file.read().decode("utf-8-sig"))[key]
    names = dict.fromkeys(name for record in records for name in record)
    rows = [{name: record.get(name) for name in names} for record in records]
    types = {name: _type_of([row[name] for row in rows]) for name in names}
    return datasets.Dataset.from_list(rows, features=datasets.Features(types))


def _type_of(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if all(isinstance(value, str) for value in known):
        return datasets.Value("string")
    if all(isinstance(value, list) for value in known):
        return datasets.List(datasets.Json())
    return datasets.Json()


def _without_blanks(lines: datasets.Dataset, name: str) -> datasets.Dataset:
    kept = [row for row, text in enumerate(lines["text"][:]) if text.strip()]
    blank = len(lines) - len(kept)
    if not kept:
        raise DataError(f"{name} is empty")
    if blank:
        logger.warning("%s: %s skipped", name, counted(blank, "blank line"))
    return lines.select(kept) if blank else lines


def _placed(found: datasets.Dataset, place: str, numbers: Sequence[int]) -> datasets.Dataset:
    own = {name: OF_THE_DATA.format(name) for name in found.column_names if name in PLACES}
    return found.rename_columns(own).add_column(place, list(numbers))


def _load_hub(source: str, split: str, config: str | None) -> tuple[datasets.Dataset, str]:
    found = _read(
        lambda: datasets.load_dataset(source, config, split=split),
        f"data set {source!r} (split {split!r})",
        "check the name, the split and the config, or whether the hub can be reached; for a local "
        f"file give a path that ends in {', '.join(READERS)}",
    )
    return _placed(found, "row", _hub_rows(found, split)), f"{source}, split {base_of(split)}"


def _hub_rows(found: datasets.Dataset, split: str) -> Sequence[int]:
    """Rows of the whole split, counted from 1; where its size is not told, those of the slice."""
    sizes = {name: info.num_examples for name, info in (found.info.splits or {}).items()}
    if base_of(split) in sizes:
        rows = [row + 1 for _, some in rows_of(split, sizes) for row in some]
        if len(rows) == len(found):
            return rows
    return range(1, len(found) + 1)


def _read(load: Callable[[], datasets.Dataset], where: str, hint: str) -> datasets.Dataset:
    found = _tried(load, where, hint)
    if len(found) == 0:
        raise DataError(f"{where} has no examples")
    return found


def _tried(load: Callable[[], T], where: str, hint: str) -> T:
    try:
        return load()
    except DataError:
        raise
    except Exception as error:  # each kind of file has a reader with errors of its own
        raise DataError(f"cannot load {where}: {error}; {hint}") from error


def _finished(
    loaded: tuple[datasets.Dataset, str], columns: Mapping[str, str] | None, name: str | None
) -> Loaded:
    """What was loaded in the form that it has, its records checked."""
    found, where = loaded
    columns = {
        key: OF_THE_DATA.format(c) if c in PLACES else c for key, c in (columns or {}).items()
    }
    form = choose_form([c for c in found.column_names if c not in PLACES], columns, where, name)
    if not is_conversation({name: found[0][column] for name, column in form.columns.items()}):
        form = replace(form, columns={n: c for n, c in form.columns.items() if n not in SETTINGS})
    left = unused_columns(found.column_names, form, where)
    if left:
        logger.warning("%s: columns not used: %s", where, ", ".join(left))
    place = next(name for name in PLACES if name in found.column_names)
    for row in suspects(found, form):
        record = found[row]
        check_record(record, form, f"{where}, {place} {record[place]}")
    done = standard(found, form)
    return Loaded(done, where, form.said(len(done)))
