"""What is to be measured on held-out data: said, and refused where it cannot be, beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from drlora.data.formats import PLACES
from drlora.data.tokens import Prepared
from drlora.errors import counted
from drlora.evaluation.choices import refuse_single_choice
from drlora.evaluation.draw import draw
from drlora.evaluation.evaluate import accepted_answers
from drlora.evaluation.measure import EvaluationSection, notes_on, wants_match
from drlora.evaluation.samples import asked_of


def refuse_unanswerable(
    raw: Dataset, section: EvaluationSection, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse held-out examples whose answers could not be compared, before anything is computed.

    And those that the chat template could not ask, of those that would be.

    Raises:
        DataError: naming the first of them.
    """
    rows = draw(raw, section.exact_match_examples, section.draw)
    if wants_match(rows, section):
        for row in rows:
            accepted_answers(row)
            if rows[0].get("choices"):
                refuse_single_choice(row)
    elif section.samples:
        asked_of(list(draw(raw, section.samples, section.draw)), tokenizer)


def word_for_word(train: Dataset, held_out: Dataset) -> int:
    """How many held-out examples are training examples too, whatever file they come from."""
    known = set(contents_of(train))
    return sum(content in known for content in contents_of(held_out))


def contents_of(rows: Dataset) -> Iterator[bytes]:
    """A short hash of each example, its place left out."""
    names = [name for name in sorted(rows.column_names) if name not in PLACES]
    for batch in rows.select_columns(names).iter(1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            text = json.dumps(values, sort_keys=True, default=str)
            yield hashlib.blake2b(text.encode(), digest_size=8).digest()


def measured_on(examples: Prepared, section: EvaluationSection) -> str:
    """`93 examples, 60 answers`: for the loss, and for exact match where it is measured."""
    counts = [len(examples.tokens), len(examples.raw)]
    wanted = [section.loss_examples, section.exact_match_examples]
    loss, match = (min(n, limit or n) for n, limit in zip(counts, wanted, strict=True))
    text = counted(loss, "example")
    rows = draw(examples.raw, section.exact_match_examples, section.draw)
    return f"{text}, {counted(match, 'answer')}" if wants_match(rows, section) else text


def evaluation_notes(examples: Prepared, section: EvaluationSection) -> list[str]:
    """What a measurement will say of what it could not do, for a dry run."""
    rows = draw(examples.raw, section.exact_match_examples, section.draw)
    return list(notes_on(len(examples.tokens), rows, section))
