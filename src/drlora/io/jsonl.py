"""Logs of one JSON object a line, each with the `step` it belongs to."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from drlora.io.writing import move_into_place


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
    _keep(path, lambda line: _step_of(line) <= step)


def forget_kind(path: Path, kind: str, step: int) -> None:
    """Drop the entries of a kind at a step, which are to be written again."""
    _keep(path, lambda line: (_parse(line) or {}).get("kind") != kind or _step_of(line) != step)


def _keep(path: Path, is_kept: Callable[[bytes], bool]) -> None:
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as lines, temporary.open("wb") as kept:
        kept.writelines(line for line in lines if is_kept(line))
    move_into_place(temporary, path)


def set_aside(path: Path) -> None:
    """Keep the log of an earlier run as `growth-1.jsonl`, `growth-2.jsonl` and so on."""
    if not path.exists() or not path.stat().st_size:
        return
    numbers = itertools.count(1)
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in numbers)
    path.rename(next(name for name in names if not name.exists()))


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
