"""The examples of a run as its trainer takes them, and as they are measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import pack_dataset

from drlora.data import encode_examples
from drlora.data.encode import EncodedData, Examples
from drlora.trainer.objectives import objective_of
from drlora.trainer.preferences import lengths, tokenize, wanted_answers


def encode(
    raw: Dataset,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    arguments: TrainingArguments,
) -> Examples:
    """Token ids of `raw`, at most `max_length` of them an example; packed, where that is asked for.

    Args:
        raw: the examples.
        role: `train` or `eval`; only training examples are packed.
        tokenizer: of the model.
        objective: of the recipe.
        arguments: of its trainer.

    Raises:
        DataError: if no example has a token to learn.
    """
    settings, kind = cast(Any, arguments), objective_of(objective)
    if kind.compares:
        tokens, cut = tokenize(kind.trl, raw, tokenizer, arguments, role)
        return Examples(raw, EncodedData(tokens, len(raw) - len(tokens), cut))
    found = encode_examples(raw, tokenizer, settings.max_length)
    if not settings.packing or role != "train":
        return Examples(raw, found)
    packed = pack_dataset(found.dataset, settings.max_length, settings.packing_strategy)
    return Examples(raw, replace(found, dataset=packed))


def examples_to_measure(held_out: Examples, objective: str, max_length: int) -> Examples:
    """What loss and exact match are measured on: of preferences the answers that are wanted."""
    if not objective_of(objective).compares:
        return held_out
    raw, tokens = wanted_answers(held_out.raw, held_out.encoded.dataset, max_length)
    return Examples(raw, EncodedData(tokens, 0, 0))


def longest_of(examples: Examples) -> int:
    """Tokens of the longest example, or of both answers of the longest pair."""
    tokens = examples.encoded.dataset
    if "input_ids" in tokens.column_names:
        return max(map(len, tokens["input_ids"]))
    return max(lengths(tokens)) * (2 if "chosen_ids" in tokens.column_names else 1)
