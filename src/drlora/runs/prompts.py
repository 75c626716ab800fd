"""What a model is asked: a text, or a conversation whose next turn is wanted.

    {"prompt": "bank, noun:"}                                      a text
    {"prompt": [{"role": "user", "content": "Hello"}]}             a conversation
    {"messages": [...], "tools": [...]}                            the same, as training data has it

A file has one such object a line (.jsonl), a list of them (.json), or a text a line (.txt). What a
record has as its answer (completion, answers, the assistant's last turn) is not asked with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drlora.data.checks import is_parts
from drlora.data.formats import SETTINGS
from drlora.data.turns import Conversation, conversation_of
from drlora.errors import DataError, shown
from drlora.io.files import home, read_text

LARGEST_FILE_BYTES = 256 * 2**20
ENDINGS = (".jsonl", ".json", ".txt")

Turns = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        content: a text, or the turns so far.
        tools: that may be called.
        expected: what would be right, where that is known.
        settings: of the template, by its names.
    """

    content: str | Turns
    tools: tuple[Any, ...] = ()
    expected: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conversation(self) -> Conversation:
        """As a template takes it; a text is a user's turn."""
        content = self.content
        said = ({"role": "user", "content": content},) if isinstance(content, str) else content
        options = {"tools": list(self.tools) or None, **self.settings}
        return Conversation([dict(turn) for turn in said], options)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts in a file.

    Raises:
        DataError: naming the file, the line and what is wrong with it.
    """
    path = Path(home(str(path)))
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: prompts are read from a file that ends in {', '.join(ENDINGS)}.")
    text = read_text(path, LARGEST_FILE_BYTES, DataError)
    if path.suffix == ".json":
        records = _parsed(text, str(path))
        if not isinstance(records, list):
            raise DataError(f"{path} must hold a list of prompts, not {shown(records)}.")
        found = [as_prompt(one, f"{path}, item {n}") for n, one in enumerate(records, start=1)]
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        is_text = path.suffix == ".txt"
        found = [
            Prompt(line.removesuffix("\r")) if is_text else _of_line(line, f"{path}, line {n}")
            for n, line in lines
        ]
    if not found:
        raise DataError(f"{path} has no prompt.")
    return found


def _of_line(line: str, where: str) -> Prompt:
    return as_prompt(_parsed(line, where), where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}.") from error


def as_prompt(record: Any, where: str) -> Prompt:
    """A text, a list of turns or a record as a prompt.

    Raises:
        DataError: naming `where` and what is wrong with it.
    """
    if isinstance(record, Prompt):
        return record
    if isinstance(record, (str, list, tuple)):
        record = {"prompt": record}
    asked = record.get("prompt", record.get("messages")) if isinstance(record, Mapping) else None
    if isinstance(asked, str) and asked:
        return Prompt(asked, expected=_expected(record))
    if not isinstance(asked, (list, tuple)) or not asked or not all(map(_is_turn, asked)):
        raise DataError(
            f"{where}: {shown(record)} is no prompt; write a text, a list of turns "
            f"(role and content), or an object with one of them as prompt or messages."
        )
    given = {key: record[key] for key in SETTINGS if record.get(key)}
    whole, expected = conversation_of({"messages": asked, **given}, where), _expected(record)
    turns = tuple(whole.turns)
    if turns[-1]["role"] == "assistant":
        expected = expected or turns[-1]["content"]
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{where}: there is no turn before the assistant's.")
    tools, settings = whole.options["tools"] or (), record.get("chat_template_kwargs") or {}
    return Prompt(turns, tuple(tools), expected, settings)


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    return content is None or isinstance(content, str) or is_parts(content)


def _expected(record: Mapping[str, Any]) -> str | None:
    """The answer that comes with a record, if it is a text."""
    found = record.get("answers") or record.get("completion")
    if isinstance(found, Sequence) and not isinstance(found, str) and found:
        found = found[-1]
        found = found.get("content") if isinstance(found, Mapping) else found
    return found.strip() if isinstance(found, str) else None
