"""Conversations to token ids, and the spans of them that are the assistant's, many at a time.

The chat template does the rendering. Its own generation marks say what is the assistant's, or those
of TRL's training version of it; of a template that has neither, an assistant's turn is what it adds
to the conversation before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from os.path import commonprefix
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from drlora.data.checks import parsed
from drlora.errors import DataError, first_line, shown

Turn = Mapping[str, Any]
Span = tuple[int, int]
"""First token, and the one after the last."""
Marked = tuple[list[int], list[Span]]
"""Token ids of a conversation, and the spans of the assistant in their order."""

WEIGHT = "weight"  # 0 on an assistant's turn: no loss on it
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, KeyError, ValueError)


@dataclass(frozen=True)
class Conversation:
    """What a template is given, and what of it is learned.

    Attributes:
        turns: without what is none; each has a text, maybe an empty one.
        options: the tools, and the template's own settings.
        weights: of each turn; 0 where there is no loss.
        asked: so many turns, the first ones, are a prompt.
    """

    turns: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    weights: Sequence[float] = ()
    asked: int = 0

    def until(self, end: int) -> Conversation:
        """Its first turns."""
        return Conversation(self.turns[:end], self.options)


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

    @cached_property
    def is_blank(self) -> Callable[[int], bool]:
        """Whether a token is white space and nothing else."""
        return cache(lambda number: not str(self.tokenizer.decode([number])).strip())

    def encode(self, conversations: Sequence[Conversation]) -> list[Marked]:
        """Token ids and the spans of the assistant, of each conversation.

        Raises:
            DataError: the template cannot render one, or its turns cannot be told apart.
        """
        with refused_as_data():
            if not self.is_marked:
                rows = self._plain(self.render(conversations))["input_ids"]
                return [(ids, [(0, len(ids))]) for ids in rows]
            if not getattr(self.tokenizer, "is_fast", False):
                raise DataError(
                    f"the tokenizer {self.tokenizer.name_or_path!r} is written in Python and does "
                    f"not say where in a text a token stands, so the assistant's turns cannot be "
                    f"told apart; use a fast one (tokenizer: NAME, or convert it with "
                    f"transformers), or train on all turns (training.assistant_only_loss: false)"
                )
            found = self._marked if self.text else self._by_prefixes
            return list(found(conversations))

    def asked(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of each, up to where the next turn of the assistant begins.

        Raises:
            DataError: there is no template, or it cannot render one.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                f"it is a conversation, and the tokenizer {self.tokenizer.name_or_path!r} has no "
                f"chat template; name one (chat_template: FILE), or write texts"
            )
        with refused_as_data():
            texts = self.render(conversations, add_generation_prompt=True)
            return list(self._plain(texts)["input_ids"])

    def opened(self, conversations: Sequence[Conversation], rows: Sequence[Marked]) -> list[int]:
        """How many tokens of each the turns that are asked are, with the opening of an answer."""
        if not all(one.asked for one in conversations):
            return [0] * len(conversations)
        asked = [one.until(one.asked) for one in conversations]
        heads = self._plain(self.render(asked, add_generation_prompt=True))["input_ids"]
        return [len(commonprefix([head, ids])) for head, (ids, _) in zip(heads, rows, strict=True)]

    def render(self, conversations: Sequence[Conversation], **how: Any) -> list[str]:
        """The text that the template makes of each."""
        texts = self._applied(conversations, tokenize=False, **how)
        return [text for some in texts for text in some]

    def _applied(self, conversations: Sequence[Conversation], **how: Any) -> Iterator[Any]:
        """What transformers makes of them, as many at once as have the same options."""
        for options, some in groupby(conversations, key=lambda one: one.options):
            turns: Any = [self._as_read(one.turns) for one in some]
            given = {"chat_template": self.text, **options, **how}
            yield self.tokenizer.apply_chat_template(turns, **given)

    def _plain(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=False)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it reads a content as a list of parts, as those of models that see do."""
        words: Any = [{"role": "user", "content": "word"}]
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": "word"}]}]
        return not self._has_word(words) and self._has_word(parts)

    def _has_word(self, turns: Any) -> bool:
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.text, tokenize=False, add_generation_prompt=False
            )
        except TEMPLATE_ERRORS:
            return False
        return "word" in str(text)

    def _as_read(self, turns: Sequence[Turn]) -> Any:
        if not self.takes_parts:
            return list(turns)
        return [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]

    def _marked(self, conversations: Sequence[Conversation]) -> Iterator[Marked]:
        how = {"return_dict": True, "return_assistant_tokens_mask": True}
        for some in self._applied(conversations, **how):
            for ids, marks in zip(some["input_ids"], some["assistant_masks"], strict=True):
                edges = np.flatnonzero(np.diff(marks, prepend=0, append=0)).tolist()
                yield ids, list(zip(edges[::2], edges[1::2], strict=True))

    def _by_prefixes(self, conversations: Sequence[Conversation]) -> Iterator[Marked]:
        texts = self.render(conversations)
        encoded = self._plain(texts)
        answers = [
            [n for n, turn in enumerate(one.turns) if turn["role"] == "assistant"]
            for one in conversations
        ]
        pairs = list(zip(conversations, answers, strict=True))
        before = [one.until(n) for one, some in pairs for n in some if n]
        befores = iter(self.render(before, add_generation_prompt=True))
        through = [one.until(n + 1) for one, some in pairs for n in some if n + 1 < len(one.turns)]
        throughs = iter(self.render(through))
        for row, (one, some) in enumerate(pairs):
            text, ids, spans = texts[row], encoded["input_ids"][row], []
            for n in some:
                if n:
                    opening = next(befores)
                else:  # templates look at the first message, so none can be rendered without one
                    opening = text[: max(text.find(one.turns[0]["content"].strip()), 0)]
                whole = next(throughs) if n + 1 < len(one.turns) else text
                if not text.startswith(whole):  # some end a conversation, and so each part of it
                    whole = whole.removesuffix(str(self.tokenizer.eos_token or ""))
                if not text.startswith(whole):
                    raise DataError(
                        "it changes earlier turns, so the assistant's cannot be told apart; mark "
                        "them with {% generation %} in a template of your own (chat_template: "
                        "FILE), or give each conversation one assistant turn, its last"
                    )
                if not text.startswith(opening):
                    opening = commonprefix([opening, text])
                # A token across the border counts to the later part.
                first = encoded.char_to_token(row, len(opening))
                last = encoded.char_to_token(row, len(whole) - 1)
                spans.append(
                    (len(ids) if first is None else first, len(ids) if last is None else last + 1)
                )
            yield ids, spans


