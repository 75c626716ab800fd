"""The forms of an example, recognised by column names, and the checks on each record.

text                         loss on everything
completion   prompt, completion (and answers, choices, tools, label); texts or messages
messages     messages, a list of {role, content} (and tools); loss on the assistant's turns
preference   chosen, rejected (and prompt, tools)
prompt       prompt alone, only where `data.format` says so
sharegpt     conversations, a list of {from, value} (and system, tools): read as messages
alpaca       instruction, output (and input): read as prompt and completion, by its template
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from drlora.errors import DataError, shown

PLACES = ("line", "item", "row", "file")  # columns that say where an example stands
ROLES = ("system", "developer", "user", "assistant", "tool")
SETTINGS = ("tools", "chat_template_kwargs")
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "preference": (("chosen", "rejected"), ("prompt", *SETTINGS), "preference pairs"),
    "completion": (
        ("prompt", "completion"),
        ("answers", "choices", "label", *SETTINGS),
        "prompt and completion",
    ),
    "messages": (("messages",), SETTINGS, "conversations of messages"),
    "sharegpt": (("conversations",), ("system", "tools"), "ShareGPT conversations"),
    "alpaca": (("instruction", "output"), ("input",), "Alpaca instructions"),
    "text": (("text",), (), "text"),
    "prompt": (("prompt",), ("answers", *SETTINGS), "prompts"),
}
"""Name -> columns that it needs, those that it may have, and what it is called."""
KNOWN_COLUMNS = tuple(dict.fromkeys(name for form in FORMS.values() for name in form[0] + form[1]))
# Columns by these names carry what a model should see; without a place in a form they are refused.
_CONTENT = {
    "system", "tools", "input", "context", "documents", "images", "image", "audio", "weight",
    "chosen", "rejected", "reasoning", "thinking", "reasoning_content", "history", "functions",
    "chat_template_kwargs",
}  # fmt: skip
_SEEN = {"images", "image", "audio"}
_WAY_OUT = "put it into the prompt or the messages, or remove the column"
_WAY_OUT_OF_SEEN = (
    "drlora train reads texts alone. Remove the column, or train from a script of TRL's "
    "(SFTTrainer with the model's processor) with the callback of drlora"
)
# Keys of a message that carry something to learn from; whatever else there is counts as a note.
CONTENT_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
_SHAREGPT = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "function_call": "assistant",
    "observation": "tool", "function": "tool",
}  # fmt: skip
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n"
)


@dataclass(frozen=True)
class Form:
    """A form (a key of `FORMS`), and the name in the data of each of its columns."""

    name: str
    columns: dict[str, str]

    def said(self, count: int) -> str:
        """`read as ShareGPT conversations: 1,204`."""
        return f"read as {FORMS[self.name][2]}: {count:,}"


def choose_form(
    found: Collection[str], columns: Mapping[str, str] | None, where: str, name: str | None = None
) -> Form:
    """The first form whose columns are all in `found`.

    Args:
        found: names of the columns in the data.
        columns: the user's names for columns of a form, as `{"prompt": "question"}`.
        where: what the data is, for messages.
        name: the form that it must be.

    Raises:
        DataError: no form fits without using a column twice, or `columns` names what is not there.
    """
    renamed = dict(columns or {})
    _check_names(found, renamed, where, name)
    both = {"prompt", "completion", "messages"}
    if not renamed and not name and both <= set(found):
        raise DataError(
            f"{where} has prompt and completion, and messages too; say which is meant, as columns: "
            f"{{messages: messages}}"
        )
    for form, (required, optional, _) in FORMS.items():
        present = {key: renamed.get(key, key) for key in (*required, *optional)}
        present = {key: column for key, column in present.items() if column in found}
        is_whole = present.keys() >= set(required) | renamed.keys()
        is_meant = name == form if name else form != "prompt"
        if is_meant and is_whole and len(set(present.values())) == len(present):
            return Form(form, present)
    raise DataError(
        f"{where} has the columns {_listed(found)}; needed are "
        f"{' and '.join(FORMS[name][0]) if name else 'prompt and completion, or messages, or text'}"
        f". Rename them, or say which is which: columns: {{prompt: ..., completion: ...}}"
    )


def unused_columns(found: Collection[str], form: Form, where: str) -> list[str]:
    """Columns that have no place in the form.

    Raises:
        DataError: if one of them carries what a model should see.
    """
    left = [name for name in found if name not in (*form.columns.values(), *PLACES)]
    content = [name for name in left if name in _CONTENT]
    if content:
        raise DataError(
            f"{where} has {_listed(content)} beside {_listed(list(form.columns.values()))}, but "
            f"would not use it; {_WAY_OUT if _SEEN.isdisjoint(content) else _WAY_OUT_OF_SEEN}"
        )
    return left


def _check_names(
    found: Collection[str], renamed: Mapping[str, str], where: str, name: str | None
) -> None:
    if name is not None and name not in FORMS:
        raise DataError(f"data.format={name!r} is not known; choose one of {list(FORMS)}.")
    unknown = renamed.keys() - set(KNOWN_COLUMNS)
    if unknown:
        raise DataError(
            f"columns names {_listed(unknown)}, which no form of example has; "
            f"known are {_listed(KNOWN_COLUMNS)}"
        )
    missing = set(renamed.values()) - set(found)
    if missing:
        raise DataError(
            f"{where} has no column {_listed(missing)}, which columns asks for; "
            f"found are {_listed(found)}"
        )


def _listed(names: Collection[str]) -> str:
    ordered = names if isinstance(names, (list, tuple)) else sorted(names)
    return ", ".join(repr(name) for name in ordered) or "none"


def standard(found: Dataset, form: Form) -> Dataset:
    """The columns of `form` under TRL's names, ShareGPT and Alpaca rewritten, and the place."""
    places = [name for name in found.column_names if name in PLACES]
    found = found.select_columns([*form.columns.values(), *places])
    found = found.rename_columns({column: name for name, column in form.columns.items()})
    if form.name == "sharegpt":
        kept = {name: found.features[name] for name in places}
        tools = {"tools": Value("string")} if "tools" in form.columns else {}
        features = Features({**kept, "messages": List(Json()), **tools})
        done = found.map(_from_sharegpt, features=features, remove_columns=list(form.columns))
        return done.select_columns([*features])
    if form.name == "alpaca":
        return found.map(_from_alpaca, desc="Alpaca").select_columns(
            ["prompt", "completion", *places]
        )
    return found


