"""Files of lines: what their records are counted in, and which line is wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from drlora.errors import DataError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (*OPENERS, ".zst")


def suffix_of(path: Path) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    return Path(path.stem).suffix or path.suffix if path.suffix in PACKED else path.suffix


def numbers_of(path: Path, reader: str, count: int) -> tuple[str, Sequence[int]]:
    """What records are counted in, and the number of each."""
    if path.suffix == ".zst":
        return "row", range(1, count + 1)
    if reader == "json" and _starts_list(path):
        return "item", range(1, count + 1)
    if reader != "json":
        return "row" if reader != "text" else "line", range(1, count + 1)
    with opened(path) as lines:
        total = sum(1 for _ in lines)
    if total != count:
        with opened(path) as lines:
            filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
        if len(filled) != count:
            raise DataError(f"{path}: {len(filled)} lines gave {count} examples")
        return "line", filled
    return "line", range(1, count + 1)


def opened(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        raise DataError(f"{path}: a .csv or .tsv inside .zst is not read; unpack it")
    return cast("IO[bytes]", OPENERS.get(path.suffix, open)(path, "rb"))


def _starts_list(path: Path) -> bool:
    with opened(path) as lines:
        first = next((line for line in lines if line.strip()), b"")
    return first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def diagnose(path: Path) -> None:
    """Name what is wrong with a JSON file, if it is that.

    Raises:
        DataError: with the number of the line.
    """
    found = 0
    try:
        if suffix_of(path) == ".json" and _starts_list(path):
            with opened(path) as file:
                items = enumerate(json.loads(file.read().decode("utf-8-sig")), start=1)
            records: Iterator[tuple[str, Any]] = ((f"item {n}", item) for n, item in items)
        else:
            records = _json_lines(path)
        for where, record in records:
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
