"""A conversation to token ids, and the spans of them that are the assistant's.

The chat template does the rendering. Its own generation marks say what is the assistant's, or those
of TRL's training version of it; of a template that has neither, an assistant's turn is what it adds
to the conversation before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from os.path import commonprefix
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from drlora.errors import DataError, first_line

Turn = Mapping[str, Any]
Span = tuple[int, int]
"""First token, and the one after the last."""

WEIGHT = "weight"  # 0 on an assistant's turn: no loss on it


@dataclass(frozen=True)
class Conversation:
    """Turns as a template takes them, and what else it is given (tools and its own settings)."""

    turns: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of `tokenizer`, as it is trained with.

    Attributes:
        tokenizer: that it belongs to.
        is_marked: whether the assistant's turns are asked for; else all of a conversation is
            trained, with the template as it is.
    """

    tokenizer: PreTrainedTokenizerBase
    is_marked: bool = True

    @cached_property
    def text(self) -> str | None:
        """A version with generation marks; None of a template that has no such version."""
        if not self.is_marked:
            return None
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        own = self.tokenizer.get_chat_template()
        if has_generation_markers(own):
            return own
        try:
            return get_training_chat_template(self.tokenizer)
        except (ValueError, TypeError, jinja2.TemplateError):  # none that TRL knows
            return None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens of which any may end a turn."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {number for number, token in added if token.special}
        return frozenset({*special, *self.tokenizer.all_special_ids})

    def encode(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        """Token ids, and the spans of the assistant, in their order.

        Raises:
            DataError: the template cannot render it, or its turns cannot be told apart.
        """
        try:
            if not self.is_marked:
                ids = self._plain(self.render(conversation.turns, conversation.options))
                return list(ids["input_ids"]), [(0, len(ids["input_ids"]))]
            return self._marked(conversation) if self.text else self._by_prefixes(conversation)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise DataError(
                f"{first_line(error)}; write the conversation as it expects, or use another "
                f"template (chat_template: FILE)"
            ) from error

    def opened(self, conversation: Conversation, asked: int, ids: Sequence[int]) -> int:
        """How many of `ids` the first `asked` turns are, with the opening of an answer."""
        if not asked:
            return 0
        turns, options = conversation.turns[:asked], conversation.options
        head = self._plain(self.render(turns, options, add_generation_prompt=True))["input_ids"]
        return len(commonprefix([list(head), list(ids)]))

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any], **more: Any) -> str:
        """The text that the template makes of some turns."""
        shown: Any = self._as_read(turns)
        kwargs = {"chat_template": self.text, **options, **more}
        text = self.tokenizer.apply_chat_template(shown, tokenize=False, **kwargs)
        assert isinstance(text, str)
        return text

    def _plain(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it reads a content as a list of parts, as those of models that see do."""
        words: Any = [{"role": "user", "content": "word"}]
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": "word"}]}]
        return not self._has_word(words) and self._has_word(parts)

    def _has_word(self, turns: Any) -> bool:
        try:
            return "word" in str(
                self.tokenizer.apply_chat_template(
                    turns, chat_template=self.text, tokenize=False, add_generation_prompt=False
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError):
            return False

    def _as_read(self, turns: Sequence[Turn]) -> Any:
        if not self.takes_parts:
            return list(turns)
        return [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]

    def _marked(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        encoded: Any = self.tokenizer.apply_chat_template(
            self._as_read(conversation.turns),
            chat_template=self.text,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **conversation.options,
        )
        marks = enumerate(encoded["assistant_masks"])
        runs = [list(run) for mark, run in groupby(marks, key=lambda pair: pair[1]) if mark]
        return list(encoded["input_ids"]), [(run[0][0], run[-1][0] + 1) for run in runs]

    def _by_prefixes(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        turns, options = conversation.turns, conversation.options
        text = self.render(turns, options)
        encoded = self._plain(text)
        ids, spans = list(encoded["input_ids"]), []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            if index:
                before = self.render(turns[:index], options, add_generation_prompt=True)
            else:  # templates look at the first message, so none can be rendered without one
                before = text[: max(text.find(turn["content"].strip()), 0)]
            is_last = index == len(turns) - 1
            through = text if is_last else self.render(turns[: index + 1], options)
            if not text.startswith(through):
                raise DataError(
                    "it changes earlier turns, so the assistant's cannot be told apart; mark them "
                    "with {% generation %} in a template of your own (chat_template: FILE), or "
                    "give each conversation one assistant turn, its last"
                )
            if not text.startswith(before):
                before = commonprefix([before, text])
            spans.append(_tokens_of(encoded, len(before), len(through), len(ids)))
        return ids, spans


def _tokens_of(encoded: Any, start: int, end: int, length: int) -> Span:
    """The tokens of text[start:end]; one across the border counts to the later part."""
    first = encoded.char_to_token(start)
    last = encoded.char_to_token(end - 1)
    return (length if first is None else first), (length if last is None else last + 1)


def conversation_of(record: Mapping[str, Any], where: str) -> tuple[Conversation, list[float]]:
    """A record with `messages`, or with a `prompt` and a `completion` of messages, for a template.

    Returns:
        The conversation without what is no part of it, and the weight of each turn: assistant
        turns in a prompt have none.
    """
    asked = record.get("prompt") or []
    said = record.get("messages") or record["completion"]
    turns = [_turn(t, f"{where}: message {n}") for n, t in enumerate([*asked, *said], start=1)]
    weights = [float(turn.pop(WEIGHT, 1)) * (n >= len(asked)) for n, turn in enumerate(turns)]
    tools = record.get("tools")
    options = {
        "tools": (json.loads(tools) if isinstance(tools, str) else tools) or None,
        **(record.get("chat_template_kwargs") or {}),
    }
    return Conversation(turns, options), weights


def _turn(turn: Turn, where: str) -> dict[str, Any]:
    """Without what is none, with a text (maybe empty), and with arguments that templates read."""
    kept = {key: value for key, value in turn.items() if value is not None}
    calls = [_call(call, where) for call in kept.pop("tool_calls", None) or ()]
    content = kept.get("content", "")
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    return {**kept, "content": content, **({"tool_calls": calls} if calls else {})}


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool call whose arguments are no text: OpenAI's are JSON in a string."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: arguments {arguments!r} of a tool call: no JSON") from error
    elif isinstance(arguments, Mapping) and None in arguments.values():
        raise DataError(
            f"{where} has a tool call with arguments {dict(arguments)}; a table fills them up with "
            f"nothing where other calls have more. Write arguments as one JSON string, or the data "
            f"as .jsonl"
        )
    return {**{k: v for k, v in call.items() if v is not None}, "function": function}
