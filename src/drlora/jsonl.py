"""Logs of one JSON object a line, each with the `step` it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from drlora.writing import move_into_place


def append_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Append entries to a log, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(finite(entry)) + "\n" for entry in entries))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log, none if it is not there.

    What is no JSON object with a step is left out, such as a line that a crash cut off.
    """
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                entry = _parse(line)
                if entry is not None and math.isfinite(_step_of(line)):
                    yield entry


def forget_after(path: Path, step: int) -> None:
    """Drop the entries that a run resumed at `step` will write again."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as lines, temporary.open("wb") as kept:
        kept.writelines(line for line in lines if _step_of(line) <= step)
    move_into_place(temporary, path)


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: bytes) -> float:
    step = (_parse(line) or {}).get("step")
    return step if isinstance(step, (int, float)) and not math.isnan(step) else math.inf


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
