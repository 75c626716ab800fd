"""The three forms of an example, recognised by column names, and the checks on each record.

prompt, completion (and answers, choices):             loss on the completion
messages, a list of {role, content}:                   loss on the assistant's turns
text:                                                  loss on everything
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from drlora.errors import DataError

LAYOUTS: dict[str, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
OPTIONAL = {"completion": ("answers", "choices")}
PLACES = ("line", "item", "row")  # columns that say where in its file an example stands
# Columns by these names carry what a model should see; without a place in a form they are refused.
CONTENT_COLUMNS = (
    "system", "tools", "input", "context", "documents", "images", "image", "audio", "weight",
    "chosen", "rejected", "reasoning", "thinking", "chat_template_kwargs",
)  # fmt: skip
KNOWN_COLUMNS = ("prompt", "completion", "answers", "choices", "messages", "text")


@dataclass(frozen=True)
class Layout:
    """A form (a key of `LAYOUTS`), and where each of its columns comes from.

    `columns` maps a column of the form to the name it has in the data.
    """

    form: str
    columns: dict[str, str]


def choose_layout(found: Collection[str], columns: Mapping[str, str] | None, where: str) -> Layout:
    """The first form whose columns are all in `found`.

    Args:
        found: names of the columns in the data.
        columns: the user's names for columns of a form, as `{"prompt": "question"}`.
        where: what the data is, for messages.

    Raises:
        DataError: no form fits without using a column twice, or `columns` names what is not there.
    """
    renamed = dict(columns or {})
    _check_mapping(found, renamed, where)
    _refuse_two_forms(found, renamed, where)
    for form, required in LAYOUTS.items():
        names = required + OPTIONAL.get(form, ())
        present = {name: renamed.get(name, name) for name in names}
        present = {name: column for name, column in present.items() if column in found}
        is_whole = present.keys() >= set(required) | renamed.keys()
        if is_whole and len(set(present.values())) == len(present):
            return Layout(form, present)
    raise DataError(
        f"{where} has the columns {_listed(found)}; needed are prompt and completion, or messages, "
        f"or text. Rename them, or say which is which: columns: {{prompt: ..., completion: ...}}"
    )


def unused_columns(found: Collection[str], layout: Layout, where: str) -> list[str]:
    """Columns that have no place in the form.

    Raises:
        DataError: if one of them carries what a model should see.
    """
    left = [name for name in found if name not in layout.columns.values()]
    content = [name for name in left if name in CONTENT_COLUMNS]
    if content:
        raise DataError(
            f"{where} has {_listed(content)} beside {_listed(list(layout.columns.values()))}, but "
            f"would not use it; put it into the prompt or the messages, or remove the column"
        )
    return left


def _refuse_two_forms(found: Collection[str], renamed: Mapping[str, str], where: str) -> None:
    forms = [LAYOUTS[name] for name in ("completion", "messages")]
    if not renamed and all(column in found for form in forms for column in form):
        raise DataError(
            f"{where} has prompt and completion, and messages too; say which is meant, as columns: "
            f"{{messages: messages}}"
        )


def _check_mapping(found: Collection[str], renamed: Mapping[str, str], where: str) -> None:
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


def check_record(record: Mapping[str, Any], layout: Layout, where: str) -> None:
    """Refuse a record whose values have the wrong type.

    Args:
        record: one example, under the data's own column names.
        layout: the form it should have.
        where: which record it is (file and line), for the message.

    Raises:
        DataError: a column is missing or has a value of the wrong type.
    """
    for name, column in layout.columns.items():
        value = record.get(column)
        is_right, wanted = CHECKS[name]
        if not is_right(value):
            label = repr(column) if column == name else f"{column!r} (as {name})"
            raise DataError(
                f"{where}: {label} must be {wanted}, not {_shown(value, column, record)}"
            )


def _shown(value: object, column: str, record: Mapping[str, Any]) -> str:
    if column not in record:
        return "missing"
    text = repr(value)
    return f"{text[:60]}..." if len(text) > 60 else text


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_filled_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_answers(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_text, value)))


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and _is_text(value.get("role"))
        and _is_text(value.get("content"))
    )


CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "prompt": (_is_text, "a string"),
    "completion": (_is_filled_text, "a string that is not empty"),
    "answers": (_is_answers, "a list of strings"),
    "choices": (_is_answers, "a list of strings"),
    "messages": (_is_messages, "a list of {role, content}, both strings"),
    "text": (_is_filled_text, "a string that is not empty"),
}
