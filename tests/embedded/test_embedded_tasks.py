"""The tasks the package carries: size, columns, splits without leaks, licences."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

TASKS_FOLDER = Path(__file__).resolve().parents[2] / "src" / "drlora" / "embedded" / "tasks"
TASKS = ("pronunciation", "definitions", "kinds")
SPLITS = ("train", "dev", "test")
PAIRS = tuple(combinations(SPLITS, 2))
LIMIT_BYTES = 3_000_000
WORDNET_LICENCE = [
    "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.",
    "Permission to use, copy, modify and distribute this software",
    "Princeton University and LICENSEE agrees to preserve same.",
]


@cache
def read_split(task: str, split: str) -> list[dict]:
    lines = (TASKS_FOLDER / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def accepted(example: dict) -> list[str]:
    """The answers of a line; where there is one alone, it is the completion."""
    return example.get("answers", [example["completion"].strip()])


def words(split: str) -> set[str]:
    return {
        example["prompt"].splitlines()[0].removeprefix("word: ")
        for example in read_split("pronunciation", split)
    }


def regular_inflections(word: str) -> Iterator[str]:
    """Written apart from the rules that made the split."""
    endings = ("s", "es", "ed", "ing", "er", "est", "ly")
    yield from (word + ending for ending in endings)
    yield from (word + word[-1] + ending for ending in ("ed", "ing", "er", "est"))
    if word.endswith("e"):
        yield from (word[:-1] + ending for ending in ("ed", "ing", "er", "est"))
    if word.endswith("y"):
        yield from (word[:-1] + ending for ending in ("ies", "ied", "ier", "iest", "ily"))
    if word.endswith("f"):
        yield word[:-1] + "ves"


def test_files_fit():
    sizes = [
        (TASKS_FOLDER / task / f"{split}.jsonl").stat().st_size
        for task in TASKS
        for split in SPLITS
    ]
    assert sum(sizes) <= LIMIT_BYTES


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("split", "least"), [("train", 6_900), ("dev", 500), ("test", 1_000)])
def test_columns_and_size(task, split, least):
    examples = read_split(task, split)
    assert len(examples) >= least
    for example in examples:
        answers = accepted(example)
        assert set(example) <= {"prompt", "completion", "answers"}
        assert example["completion"] == f" {answers[0]}"
        assert len(answers) > 1 or "answers" not in example
        assert len(set(answers)) == len(answers)
        assert all(answer and answer == answer.strip() for answer in answers)
        assert "\n" not in example["completion"]
        assert len(example["prompt"]) <= 100


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_twice(task):
    prompts = [example["prompt"] for split in SPLITS for example in read_split(task, split)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_definition_splits_share_no_lemma(one, other):
    lemmas = [
        {
            answer.lower()
            for example in read_split("definitions", split)
            for answer in accepted(example)
        }
        for split in (one, other)
    ]
    assert lemmas[0].isdisjoint(lemmas[1])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_pronunciation_splits_share_no_inflection(one, other):
    first, second = words(one), words(other)
    for left, right in ((first, second), (second, first)):
        inflected = {form for word in left for form in regular_inflections(word)}
        assert inflected & right == set()


def test_irregular_forms_stay_together():
    pairs = "go went, take took, mouse mice, foot feet, write wrote, bring brought, think thought"
    split_of = {word: split for split in SPLITS for word in words(split)}
    present = [pair for pair in map(str.split, pairs.split(", ")) if split_of.keys() >= set(pair)]
    assert len(present) >= 2
    for base, form in present:
        assert split_of[base] == split_of[form], (base, form)


def test_pronunciations_are_phones_without_stress():
    for split in SPLITS:
        for example in read_split("pronunciation", split):
            assert all(re.fullmatch("[A-Z]{1,2}( [A-Z]{1,2})*", a) for a in accepted(example))


def test_kinds_are_few_and_none_is_most_of_the_test():
    counts = Counter(example["completion"] for example in read_split("kinds", "test"))
    learnt = {example["completion"] for example in read_split("kinds", "train")}
    assert 30 <= len(learnt) <= 40 and counts.keys() <= learnt
    assert counts.most_common(1)[0][1] < 0.15 * counts.total()


@pytest.mark.parametrize(
    ("task", "phrases"),
    [
        (
            "pronunciation",
            [
                "Copyright (C) 1993-2015 Carnegie Mellon University. All rights reserved.",
                "Redistributions in binary form must reproduce the above copyright",
                "POSSIBILITY OF SUCH DAMAGE.",
            ],
        ),
        (
            "definitions",
            WORDNET_LICENCE,
        ),
        ("kinds", WORDNET_LICENCE),
    ],
)
def test_readme_has_the_licence_and_the_true_sizes(task, phrases):
    readme = (TASKS_FOLDER / task / "README.md").read_text(encoding="utf-8")
    for phrase in phrases:
        assert phrase in readme
    for split in SPLITS:
        assert f"| {split} | {len(read_split(task, split))} |" in readme
