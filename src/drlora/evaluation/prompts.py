"""Prompts to a batch that a model continues: open at their end, filled up on the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from drlora.errors import DataError


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, opened as the tokenizer opens a sequence, left open at its end."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer(list(texts))["input_ids"]
    return [ids[:-1] if ids and ids[-1] == eos else list(ids) for ids in encoded]


def pad_left(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 (B, L) each.

    Raises:
        DataError: a row has no token.
    """
    if not all(rows):
        raise DataError("an empty prompt has no token to continue from; give each example a prompt")
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
