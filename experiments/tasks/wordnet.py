"""Read the WordNet 3.0 database files (format: wndb(5WN), cntlist(5WN)).

Used by `python experiments/tasks/make_tasks.py`; run that file, not this one.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
# Lexicographer files 4 to 43, by number (lexnames(5WN)); the others have no topic.
_KINDS = """
    act animal artifact attribute body cognition communication event feeling food group location
    motive object person phenomenon plant possession process quantity relation shape state substance
    time body change cognition communication competition consumption contact creation emotion motion
    perception possession social stative weather
"""
KINDS = dict(enumerate(_KINDS.split(), start=4))


@dataclass(frozen=True)
class Synset:
    """One sense: its lemmas as WordNet spells them (spaces for underscores), and its definition.

    `is_instance` marks a named individual (a person, a town), `definition` is the gloss without its
    examples, `kind` the topic it is filed under ("animal", "motion"), empty for adjectives, adverbs
    and the topmost nouns.
    """

    part_of_speech: str
    lemmas: tuple[str, ...]
    definition: str
    is_instance: bool
    kind: str


def read_synsets(folder: Path) -> Iterator[Synset]:
    """All synsets of `folder`, nouns first, in file order."""
    for suffix, name in PARTS_OF_SPEECH.items():
        with (folder / f"data.{suffix}").open(encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith(" "):
                    yield _parse_synset(line, name)


def _parse_synset(line: str, part_of_speech: str) -> Synset:
    fields, _, gloss = line.partition(" | ")
    columns = fields.split(" ")
    words = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
    lemmas = (re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words)
    definition = re.split(r'[;:]\s*"|\s"', gloss.strip(), maxsplit=1)[0].strip(" ;:")
    kind = KINDS.get(int(columns[1]), "")
    return Synset(part_of_speech, tuple(dict.fromkeys(lemmas)), definition, "@i" in columns, kind)


def read_counts(folder: Path) -> Counter[str]:
    """How often each lemma (lower case) was tagged in WordNet's semantic concordances."""
    counts: Counter[str] = Counter()
    with (folder / "cntlist.rev").open(encoding="utf-8") as lines:
        for line in lines:
            sense_key, _, count = line.split()
            counts[sense_key.partition("%")[0].replace("_", " ")] += int(count)
    return counts


def read_irregular(folder: Path) -> dict[str, list[str]]:
    """Irregular form to its base forms, over all parts of speech (`went` to `go`)."""
    irregular: dict[str, list[str]] = {}
    for suffix in PARTS_OF_SPEECH:
        for line in (folder / f"{suffix}.exc").read_text(encoding="utf-8").splitlines():
            form, *bases = line.split()
            irregular.setdefault(form, []).extend(bases)
    return irregular
