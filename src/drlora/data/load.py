"""Load examples of an embedded task, of a json, jsonl or parquet file, or of a hub data set.

`datasets` does the reading. JSON files are checked first, line by line, so that what is wrong is
told with its line number; the check keeps no more of a file than the numbers of its lines.
"""

import json
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from drlora.data.layout import PLACES, Layout, check_record, choose_layout, unused_columns
from drlora.data.slices import base_of, rows_of
from drlora.errors import DataError
from drlora.io.files import home, local_path

EMBEDDED_PREFIX = "embedded:"
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "embedded" / "tasks"
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
logger = logging.getLogger(__name__)
OTHER_FILE_SUFFIXES = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".xlsx")


def load_examples(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> datasets.Dataset:
    """Examples under the standard column names (see `drlora.data.layout`), all others dropped.

    Args:
        source: `embedded:TASK`, the path of a .json, .jsonl or .parquet file, or a hub data set.
        split: name of the split, which may carry a slice (`train[:100]`). A file is one split,
            called train.
        config: configuration of a hub data set that has several.
        columns: the data's names for standard columns, as `{"prompt": "question"}`.

    Raises:
        DataError: the source, the split or a column does not exist, or a record is malformed.
    """
    found = load_placed(source, split=split, config=config, columns=columns)
    return found.remove_columns([name for name in found.column_names if name in PLACES])


def load_placed(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> datasets.Dataset:
    """As `load_examples`, and where each example comes from, counted from 1.

    One more column, `line`, `item` (of a list) or `row`, has the number; `info.description` has the
    file or data set.
    """
    if source.startswith(EMBEDDED_PREFIX):
        return _load_file(_embedded_file(source, split), split, columns)
    if is_file_name(source):
        if base_of(split) != "train":
            raise DataError(
                f"split {split!r} of {source}: a file has no splits; name the file of that split"
            )
        return _load_file(Path(home(source)), split, columns)
    return _load_hub(source, split, config, columns)


def data_file(source: str, split: str) -> Path | None:
    """The file that a source stands for; None for a hub data set."""
    if source.startswith(EMBEDDED_PREFIX):
        return _embedded_file(source, split)
    return Path(home(source)) if is_file_name(source) else None


def is_file_name(source: str) -> bool:
    """Whether a source is a file, there or not, and no hub data set or embedded task."""
    path = local_path(source)
    return (
        (path is not None and path.is_file())
        or Path(source).suffix in (*READERS, *OTHER_FILE_SUFFIXES)
        or source.startswith(("/", "./", "../", "~"))
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


def _load_file(path: Path, split: str, columns: Mapping[str, str] | None) -> datasets.Dataset:
    if path.is_dir():
        raise DataError(f"{path} is a folder; name one {', '.join(READERS)} file in it")
    if path.suffix not in READERS:
        raise DataError(f"{path}: cannot read {path.suffix!r} files; use {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    place, numbers = "row", None
    if READERS[path.suffix] == "json":
        place, numbers = _check_json(path, columns)
    hint = f"is it empty, or not really a {path.suffix} file?"
    found = _read(lambda: _load_whole(path, split), str(path), hint, columns)
    chosen = [row for _, rows in rows_of(split, {base_of(split): len(found)}) for row in rows]
    if not chosen:
        raise DataError(f"{path} has no examples in {split!r}; it has {len(found)} in all")
    numbered = _placed(found, place, numbers or range(1, len(found) + 1), str(path))
    return numbered.select(chosen)


def _load_whole(path: Path, split: str) -> datasets.Dataset:
    if _has_mark(path):
        return datasets.Dataset.from_list(list(_records(path)))
    found = datasets.load_dataset(
        READERS[path.suffix], data_files={base_of(split): str(path)}, split=base_of(split)
    )
    if path.suffix == ".parquet":  # its text may be none; that of JSON was read already
        found.data.table.validate(full=True)
    return found


def _has_mark(path: Path) -> bool:
    """Whether a text file begins with a byte order mark, which the JSON reader does not know."""
    with path.open("rb") as file:
        return READERS[path.suffix] == "json" and file.read(3) == BYTE_ORDER_MARK


def _records(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSON file that was checked."""
    with path.open(encoding="utf-8-sig") as lines:
        if path.suffix == ".json" and _starts_list(path):
            return json.load(lines)
        return [json.loads(line) for line in lines if line.strip()]


def _placed(
    found: datasets.Dataset, place: str, numbers: Sequence[int], name: str
) -> datasets.Dataset:
    found = found.add_column(place, list(numbers))
    found.info.description = name
    return found


def _load_hub(
    source: str, split: str, config: str | None, columns: Mapping[str, str] | None
) -> datasets.Dataset:
    found = _read(
        lambda: datasets.load_dataset(source, config, split=split),
        f"data set {source!r} (split {split!r})",
        "check the name, the split and the config, or whether the hub can be reached; for a local "
        "file give a path that ends in " + ", ".join(READERS),
        columns,
    )
    return _placed(found, "row", _hub_rows(found, split), f"{source}, split {base_of(split)}")


def _hub_rows(found: datasets.Dataset, split: str) -> Sequence[int]:
    """Rows of the whole split, counted from 1; where its size is not told, those of the slice."""
    sizes = {name: info.num_examples for name, info in (found.info.splits or {}).items()}
    if base_of(split) in sizes:
        rows = [row + 1 for _, some in rows_of(split, sizes) for row in some]
        if len(rows) == len(found):
            return rows
    return range(1, len(found) + 1)


def _read(
    load: Callable[[], Any], where: str, hint: str, columns: Mapping[str, str] | None
) -> datasets.Dataset:
    try:
        dataset = load()
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot load {where}: {error}; {hint}") from error
    layout = choose_layout(dataset.column_names, columns, where)
    if len(dataset) == 0:
        raise DataError(f"{where} has no examples")
    left = unused_columns(dataset.column_names, layout, where)
    if left:
        logger.warning("%s: columns not used: %s", where, ", ".join(left))
    dataset = dataset.select_columns(list(layout.columns.values()))
    check_record(dataset[0], layout, f"{where}, row 1")
    return dataset.rename_columns({column: name for name, column in layout.columns.items()})


def _check_json(path: Path, columns: Mapping[str, str] | None) -> tuple[str, Sequence[int] | None]:
    """Check a file of one JSON object a line, or (.json) of one list of objects.

    Returns:
        What its records are counted in, and the number of each where these are not 1, 2, 3, ...
    """
    layout: Layout | None = None
    filled = array("q")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix == ".json" and _starts_list(path):
                _check_list(json.load(lines), path, columns)
                return "item", None
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    layout = _check_line(line, f"{path}, line {number}", layout, columns)
                    filled.append(number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if layout is None:
        raise DataError(f"{path} is empty")
    return "line", filled


def _starts_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as lines:
        return next((line.lstrip() for line in lines if line.strip()), "").startswith("[")


def _check_list(records: list[Any], path: Path, columns: Mapping[str, str] | None) -> None:
    if not records:
        raise DataError(f"{path} is empty")
    layout: Layout | None = None
    for number, record in enumerate(records, start=1):
        layout = _check_object(record, f"{path}, item {number}", layout, columns)


def _check_line(
    line: str, where: str, layout: Layout | None, columns: Mapping[str, str] | None
) -> Layout:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}); "
            f"each line must be one JSON object"
        ) from error
    return _check_object(record, where, layout, columns)


def _check_object(
    record: object, where: str, layout: Layout | None, columns: Mapping[str, str] | None
) -> Layout:
    """Check one record; the first one (`layout` is None) decides the form of all."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(record).__name__}")
    layout = layout or choose_layout(list(record), columns, where)
    check_record(record, layout, where)
    return layout