@contextmanager
def refused_as_data(where: str = "") -> Iterator[None]:
    """What a chat template says against a conversation, as a DataError."""
    try:
        yield
    except DataError:
        raise
    except TEMPLATE_ERRORS as error:
        place = f"{where}: " if where else ""
        raise DataError(
            f"{place}{first_line(error)}; write the conversation as it expects, or use another "
            f"template (chat_template: FILE)"
        ) from error


def conversation_of(record: Mapping[str, Any], where: str) -> Conversation:
    """A record with `messages`, or with a `prompt` and a `completion` of messages.

    Assistant turns in a prompt have no weight.

    Raises:
        DataError: tools, or the arguments of a tool call, cannot be read.
    """
    asked = record.get("prompt") or []
    said = record.get("messages") or record["completion"]
    turns = [_turn(t, f"{where}: message {n}") for n, t in enumerate([*asked, *said], start=1)]
    weights = [float(turn.pop(WEIGHT, 1)) * (n >= len(asked)) for n, turn in enumerate(turns)]
    tools = record.get("tools")
    options = {
        "tools": (parsed(tools, f"{where}: tools") if isinstance(tools, str) else tools) or None,
        **(record.get("chat_template_kwargs") or {}),
    }
    return Conversation(turns, options, weights, len(asked))


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
    function = call.get("function") or {}
    if not isinstance(function, Mapping):
        raise DataError(
            f"{where} has a tool call whose function is {shown(function)}; it must be a mapping of "
            f"name and arguments"
        )
    function = dict(function)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function["arguments"] = parsed(arguments, f"{where}: arguments of a tool call")
    elif isinstance(arguments, Mapping) and None in arguments.values():
        raise DataError(
            f"{where} has a tool call with arguments {dict(arguments)}; a table fills them up with "
            f"nothing where other calls have more. Write arguments as one JSON string, or the data "
            f"as .jsonl"
        )
    return {**{k: v for k, v in call.items() if v is not None}, "function": function}
