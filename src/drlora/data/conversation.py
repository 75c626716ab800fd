"""A conversation to token ids, with loss on the assistant's turns and on the token that ends each.

The tokenizer's chat template does the rendering; this module says which of its tokens are learned,
and refuses what the template would leave out: a turn whose text is gone, a key that it does not
read, a role that it does not know.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from drlora.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message that carry something to learn from; whatever else there is counts as a note.
CONTENT_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
WEIGHT = "weight"  # 0 on an assistant's turn: no loss on it

Turn = Mapping[str, Any]


def encode_conversation(
    messages: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and on which of them there is loss.

    Args:
        messages: turns, each with role and content; the assistant's may have `weight: 0`.
        tokenizer: has a chat template and an end-of-sequence token.
        where: which record it is, for messages.

    Raises:
        DataError: the template cannot render the conversation, or would leave a part of it out.
    """
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    _refuse_odd_turns(turns, where)
    weights = [turn.pop(WEIGHT, 1) for turn in turns]
    try:
        text = render(turns, tokenizer)
        _refuse_unread_keys(turns, text, tokenizer)
        ids, spans = _spans(turns, text, tokenizer)
        _refuse_lost_text(turns, text, [_read(ids[a:b], tokenizer) for a, b in spans])
        spans = [(a, _through_stop(ids, b, tokenizer)) for a, b in spans]
    except (jinja2.TemplateError, DataError) as error:
        raise DataError(f"{where}: the chat template cannot be used on it: {error}") from error
    learned = _weighed(turns, spans, weights, where)
    if turns[-1]["role"] == "assistant" and learned[-1:] == spans[-1:]:
        first, end = spans[-1]
        if not _ends_with_stop(ids[first:end], tokenizer):
            ids, learned[-1] = [*ids, _eos(tokenizer)], (first, len(ids) + 1)
    is_target = [False] * len(ids)
    for first, end in learned:
        is_target[first:end] = [True] * (end - first)
    return ids, is_target


def render(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    """The text that the chat template makes of some turns."""
    text = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(text, str)
    return text


def notes_of(messages: Iterable[Turn]) -> set[str]:
    """Keys that are neither part of a turn nor content: what is read by nobody."""
    known = {"role", "content", "name", "tool_call_id", WEIGHT, *CONTENT_KEYS}
    return {k for turn in messages for k, value in turn.items() if value is not None} - known


def _refuse_odd_turns(turns: Sequence[Turn], where: str) -> None:
    for number, turn in enumerate(turns, start=1):
        if turn["role"] not in ROLES:
            raise DataError(
                f"{where}: message {number} has the role {turn['role']!r}; known are "
                f"{', '.join(ROLES)}. Rename it, for example human to user and gpt to assistant"
            )
        for call in turn.get("tool_calls") or ():
            arguments = (call.get("function") or {}).get("arguments")
            if isinstance(arguments, Mapping) and None in arguments.values():
                raise DataError(
                    f"{where}: a tool call in message {number} has arguments {dict(arguments)}; a "
                    f"table fills them up with nothing where other calls have more. Write "
                    f"arguments as one JSON string, or the data as .jsonl"
                )
        weight = turn.get(WEIGHT, 1)
        if weight not in (0, 1):
            raise DataError(
                f"{where}: message {number} has weight {weight!r}; 0 (no loss) and 1 are known"
            )


def _refuse_unread_keys(
    turns: Sequence[Turn], text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A key is read if the text is another one without it."""
    for key in {key for turn in turns for key in turn if key in CONTENT_KEYS}:
        without = [{k: v for k, v in turn.items() if k != key} for turn in turns]
        if render(without, tokenizer) == text:
            raise DataError(
                f"it does not read {key!r}, so what the messages have there would not be learned; "
                f"remove the key, or use a template that reads it"
            )


def _refuse_lost_text(turns: Sequence[Turn], text: str, answers: Sequence[str]) -> None:
    """Every turn must be in the text, and the assistant's in what is learned.

    Thoughts of earlier turns need not be: templates that know of thoughts leave those out.
    """
    if not answers and any(turn["role"] == "assistant" for turn in turns):
        raise DataError("it marks no token as the assistant's")
    last_asked = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    waiting = list(answers)
    for number, turn in enumerate(turns):
        parts = [turn["content"]]
        place = text
        if turn["role"] == "assistant":
            place = waiting.pop(0) if waiting else text
            parts = re.split("</?think>", turn["content"])[0 if number > last_asked else -1 :]
        if any(_squeezed(part) not in _squeezed(place) for part in parts):
            raise DataError(
                f"it leaves out text of message {number + 1} (of the {turn['role']}); use another "
                f"template, or write the message as it expects"
            )


def _squeezed(text: str) -> str:
    """Without white space, which templates trim and tokenizers may change."""
    return "".join(text.split())


def _spans(
    turns: Sequence[Turn], text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and for each assistant's turn its first token and the one after its last."""
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\s*-?%\}", template) is None:
        return _prefixed_spans(turns, text, tokenizer)
    encoded: Any = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marks = list(enumerate(encoded["assistant_masks"]))
    runs = [list(run) for mark, run in groupby(marks, key=lambda pair: bool(pair[1])) if mark]
    return list(encoded["input_ids"]), [(run[0][0], run[-1][0] + 1) for run in runs]


def _prefixed_spans(
    turns: Sequence[Turn], text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """An assistant's turn is what it adds to the conversation before it."""
    ids, spans = _plain(text, tokenizer), []
    for before, through in _assistant_prefixes(turns, tokenizer):
        if not text.startswith(through):
            raise DataError(
                "it changes earlier turns, so the assistant's cannot be told apart; mark them in "
                "the template with {% generation %}, or give each conversation one assistant turn, "
                "its last"
            )
        first = common_length(_plain(before, tokenizer), ids)
        spans.append((first, common_length(_plain(through, tokenizer), ids)))
    return ids, spans


def _assistant_prefixes(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str]]:
    """For each assistant turn, the conversation up to where it starts, and to its end."""
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            # Templates look at the first message, so none can be rendered without one.
            before = render(turns[:index], tokenizer, True) if index else ""
            yield before, render(turns[: index + 1], tokenizer)


def _through_stop(ids: Sequence[int], end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The end of a turn, after the end-of-sequence token where that follows it directly."""
    return end + 1 if end < len(ids) and ids[end] == _eos(tokenizer) else end


def _ends_with_stop(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a special token, after which white space may follow, closes the turn."""
    special = {*tokenizer.all_special_ids, _eos(tokenizer)}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = next((i for i in reversed(ids) if i in special or _read([i], tokenizer).strip()), None)
    return last in special


def _weighed(
    turns: Sequence[Turn],
    spans: Sequence[tuple[int, int]],
    weights: Sequence[float],
    where: str,
) -> list[tuple[int, int]]:
    """The spans of turns whose weight is not 0."""
    own = [w for turn, w in zip(turns, weights, strict=True) if turn["role"] == "assistant"]
    if all(own):
        return list(spans)
    if len(own) != len(spans):
        raise DataError(
            f"{where}: weight: 0 cannot be followed, for the chat template marks {len(spans)} "
            f"parts as the assistant's where the conversation has {len(own)} turns of it"
        )
    return [span for span, weight in zip(spans, own, strict=True) if weight]


def _read(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    assert tokenizer.eos_token_id is not None
    return int(tokenizer.eos_token_id)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix; a token merged across the border counts to the later part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
