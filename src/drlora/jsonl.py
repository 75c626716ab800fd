"""Logs of one JSON object a line, each with the `step` it belongs to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def append_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Append entries to a log, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(finite(entry)) + "\n" for entry in entries))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log, none if it is not there; a line that a crash cut off is left out."""
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            entry = _parse(line)
            if entry is not None:
                yield entry


def forget_after(path: Path, step: int) -> None:
    """Drop the entries that a run resumed at `step` will write again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), "utf-8")
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    entry = _parse(line)
    return math.inf if entry is None else entry.get("step", math.inf)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
