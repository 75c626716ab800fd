"""Conversations to token ids and labels: each of the assistant's turns with its end, verified.

A chat template may drop a turn, mark another one's or leave out the token that ends a turn, all
without a word. So the tokens are decoded again and compared with the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from drlora.data.formats import CONTENT_KEYS
from drlora.data.texts import IGNORED, Tokens, eos_token_id
from drlora.data.turns import (
    TEMPLATE_ERRORS,
    ChatTemplate,
    Conversation,
    Marked,
    Span,
    Turn,
)
from drlora.errors import DataError

_THOUGHTS = re.compile("</?think>")


def learn(conversations: Sequence[Conversation], template: ChatTemplate) -> list[Tokens]:
    """Token ids and labels of each, verified.

    Raises:
        DataError: the template cannot be used on one of them; which one is not said.
    """
    rows = template.encode(conversations)
    if template.is_marked:
        pairs = zip(conversations, rows, strict=True)
        rows = [_ended(one, *marked, template) for one, marked in pairs]
    # Of each kind one says what the template reads.
    for one in {kind(one): one for one in reversed(conversations)}.values():
        refuse_unread(one, template)
    if not template.is_marked:
        return [(ids, ids) for ids, _ in rows]
    found = []
    opened = template.opened(conversations, rows)
    for one, (ids, spans), start in zip(conversations, rows, opened, strict=True):
        verify(one, ids, spans, template)
        labels = [IGNORED] * len(ids)
        for first, end in _weighed(one, spans):
            first = max(first, start)
            labels[first:end] = ids[first:end]
        found.append((ids, labels))
    return found


def _ended(
    conversation: Conversation, ids: list[int], spans: list[Span], template: ChatTemplate
) -> Marked:
    """Each turn with the end-of-sequence token that follows it, the last with one in any case."""
    eos = eos_token_id(template.tokenizer)
    spans = [(a, b + 1 if b < len(ids) and ids[b] == eos else b) for a, b in spans]
    if spans and conversation.turns[-1]["role"] == "assistant":
        first, end = spans[-1]
        if not ends_with_stop(ids[first:end], template):
            return [*ids[:end], eos], [*spans[:-1], (first, end + 1)]
    return ids, spans


def _weighed(conversation: Conversation, spans: Sequence[Span]) -> list[Span]:
    """The spans of turns whose weight is not 0."""
    pairs = zip(conversation.turns, conversation.weights, strict=True)
    own = [weight for turn, weight in pairs if turn["role"] == "assistant"]
    if all(own):
        return list(spans)
    if len(own) != len(spans):
        raise DataError(
            f"weight: 0 cannot be followed, for it marks {len(spans)} parts as the assistant's "
            f"where the conversation has {len(own)} turns of it"
        )
    return [span for span, weight in zip(spans, own, strict=True) if weight]


def verify(
    conversation: Conversation, ids: Sequence[int], spans: Sequence[Span], template: ChatTemplate
) -> None:
    """Refuse a conversation of which something else is trained than what the assistant says.

    Args:
        conversation: as the template was given it.
        ids: its token ids.
        spans: of them, those with loss, weights apart.
        template: that made them.

    Raises:
        DataError: saying what is left out, taken in, or not ended.
    """
    turns = conversation.turns
    if not spans and any(turn["role"] == "assistant" for turn in turns):
        raise DataError("it marks no token as the assistant's")
    trained, other = _decoded(ids, spans, template)
    at = {"trained": 0, "other": 0}
    last_asked = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    for number, turn in enumerate(turns):
        side = "trained" if turn["role"] == "assistant" else "other"
        text = trained if side == "trained" else other
        ends = [at[side]]
        for part in _parts(turn, number > last_asked):
            found = _find(part, text, at[side])
            if found is None:
                raise DataError(_lost(turn, number, part, trained, other))
            ends.append(found)
        at[side] = max(ends)
    for first, end in spans:
        if not ends_with_stop(ids[first:end], template):
            raise DataError(
                f"it ends {_read(ids[first:end], template)[-40:]!r} with no special token, so the "
                f"model would not learn to stop; end the assistant's turns with the tokenizer's "
                f"end-of-sequence token in a template of your own (chat_template: FILE)"
            )


def refuse_unread(conversation: Conversation, template: ChatTemplate) -> None:
    """Refuse keys and tools that the template does not read: the text is the same without them.

    Raises:
        DataError: naming the first of them.
    """
    (text,) = template.render([conversation])
    turns, options = conversation.turns, conversation.options
    for key in sorted({key for turn in turns for key in turn if key in CONTENT_KEYS}):
        without = [{k: v for k, v in turn.items() if k != key} for turn in turns]
        _refuse_same(Conversation(without, options), text, f"{key!r} of the messages", template)
    if options.get("tools"):
        _refuse_same(Conversation(turns, {**options, "tools": None}), text, "'tools'", template)


def _refuse_same(without: Conversation, text: str, what: str, template: ChatTemplate) -> None:
    try:
        (found,) = template.render([without])
    except TEMPLATE_ERRORS:  # it is missed, so it is read
        return
    if found == text:
        raise DataError(
            f"it does not read {what}, so what stands there would not be learned; remove it, or "
            f"use a template that reads it (chat_template: FILE)"
        )


def ends_with_stop(ids: Sequence[int], template: ChatTemplate) -> bool:
    """Whether a special token, after which white space may follow, closes the turn."""
    special = template.special_ids
    last = next((i for i in reversed(ids) if i in special or not template.is_blank(i)), None)
    return last in special


def kind(conversation: Conversation) -> frozenset[tuple[str, str]]:
    """What of its template a conversation uses: the keys of each role, and its options."""
    keys = {(t["role"], key) for t in conversation.turns for key in t if key in CONTENT_KEYS}
    return frozenset(keys | {("", name) for name, value in conversation.options.items() if value})


def _parts(turn: Turn, is_last: bool) -> Iterator[str]:
    """The texts of a turn that must be found; thoughts of earlier turns may be left out."""
    content = turn["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    if turn["role"] != "assistant":
        yield content
        return
    if is_last:
        yield from (str(turn[k]) for k in CONTENT_KEYS[1:] if k in turn)
    yield from _THOUGHTS.split(content)[0 if is_last else -1 :]
    yield from (call["function"]["name"] for call in turn.get("tool_calls", ()))


def _find(part: str, text: str, start: int) -> int | None:
    """The end of `part` in `text`, as it is or as JSON writes it; white space does not count."""
    for form in (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]):
        wanted = _squeezed(form)
        at = text.find(wanted, start)
        if at >= 0:
            return at + len(wanted)
    return None


def _lost(turn: Turn, number: int, part: str, trained: str, other: str) -> str:
    """Why a part of a turn is not where it should be."""
    is_assistant = turn["role"] == "assistant"
    if _find(part, other if is_assistant else trained, 0) is not None:
        wrong = "does not train" if is_assistant else "trains"
    else:
        wrong = "leaves out"
    return (
        f"it {wrong} text of message {number + 1} (of the {turn['role']}); use another template "
        f"(chat_template: FILE), or write the message as it expects"
    )


def _squeezed(text: str) -> str:
    """Without white space, which templates trim and tokenizers may change."""
    return "".join(text.split())


def _decoded(ids: Sequence[int], spans: Sequence[Span], template: ChatTemplate) -> tuple[str, str]:
    """What is trained and what is not, as text without white space."""
    trained: list[int] = []
    other: list[int] = []
    at = 0
    for first, end in spans:
        other += ids[at:first]
        trained += ids[first:end]
        at = end
    other += ids[at:]
    return _squeezed(_read(trained, template)), _squeezed(_read(other, template))


def _read(ids: Sequence[int], template: ChatTemplate) -> str:
    text = template.tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text