def _from_alpaca(record: Mapping[str, Any]) -> dict[str, str]:
    given = record.get("input") or ""
    context = ", paired with an input that provides further context" if given else ""
    part = f"### Input:\n{given}\n\n" if given else ""
    prompt = _ALPACA.format(context, record["instruction"], part)
    return {"prompt": prompt, "completion": record["output"]}


def _from_sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    turns = [_from_value(turn) for turn in record["conversations"]]
    tools = record.get("tools")
    text = tools if isinstance(tools, str) or not tools else json.dumps(tools)
    return {"messages": [*system, *turns], **({"tools": text or None} if "tools" in record else {})}


def _from_value(turn: Mapping[str, Any]) -> dict[str, Any]:
    more = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
    role = _SHAREGPT.get(turn["from"], turn["from"])
    if turn["from"] != "function_call":
        return {"role": role, "content": turn["value"], **more}
    call = {"type": "function", "function": json.loads(turn["value"])}
    return {"role": role, "content": "", "tool_calls": [call], **more}


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


def suspects(found: Dataset, form: Form) -> list[int]:
    """The rows whose types must be looked at one by one: the first, and what may be no text."""
    rows = {0}
    for name, column in form.columns.items():
        feature = found.features[column]
        if feature == Value("string"):
            texts = enumerate(found[column][:])
            rows |= {row for row, text in texts if text is None or not text.strip()}
        elif not isinstance(feature, List) or (
            name in ("answers", "choices") and feature != List(Value("string"))
        ):
            return list(range(len(found)))
    return sorted(rows)


def unused_keys(raw: Dataset) -> list[str]:
    """Keys of messages that are neither part of a turn nor content: what is read by nobody."""
    known = {"role", "content", "name", "tool_call_id", "weight", *CONTENT_KEYS}
    found: set[str] = set()
    for column in {"messages", "prompt", "completion"} & set(raw.column_names):
        feature = getattr(raw.features[column], "feature", None)
        if isinstance(feature, dict):
            found |= feature.keys()
        elif isinstance(feature, Json):
            found |= {key for turns in raw[column] for turn in turns or () for key in turn}
    return sorted(found - known)


def is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether an example is made of turns, and not of texts."""
    names = ("messages", "conversations", "chosen", "completion", "prompt")
    said = next((record[name] for name in names if record.get(name)), "")
    return isinstance(said, list)


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


def _is_turns(value: object, role: str) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and _is_text(turn.get(role)) for turn in value)
    )


def _is_messages(value: object) -> bool:
    """Turns with a content, which is a text, parts of texts, or none beside a call."""
    return _is_turns(value, "role") and all(
        _is_text(turn.get("content")) or _is_parts(turn.get("content")) or turn.get("tool_calls")
        for turn in value  # type: ignore[attr-defined]
    )


def _is_parts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, Mapping) and _is_text(part.get("text")) for part in value
    )


_Check = tuple[Callable[[object], bool], str]
_FILLED: _Check = (_is_filled, "a string that is not empty")
_STRING: _Check = (_is_text, "a string")
_CHECKS: dict[str, _Check] = {
    "prompt": (lambda v: _is_text(v) or _is_messages(v), "a string"),
    "completion": _FILLED,
    "chosen": _FILLED,
    "rejected": _FILLED,
    "answers": (_is_texts, "a list of strings"),
    "choices": (_is_texts, "a list of strings"),
    "label": (lambda v: isinstance(v, bool), "true or false (whether the completion is good)"),
    "messages": (_is_messages, "a list of {role, content}, both strings"),
    "conversations": (lambda v: _is_turns(v, "from"), "a list of {from, value}, both strings"),
    "instruction": _STRING,
    "output": (lambda v: _is_text(v) and bool(str(v).strip()), "a string that is not empty"),
    "input": (lambda v: v is None or _is_text(v), "a string"),
    "text": (lambda v: _is_text(v) and bool(str(v).strip()), "a string that is not empty"),
}
