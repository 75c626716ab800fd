"""What a run would learn from: examples with their trained part marked, and figures on all of them.

    found = look_at_data(load_recipe("own.yaml"))
    print(found.roles[0].trained_share, found.roles[0].shown[0].parts)

Tokens are those that the trainer would be given, so a template that marks the wrong part, an answer
without its end and a text that is cut are seen here before anything is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from drlora.data.formats import PLACES
from drlora.data.texts import IGNORED
from drlora.data.tokens import Prepared
from drlora.errors import ConfigError, counted
from drlora.evaluation.draw import drawn
from drlora.runs.arguments import settle, training_arguments
from drlora.runs.examples import encode
from drlora.runs.held_out import word_for_word
from drlora.runs.loading import (
    fit_tokenizer,
    load_architecture,
    load_tokenizer,
    longest_example,
    model_on_meta,
    vocabulary_size,
)
from drlora.runs.recipe import Recipe
from drlora.runs.roles import load_training_data
from drlora.runs.rundir import RunDir
from drlora.trainer.preferences import ANSWERS, PROMPT

EXAMPLES_SHOWN = 3
_BATCH = 1000


@dataclass(frozen=True)
class Part:
    """A stretch of an example, and whether it is learned."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class Example:
    """One example as the trainer gets it.

    Attributes:
        where: `line 61`, where that is known.
        tokens: in all.
        trained: those with loss.
        parts: the whole example, in order.
    """

    where: str | None
    tokens: int
    trained: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Lengths:
    """Of examples, in tokens."""

    shortest: int
    median: int
    mean: float
    of_95_percent: int
    longest: int


@dataclass(frozen=True)
class RoleReport:
    """The examples of a role (train, eval).

    Attributes:
        role: which.
        source: where they come from, as the recipe says.
        said: what they were read as.
        examples: that are used.
        rows: that they were put into: as many, or fewer where they are packed.
        dropped: left out, for no token with loss was within the longest length.
        truncated: used, but cut.
        duplicates: used examples with the same tokens as one before them.
        tokens: of those used.
        trained: of them those with loss.
        lengths: None where there are no examples.
        shown: a few of them, drawn at random, always the same ones.
    """

    role: str
    source: str
    said: str
    examples: int
    rows: int
    dropped: int
    truncated: int
    duplicates: int
    tokens: int
    trained: int
    lengths: Lengths
    shown: tuple[Example, ...]

    @property
    def trained_share(self) -> float:
        """Share of the tokens that have loss, 0 to 1."""
        return self.trained / self.tokens


