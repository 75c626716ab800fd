"""JSON files and packed ones: where their records stand, what they are counted in, what is wrong.

A JSON file has one record a line, or a list of them (`items`), which may stand under a key, as in
`{"data": [{..}, {..}]}`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from drlora.errors import DataError

PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}
"""Suffix -> the module that opens such a file."""
_MARK = b"\xef\xbb\xbf"  # that some editors put before a text in UTF-8


def suffix_of(path: Path) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    return Path(path.stem).suffix or path.suffix if path.suffix in PACKED else path.suffix


def opened(path: Path) -> IO[bytes]:
    """The file, unpacked.

    Raises:
        DataError: what would unpack it is not installed.
    """
    module = PACKED.get(path.suffix, "io")
    try:
        found = import_module(module).open(path, "rb")
    except ImportError as error:
        raise DataError(f"{path}: pip install {module} to read it, or unpack it") from error
    # That of zstandard knows no lines.
    is_whole = isinstance(found, io.BufferedIOBase)
    return cast("IO[bytes]", found if is_whole else io.BufferedReader(found))


def list_in(path: Path, columns: Collection[str]) -> str | None:
    """Where the list of records is: "" of a file that is a list, else a key; None of lines.

    Args:
        path: of a JSON file.
        columns: keys of which an example has at least one, so what has one is no key of a list.
    """
    with opened(path) as lines:
        start = list(islice((line for line in lines if line.removeprefix(_MARK).strip()), 2))
    if start and start[0].removeprefix(_MARK).lstrip().startswith(b"["):
        return ""
    if suffix_of(path) != ".json" or not start or _is_record(start[0]) and len(start) > 1:
        return None
    try:
        with opened(path) as file:
            whole = json.loads(file.read().decode("utf-8-sig"))
    except ValueError:
        return None
    if not isinstance(whole, dict) or whole.keys() & set(columns):
        return None
    found = [k for k, v in whole.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    return found[0] if len(found) == 1 else None


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def line_numbers(path: Path, count: int) -> Sequence[int]:
    """The line of each of `count` records of a file with one a line; blank lines have none.

    Raises:
        DataError: there are more lines, or fewer.
    """
    with opened(path) as lines:
        filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if len(filled) != count:
        raise DataError(f"{path}: {len(filled)} lines gave {count} examples")
    return filled


def diagnose(path: Path, is_list: bool) -> None:
    """Name what is wrong with a JSON file, if it is that.

    Raises:
        DataError: with the number of the line.
    """
    found = 0
    try:
        for where, record in _items(path) if is_list else _json_lines(path):
            found += 1
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, {where}: must be a JSON object, not {type(record).__name__}"
                )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not found:
        raise DataError(f"{path} is empty")


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    with opened(path) as file:
        whole = json.loads(file.read().decode("utf-8-sig"))
    return ((f"item {number}", item) for number, item in enumerate(whole, start=1))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                try:
                    yield f"line {number}", json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not valid JSON ({error.msg}, column "
                        f"{error.colno}); each line must be one JSON object"
                    ) from error
