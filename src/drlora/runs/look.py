"""What a run would be trained on, seen: examples with their trained part marked, and their sizes.

    report = look_at_data(load_recipe("recipe.yaml"))
    report.roles["train"].samples[0].parts  # (("<|user|>hi<|assistant|>", False), ("ho</s>", True))

No weights are read. Every conversation is checked, as training does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from drlora.data.draw import drawn
from drlora.data.roles import load_training_data
from drlora.data.tokens import IGNORED, Prepared
from drlora.runs.held_out import contents_of, word_for_word
from drlora.runs.loading import (
    encode,
    load_architecture,
    load_tokenizer,
    model_on_meta,
    vocabulary_size,
)
from drlora.runs.recipe import Recipe


@dataclass(frozen=True)
class Sample:
    """One example as it is trained.

    Attributes:
        parts: its text in pieces, and whether each is trained.
        tokens: how many it has.
        targets: how many of them are trained.
    """

    parts: tuple[tuple[str, bool], ...]
    tokens: int
    targets: int


@dataclass(frozen=True)
class RoleReport:
    """The examples of one role, train or eval.

    Attributes:
        source: the file or data set.
        said: what it was read as.
        examples: how many were read.
        used: how many are trained or measured on.
        dropped: those without a token to learn within the longest length.
        truncated: those used, but cut.
        duplicates: those that are word for word like an earlier one.
        tokens: of all that are used.
        targets: those of them that are trained.
        lengths: in tokens, the shortest, the median, that of 95 %, and the longest.
        samples: some of them.
    """

    source: str
    said: str
    examples: int
    used: int
    dropped: int
    truncated: int
    duplicates: int
    tokens: int
    targets: int
    lengths: tuple[int, int, int, int]
    samples: tuple[Sample, ...]

    @property
    def share(self) -> float:
        """Of the tokens, those that are trained."""
        return self.targets / self.tokens


@dataclass(frozen=True)
class DataReport:
    """What `look_at_data` found.

    Attributes:
        roles: role -> its examples.
        shared: held-out examples that are training examples too, word for word.
    """

    roles: dict[str, RoleReport]
    shared: int


def look_at_data(recipe: Recipe, samples: int = 3) -> DataReport:
    """Read and tokenize the data of a recipe, and say what it is.

    Args:
        recipe: whose data, tokenizer and lengths are meant.
        samples: examples of each role to show, drawn at random, always the same.

    Raises:
        DrLoraError: as training would refuse it.
    """
    architecture = load_architecture(recipe.model, recipe.trust_remote_code)
    skeleton = model_on_meta(architecture, recipe.trust_remote_code)
    tokenizer = load_tokenizer(recipe, vocabulary_size(skeleton))
    loaded = zip(("train", "eval"), load_training_data(recipe.data), strict=True)
    found = {role: encode(raw, tokenizer, recipe, architecture) for role, raw in loaded}
    roles = {role: _report(one, tokenizer, samples) for role, one in found.items()}
    return DataReport(roles, word_for_word(found["train"].raw, found["eval"].raw))


def _report(found: Prepared, tokenizer: PreTrainedTokenizerBase, samples: int) -> RoleReport:
    rows = found.tokens.with_format("numpy")
    lengths, targets = [], 0
    for batch in rows.iter(1000):
        lengths += [len(ids) for ids in batch["input_ids"]]
        targets += sum(int((labels != IGNORED).sum()) for labels in batch["labels"])
    contents = list(contents_of(found.raw))
    chosen = found.tokens.select(drawn(len(found.tokens), samples))
    return RoleReport(
        source=found.raw.info.description,
        said=found.said,
        examples=len(found.raw),
        used=len(found.tokens),
        dropped=found.dropped,
        truncated=found.truncated,
        duplicates=len(contents) - len(set(contents)),
        tokens=sum(lengths),
        targets=targets,
        lengths=_spread(lengths),
        samples=tuple(_sample(r["input_ids"], r["labels"], tokenizer) for r in chosen),
    )


def _spread(lengths: Sequence[int]) -> tuple[int, int, int, int]:
    low, middle, high, top = np.percentile(lengths, [0, 50, 95, 100], method="higher")
    return int(low), int(middle), int(high), int(top)


def _sample(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Sample:
    pairs = zip(ids, [label != IGNORED for label in labels], strict=True)
    parts = [
        (str(tokenizer.decode([token for token, _ in run])), is_trained)
        for is_trained, run in groupby(pairs, key=lambda pair: pair[1])
    ]
    return Sample(tuple(parts), len(ids), sum(label != IGNORED for label in labels))