@dataclass(frozen=True)
class DataReport:
    """What a run would learn from, role by role.

    Attributes:
        max_length: longest example, in tokens.
        roles: train and eval.
        notes: what the roles have in common.
    """

    max_length: int
    roles: tuple[RoleReport, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = asdict(self)
        for plain, role in zip(found["roles"], self.roles, strict=True):
            plain["trained_share"] = role.trained_share
        return found


def look_at_data(recipe: Recipe, examples: int = EXAMPLES_SHOWN) -> DataReport:
    """Read and encode the data of a recipe, as `train` would, and describe it.

    Args:
        recipe: names model and data; whether its plan of growth fits is not asked.
        examples: how many of each role to show, at least 0.

    Raises:
        DrLoraError: what `train` would refuse of the data.
    """
    if examples < 0:
        raise ConfigError(f"examples={examples} must be at least 0.")
    arguments = training_arguments(recipe, RunDir(Path(recipe.output_dir)))
    architecture = load_architecture(recipe.model, recipe.trust_remote_code)
    skeleton = model_on_meta(architecture, recipe.trust_remote_code)
    tokenizer = load_tokenizer(recipe, vocabulary_size(skeleton))
    fit_tokenizer(tokenizer, recipe, getattr(arguments, "eos_token", None))
    longest = longest_example(recipe.data, recipe.model, architecture)
    settle(arguments, architecture, longest)
    found = {
        role: encode(loaded, role, tokenizer, recipe, arguments)
        for role, loaded in zip(("train", "eval"), load_training_data(recipe.data), strict=True)
    }
    roles = (_role(recipe, role, one, tokenizer, examples) for role, one in found.items())
    return DataReport(longest, tuple(roles), tuple(_notes(found)))


def _notes(found: dict[str, Prepared]) -> Iterator[str]:
    held_out = found["eval"].raw
    shared = word_for_word(found["train"].raw, held_out)
    if shared:
        yield (
            f"{shared:,} of the {counted(len(held_out), 'held-out example')} can be found in the "
            f"training data word for word"
        )


def _role(
    recipe: Recipe, role: str, examples: Prepared, tokenizer: PreTrainedTokenizerBase, wanted: int
) -> RoleReport:
    rows, raw = examples.tokens, examples.raw
    lengths_N, trained, duplicates = _figures(rows)
    source, split = recipe.data.source(role)
    return RoleReport(
        role,
        f"{_named(source)}, split {split}",
        examples.said,
        len(lengths_N),
        len(rows),
        examples.dropped,
        examples.truncated,
        duplicates,
        int(lengths_N.sum()),
        trained,
        Lengths(
            int(lengths_N.min()),
            int(np.median(lengths_N)),
            float(lengths_N.mean()),
            int(np.percentile(lengths_N, 95)),
            int(lengths_N.max()),
        ),
        tuple(
            _example(rows[row], tokenizer, _place(raw, rows, row))
            for row in drawn(len(rows), wanted)
        ),
    )


def _figures(rows: Dataset) -> tuple[np.ndarray, int, int]:
    """Tokens of each of N examples, int64 (N,); those with loss in all; repeated examples."""
    lengths: list[int] = []
    trained, seen = 0, set()
    for batch in rows.iter(_BATCH):
        assert isinstance(batch, dict)
        for row in _rows_of(batch):
            ids, is_trained = tokens_of(row)
            trained += sum(is_trained)
            ends = itertools.accumulate(row.get("seq_lengths", [len(ids)]), initial=0)
            for first, end in itertools.pairwise(ends):
                lengths.append(end - first)
                seen.add(hash(tuple(ids[first:end])))
    return np.array(lengths), trained, len(lengths) - len(seen)


def _rows_of(batch: dict[str, list]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def tokens_of(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Token ids of an example, and on which of them there is loss.

    Args:
        row: has input_ids and labels; or, of a preference, prompt_ids and the ids of answers, each
            of which is learned from.
    """
    if "labels" in row:
        return list(row["input_ids"]), [label != IGNORED for label in row["labels"]]
    parts = [name for name in (PROMPT, *ANSWERS) if name in row]  # TRL's KTO has others beside
    ids = [token for name in parts for token in row[name]]
    return ids, [name != PROMPT for name in parts for _ in row[name]]


def _named(source: Any) -> str:
    """One source, or the parts of a mix with their weights."""
    if isinstance(source, str):
        return source
    parts = (path if weight is None else f"{path} ({weight:g})" for path, weight in source)
    return " + ".join(parts)


def _example(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str | None) -> Example:
    ids, is_trained = tokens_of(row)
    return Example(where, len(ids), sum(is_trained), tuple(_parts(ids, is_trained, tokenizer)))


def _parts(
    ids: Sequence[int], is_trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Part]:
    pairs = zip(ids, is_trained, strict=True)
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        yield Part(text, trained)


def _place(raw: Dataset, rows: Dataset, row: int) -> str | None:
    """Known where each example became one row, in order."""
    if len(raw) != len(rows) or "seq_lengths" in rows.column_names:
        return None
    found = {name: raw[row][name] for name in PLACES if name in raw.column_names}
    file = f"{found.pop('file')}, " if "file" in found else ""
    return next((f"{file}{name} {number}" for name, number in found.items()), None)


def summary(role: RoleReport) -> list[str]:
    """The figures of a role, in sentences."""
    left_out = f", {role.dropped:,} left out" if role.dropped else ""
    packed = f", packed to {counted(role.rows, 'row')}" if role.rows != role.examples else ""
    repeated = f", {counted(role.duplicates, 'duplicate')}" if role.duplicates else ""
    at = role.lengths
    return [
        *([role.said] if role.said else []),
        f"{counted(role.examples, 'example')}{left_out}, {role.truncated:,} cut{repeated}{packed}",
        f"{role.tokens:,} tokens, {role.trained:,} of them trained ({role.trained_share:.1%})",
        f"{at.shortest:,} to {at.longest:,} tokens an example: median {at.median:,}, mean "
        f"{at.mean:,.1f}, 95 % up to {at.of_95_percent:,}",
    ]
