"""Texts to token ids and labels, many at a time: a tokenizer takes a fifth of the time for that."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from drlora.errors import DataError

IGNORED = -100
Tokens = tuple[list[int], list[int]]
"""Token ids and labels of one example, equally long."""


def encode_completions(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """Token ids of both and the end-of-sequence token, with loss on all but the prompt.

    Both are tokenized together; a token across the border counts to the completion.
    """
    heads = tokenizer(list(prompts))["input_ids"]
    texts = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
    encoded = []
    for head, ids in zip(heads, whole(texts, tokenizer), strict=True):
        first = common_prefix_length(head, ids)
        encoded.append((ids, [IGNORED] * first + ids[first:]))
    return encoded


def whole(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts, each with one end-of-sequence token after it."""
    eos, end = eos_token_id(tokenizer), str(tokenizer.eos_token)
    ended = [text if text.endswith(end) else text + end for text in texts]
    rows = [list(ids) for ids in tokenizer(ended)["input_ids"]]
    # Some tokenizers put one after every text by themselves.
    return [ids[:-1] if ids[-2:] == [eos, eos] else ids for ids in rows]


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-sequence token.

    Raises:
        DataError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; "
            f"set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, or the end of sequence where it has none."""
    pad = tokenizer.pad_token_id
    return eos_token_id(tokenizer) if pad is None else int(pad)
