"""Examples to token ids with labels, and a list of those to a padded batch.

    encoded = encode_examples(load_examples("data.jsonl"), tokenizer, max_length=512)
    batch = Collator(tokenizer)([encoded.dataset[0], encoded.dataset[1]])

A label is the token itself where there is loss and -100 elsewhere; the model shifts, not we.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from drlora.data.conversation import common_length, encode_conversation, notes_of
from drlora.data.layout import PLACES, Layout, check_record, choose_layout
from drlora.errors import ConfigError, DataError

IGNORED = -100

logger = logging.getLogger(__name__)

Tokens = tuple[list[int], list[int]]
"""Token ids and labels of one example, equally long."""


@dataclass(frozen=True)
class EncodedData:
    """Examples as token ids.

    `dataset` has the columns input_ids and labels (lists of int, equally long). `dropped` counts
    the examples left out because no token with loss was left within `max_length`; `truncated`
    counts those kept, but cut.
    """

    dataset: Dataset
    dropped: int
    truncated: int


@dataclass(frozen=True)
class Examples:
    """Examples as loaded (`raw`) and as token ids (`encoded`)."""

    raw: Dataset
    encoded: EncodedData


def encode_examples(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedData:
    """Tokenize `examples`, a data set as `load_examples` gives it.

    Loss is on the completion and its end-of-sequence token, on the assistant's turns, or on all of
    a text. What is longer than `max_length` tokens loses its end. Dropped and truncated examples
    are counted and logged as a warning.

    Raises:
        ConfigError: `max_length` is below 2.
        DataError: a record is malformed, the tokenizer lacks what the examples need (an
            end-of-sequence token, a chat template), or every example would be dropped.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; it must be at least 2")
    layout = choose_layout(examples.column_names, None, "the data set")
    _check_tokenizer(tokenizer, layout)
    _report_notes(examples, layout)
    encoded = examples.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "layout": layout,
            "max_length": max_length,
            "name": examples.info.description,
        },
        remove_columns=examples.column_names,
        load_from_cache_file=False,  # its key does not see a change in this file
        desc="Tokenizing",
    )
    kept = encoded.select([row for row, has in enumerate(encoded["has_target"]) if has])
    dropped, truncated = len(encoded) - len(kept), sum(kept["is_truncated"])
    _report(len(encoded), dropped, truncated, max_length)
    return EncodedData(kept.select_columns(["input_ids", "labels"]), dropped, truncated)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
    _eos(tokenizer)
    if layout.form == "messages" and not tokenizer.chat_template:
        raise DataError(
            f"the data has messages, but the tokenizer {tokenizer.name_or_path!r} has no chat "
            f"template; use the tokenizer of an instruction-tuned model, set "
            f"tokenizer.chat_template, or use prompt and completion columns"
        )


def _report_notes(examples: Dataset, layout: Layout) -> None:
    if layout.form == "messages":
        notes = {key for turns in examples["messages"] if turns for key in notes_of(turns)}
        if notes:
            logger.warning("not used: %s of the messages", ", ".join(sorted(notes)))


def _report(total: int, dropped: int, truncated: int, max_length: int) -> None:
    if dropped == total:
        raise DataError(
            f"all {total} examples have no token to learn within max_length={max_length}; raise "
            f"max_length (or, for messages, see that there are assistant turns)"
        )
    if dropped:
        logger.warning(
            "%d of %d examples left out: no token to learn within max_length=%d",
            dropped,
            total,
            max_length,
        )
    if truncated:
        logger.warning("%d of %d examples cut at max_length=%d", truncated, total, max_length)


def _encode_batch(
    records: Mapping[str, list],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    max_length: int,
    name: str = "",
) -> dict[str, list]:
    """Columns of token ids; many texts at once cost the tokenizer a fifth of one at a time."""
    names = _places(records, indices, name)
    for row, where in enumerate(names):
        check_record({key: column[row] for key, column in records.items()}, layout, where)
    if layout.form == "completion":
        encoded = encode_completions(records["prompt"], records["completion"], tokenizer)
    elif layout.form == "messages":
        conversations = zip(records["messages"], names, strict=True)
        encoded = [_encode_messages(turns, tokenizer, where) for turns, where in conversations]
    else:
        texts = [_with_eos(ids, tokenizer) for ids in encode_prompts(records["text"], tokenizer)]
        encoded = [(ids, ids) for ids in texts]
    kept = [labels[:max_length] for _, labels in encoded]
    return {
        "input_ids": [ids[:max_length] for ids, _ in encoded],
        "labels": kept,
        "has_target": [any(label != IGNORED for label in labels) for labels in kept],
        "is_truncated": [len(ids) > max_length for ids, _ in encoded],
    }


def _places(records: Mapping[str, list], indices: Sequence[int], name: str) -> list[str]:
    """`data.jsonl, line 61` for each record, as far as the data set says where it comes from."""
    place = next((place for place in PLACES if place in records), "")
    if not place:
        return [f"example {index + 1}" for index in indices]
    return [f"{name}, {place} {number}" for number in records[place]]


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, opened as the tokenizer opens a sequence, left open at its end."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer(list(texts))["input_ids"]
    return [ids[:-1] if ids and ids[-1] == eos else list(ids) for ids in encoded]


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*ids, _eos(tokenizer)]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; "
            f"set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def encode_completions(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """Token ids of both and the end-of-sequence token, with loss on all but the prompt.

    Prompt and completion are tokenized apart, as they are when the model has to answer. A tokenizer
    that puts something before every text would change the text so; there they are tokenized
    together, and a token across the border counts to the completion.
    """
    heads = encode_prompts(prompts, tokenizer)
    if _keeps_text_apart(tokenizer):
        answers = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        tails = [_with_eos(ids, tokenizer) for ids in answers]
        return [
            (head + tail, [IGNORED] * len(head) + tail)
            for head, tail in zip(heads, tails, strict=True)
        ]
    texts = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
    wholes = [_with_eos(ids, tokenizer) for ids in encode_prompts(texts, tokenizer)]
    firsts = [common_length(head, whole) for head, whole in zip(heads, wholes, strict=True)]
    return [
        (whole, [IGNORED] * first + whole[first:])
        for first, whole in zip(firsts, wholes, strict=True)
    ]


def _keeps_text_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether two texts, tokenized one by one, read as the one text that they make."""
    parts: list[list[int]] = tokenizer(["x", "y"], add_special_tokens=False)["input_ids"]
    return "xy" in tokenizer.decode([*parts[0], *parts[1]])


def _encode_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> Tokens:
    ids, is_target = encode_conversation(messages, tokenizer, where)
    labels = [token if target else IGNORED for token, target in zip(ids, is_target, strict=True)]
    return ids, labels


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, or the end of sequence where it has none."""
    return _eos(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to the longest of them."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` (1 on tokens) and `labels` (-100 on padding).

        Args:
            features: B examples with `input_ids` and `labels`, each up to L tokens.

        Returns:
            Three int64 tensors of shape (B, L).
        """
        ids = [feature["input_ids"] for feature in features]
        return {
            "input_ids": _pad(ids, pad_token_id(self.tokenizer)),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0),
            "labels": _pad([feature["labels"] for feature in features], IGNORED),
        }


def _pad(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    padded = [[*row, *[filler] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)
