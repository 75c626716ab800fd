"""Changing values in YAML that people read: comments and order stay.

    with_value("a: 1  # one\nb:\n  c: 2\n", ["b", "c"], 3)

It knows YAML as recipes are written: sections of `key: value` lines, each value on one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from drlora.io.settings import parse_yaml, set_in


def with_value(text: str, path: Sequence[str], value: Any) -> str:
    """`text` with `value` under `path`, in place of what is there or as a line of its own.

    Args:
        text: a mapping in YAML.
        path: the key, or the section and the key in it, or deeper.
        value: a plain value.

    Raises:
        ConfigError: if the path leads into a plain value.
    """
    tree = parse_yaml(text, "the recipe")
    set_in(tree, path, value)
    section, keys = (path[0], path[1:]) if len(path) > 1 else (None, path)
    shown = tree[section][keys[0]] if section else tree[keys[0]]
    made = _put(text.splitlines(), section, keys[0], _flow(shown))
    assert parse_yaml(made, "the recipe") == tree, path
    return made


def without(text: str, path: Sequence[str]) -> str:
    """`text` without the line of a key of a section; as it is where there is none."""
    lines = text.splitlines()
    at = _line_of(lines, path[0], path[1])
    return "\n".join(line for number, line in enumerate(lines) if number != at) + "\n"


def _flow(value: Any) -> str:
    """A value in one line."""
    made = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return made.removesuffix("...\n").strip()


def _put(lines: list[str], section: str | None, key: str, value: str) -> str:
    line = f"{'  ' * (section is not None)}{key}: {value}"
    at = _line_of(lines, section, key)
    head = _line_of(lines, None, section) if section is not None else None
    if at is not None:
        lines[at] = line
    elif head is not None:
        lines[head] = f"{section}:"  # it may have been written as `section: {}`
        lines.insert(head + 1, line)
    else:
        lines += ["", *([f"{section}:"] if section is not None else []), line]
    return "\n".join(lines) + "\n"


def _line_of(lines: Sequence[str], section: str | None, key: str) -> int | None:
    """The line on which a key stands."""
    start = re.compile(rf"{'  ' * (section is not None)}{re.escape(key)}\s*:")
    among = range(len(lines)) if section is None else _inside(lines, section)
    return next((number for number in among if start.match(lines[number])), None)


def _inside(lines: Sequence[str], section: str) -> Iterator[int]:
    """The lines of a section, its head left out."""
    head = _line_of(lines, None, section)
    for number in range(len(lines) if head is None else head + 1, len(lines)):
        if lines[number].strip() and not lines[number].startswith((" ", "#")):
            return
        yield number
