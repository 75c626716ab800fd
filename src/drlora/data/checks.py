"""Whether the values of a record have the types that its form asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from datasets import Dataset, List, Value

from drlora.data.formats import Form, listed
from drlora.errors import DataError, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
_SIDES = ("prompt", "completion", "chosen", "rejected")


def check_record(record: Mapping[str, Any], form: Form, where: str) -> None:
    """Refuse a record whose values have the wrong type.

    Args:
        record: one example, under the data's own column names.
        form: that it should have.
        where: which record it is (file and line), for the message.

    Raises:
        DataError: a column is missing or has a value of the wrong type.
    """
    for name, column in form.columns.items():
        value = record.get(column)
        is_right, wanted = _CHECKS.get(name, (lambda _: True, ""))
        if not is_right(value):
            label = repr(column) if column == name else f"{column!r} (as {name})"
            found = shown(value) if column in record else "missing"
            raise DataError(f"{where}: {label} must be {wanted}, not {found}")
        if value is not None and _is_turns(value, "role"):
            _check_turns(value, where)
    sides = {name: record.get(c) for name, c in form.columns.items() if name in _SIDES}
    if len({isinstance(value, list) for value in sides.values()}) > 1:
        raise DataError(f"{where}: {listed(list(sides))} must be texts, or all of them messages")


def parsed(text: str, what: str) -> Any:
    """JSON in a text.

    Args:
        text: that should be JSON.
        what: it is, for the message.

    Raises:
        DataError: it is not.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} {shown(text)}: no JSON") from error


def suspects(found: Dataset, form: Form) -> list[int]:
    """The rows whose types must be looked at one by one: the first, and what may be no text."""
    rows = {0}
    for name, column in form.columns.items():
        feature = found.features[column]
        if feature == Value("string") and name != "label":
            texts = enumerate(found[column][:])
            rows |= {row for row, text in texts if text is None or not text.strip()}
        elif (
            not isinstance(feature, List)
            # Rewritten before they are used, or not looked at again for every objective.
            or name in ("conversations", "history", *_SIDES)
            or (name in ("answers", "choices") and feature != List(Value("string")))
        ):
            return list(range(len(found)))
    return sorted(rows)


def as_verdict(value: object) -> bool | None:
    """True or false as a table may have it: 1, 0, or a text; None of anything else."""
    text = str(value).lower().removesuffix(".0")
    return {"true": True, "1": True, "false": False, "0": False}.get(text)


def _check_turns(turns: Collection[Mapping[str, Any]], where: str) -> None:
    for number, turn in enumerate(turns, start=1):
        if turn["role"] not in ROLES:
            raise DataError(
                f"{where}: message {number} has the role {turn['role']!r}; known are "
                f"{', '.join(ROLES)}. Rename it, for example human to user and gpt to assistant"
            )
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise DataError(
                f"{where}: message {number} has weight {weight!r}; 0 (no loss) and 1 are known"
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_filled(value: object) -> bool:
    return isinstance(value, str) and value.strip() != "" or _is_messages(value)


def _is_texts(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_text, value)))


def _is_history(value: object) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(pair, list) and len(pair) == 2 and _is_texts(pair) for pair in value)
    )


def _is_turns(value: object, role: str) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and _is_text(turn.get(role)) for turn in value)
    )


def _is_messages(value: object) -> bool:
    """Turns with a content, which is a text, parts of texts, or none beside a call."""
    return _is_turns(value, "role") and all(
        _is_text(turn.get("content")) or is_parts(turn.get("content")) or turn.get("tool_calls")
        for turn in value  # type: ignore[attr-defined]
    )


def is_parts(value: object) -> bool:
    """Whether a content is a list of parts, each with a text."""
    return isinstance(value, list) and all(
        isinstance(part, Mapping) and _is_text(part.get("text")) for part in value
    )


_Check = tuple[Callable[[object], bool], str]
_FILLED: _Check = (_is_filled, "a string that is not empty")
_STRING: _Check = (_is_text, "a string")
_MAYBE: _Check = (lambda v: v is None or _is_text(v), "a string")
_TEXT: _Check = (lambda v: _is_text(v) and bool(str(v).strip()), "a string that is not empty")
_CHECKS: dict[str, _Check] = {
    "prompt": (lambda v: _is_text(v) or _is_messages(v), "a string"),
    "completion": _FILLED,
    "chosen": _FILLED,
    "rejected": _FILLED,
    "answers": (_is_texts, "a list of strings"),
    "choices": (_is_texts, "a list of strings"),
    "label": (
        lambda v: as_verdict(v) is not None,
        "true or false (whether the completion is good)",
    ),
    "messages": (_is_messages, "a list of {role, content}, both strings"),
    "conversations": (
        lambda v: _is_turns(v, "from") and _is_turns(v, "value"),
        "a list of {from, value}, both strings",
    ),
    "instruction": _STRING,
    "output": _TEXT,
    "input": _MAYBE,
    "system": _MAYBE,
    "context": _MAYBE,
    "history": (_is_history, "a list of pairs [user, assistant], both strings"),
    "question": _STRING,
    "answer": _TEXT,
    "text": _TEXT,
}
