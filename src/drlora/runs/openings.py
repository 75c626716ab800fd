"""Whether a conversation is opened as it was in training when the model is asked: a remark if not.

Some templates open each answer with a thought (`<think>`) when the model is asked, and write
answers without one when they are trained. A model that learned from plain answers is then asked for
something else than it learned.
"""

from __future__ import annotations

from os.path import commonprefix

import jinja2
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from drlora.data.formats import is_conversation
from drlora.data.turns import ChatTemplate, conversation_of
from drlora.errors import DataError


def other_opening(raw: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the template puts before an answer when it is asked for, and not when it is trained.

    Args:
        raw: training examples; the first of them is looked at.
        tokenizer: of the model.

    Returns:
        The text, or None: it is the same, or the examples are no conversations.
    """
    if not is_conversation(raw[0]) or not tokenizer.chat_template:
        return None
    try:
        conversation = conversation_of(raw[0], "the first example")
        turns = conversation.turns
        at = next((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), 0)
        if not at:
            return None
        (asked,) = ChatTemplate(tokenizer, is_marked=False).render(
            [conversation.until(at)], add_generation_prompt=True
        )
        (trained,) = ChatTemplate(tokenizer).render([conversation.until(at + 1)])
    except (DataError, jinja2.TemplateError, TypeError, KeyError):
        return None  # whoever encodes the example says what is wrong with it
    return asked[len(commonprefix([asked, trained])) :] or None


def opening_note(raw: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The same as a sentence."""
    opening = other_opening(raw, tokenizer)
    if opening is None:
        return None
    return (
        f"when the model is asked, the chat template puts {opening!r} before its answer, which the "
        f"answers of the training data do not begin with: it would be asked for what it did not "
        f"learn. Name a template without it (chat_template: FILE), or train on answers that have it"
    )
