"""The forms of an example, recognised by column names, and the checks on each record.

text                         loss on everything
completion   prompt, completion (and answers, choices, tools, label); texts or messages
messages     messages, a list of {role, content} (and tools); loss on the assistant's turns
preference   chosen, rejected (and prompt, tools)
prompt       prompt alone, only where `data.format` says so
sharegpt     conversations, a list of {from, value} (and system, tools): read as messages
alpaca       instruction, output (and input): read as prompt and completion, by its template;
             with history (pairs of user and assistant) or system, as LLaMA-Factory has them, as
             messages
question     question, answer (and context): read as prompt and completion
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Json

from drlora.errors import DataError

PLACES = ("line", "item", "row", "file")  # columns that say where an example stands
OF_THE_DATA = "{} of the data"  # a column of the data that has such a name
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
    "alpaca": (("instruction", "output"), ("input", "system", "history"), "Alpaca instructions"),
    "text": (("text",), (), "text"),
    "question": (
        ("question", "answer"),
        ("context",),
        "questions and answers, which are prompt and completion",
    ),
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


@dataclass(frozen=True)
class Form:
    """A form (a key of `FORMS`), and the name in the data of each of its columns."""

    name: str
    columns: dict[str, str]

    def said(self, count: int) -> str:
        """`read as ShareGPT conversations: 1,204`."""
        turns = " with their history, as conversations" if self.has_history else ""
        return f"read as {FORMS[self.name][2]}{turns}: {count:,}"

    @property
    def has_history(self) -> bool:
        """Whether Alpaca's columns are turns of a conversation."""
        return self.name == "alpaca" and bool({"history", "system"} & self.columns.keys())


def where_of(row: Mapping[str, Any]) -> str:
    """`line 61`, as far as an example says where it stands."""
    return ", ".join(f"{name} {row[name]}" for name in PLACES if name in row) or "an example"


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
        f"{where} has the columns {listed(found)}; needed are "
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
            f"{where} has {listed(content)} beside {listed(list(form.columns.values()))}, but "
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
            f"columns names {listed(unknown)}, which no form of example has; "
            f"known are {listed(KNOWN_COLUMNS)}"
        )
    missing = set(renamed.values()) - set(found)
    if missing:
        raise DataError(
            f"{where} has no column {listed(missing)}, which columns asks for; "
            f"found are {listed(found)}"
        )


def listed(names: Collection[str]) -> str:
    """The names in quotes, one after the other."""
    ordered = names if isinstance(names, (list, tuple)) else sorted(names)
    return ", ".join(repr(name) for name in ordered) or "none"


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
