"""The examples of a run as its trainer takes them, and as they are measured."""

from __future__ import annotations

from typing import Any, cast

from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import GRPOConfig

from drlora.data import Loaded, Prepared, prepare
from drlora.data.tokens import PlainSettings, refuse_missing_template
from drlora.data.turns import refused_as_data
from drlora.errors import DataError
from drlora.runs.recipe import Recipe
from drlora.trainer.grpo import questions, refuse_few
from drlora.trainer.objectives import objective_of
from drlora.trainer.preferences import lengths, tokenize, wanted_answers


def encode(
    loaded: Loaded,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    arguments: TrainingArguments,
) -> Prepared:
    """Token ids of examples, each at most `max_length` long; packed where that is asked for.

    Args:
        loaded: the examples.
        role: `train` or `eval`; only training examples are packed.
        tokenizer: of the model.
        recipe: names the objective, and the chat template if it is not the tokenizer's own.
        arguments: of its trainer.

    Raises:
        DataError: if no example has a token to learn, or the objective learns from other columns.
    """
    settings, raw, objective = cast(Any, arguments), loaded.rows, recipe.objective
    kind = objective_of(objective)
    is_fit = any(set(columns) <= set(raw.column_names) for columns in kind.columns)
    if not is_fit:
        wanted = ", or ".join(" and ".join(columns) for columns in kind.columns)
        raise DataError(
            f"objective={objective!r} learns from {wanted}; {loaded.name} "
            f"has {sorted(raw.column_names)}. Name other data, or another objective."
        )
    if not kind.compares and "label" in raw.column_names:
        raise DataError(
            f"{loaded.name} has the column label, which says what answers "
            f"are good; objective='sft' would learn from the others too. Take objective: kto, or "
            f"keep the good ones and leave the column out."
        )
    if not kind.compares:
        return prepare(
            loaded,
            tokenizer,
            settings,
            packing=settings.packing and role == "train",
            template_file=recipe.chat_template,
        )
    refuse_missing_template(raw, tokenizer)
    if kind.tries:
        with refused_as_data(loaded.name):
            rows = questions(raw, tokenizer, settings, settings.max_length)
        if role == "train":
            refuse_few(len(rows), settings)
        return Prepared(raw, rows, len(raw) - len(rows), 0, loaded.said)
    with refused_as_data(loaded.name):
        tokens, cut = tokenize(kind.trl, raw, tokenizer, arguments, role)
    return Prepared(raw, tokens, len(raw) - len(tokens), cut, loaded.said)


def examples_to_measure(
    held_out: Prepared, objective: str, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Prepared:
    """What loss and exact match are measured on: of preferences the answers that are wanted."""
    if not objective_of(objective).compares:
        return held_out
    if objective_of(objective).tries:
        return prepare(held_out.raw, tokenizer, PlainSettings(max_length=max_length))
    raw, tokens = wanted_answers(held_out.raw, held_out.tokens, max_length)
    return Prepared(raw, tokens, 0, 0, held_out.said)


def longest_of(examples: Prepared, arguments: TrainingArguments) -> int:
    """Tokens of the longest example, or of both answers of the longest pair."""
    tokens = examples.tokens
    if isinstance(arguments, GRPOConfig):
        return max(map(len, tokens["prompt_ids"])) + (arguments.max_completion_length or 0)
    if "input_ids" in tokens.column_names:
        return max(map(len, tokens["input_ids"]))
    return max(lengths(tokens)) * (2 if "chosen_ids" in tokens.column_names else 1)
