"""A list of examples to a padded batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from drlora.data.tokens import IGNORED, eos_token_id


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, or the end of sequence where it has none."""
    pad = tokenizer.pad_token_id
    return eos_token_id(tokenizer) if pad is None else int(pad)


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
