"""Group a vocabulary into word families, so that a split can keep each family whole.

Used by `python experiments/tasks/make_tasks.py`; run that file, not this one.
"""

from collections.abc import Iterable, Iterator, Mapping

INFLECTIONS = "s es d ed ing r er st est"
DERIVATIONS = (
    "ings ers ly n en ens y ie ies ied ier iest ily ness nesses less ful fully ment ments able "
    "ably ible ability or ors ion ions ation ations ition al ally ial ic ical ically ity ism isms "
    "ist ists ish ize izes ized izing ise ive ively ous ously ant ent ance ence ship hood dom like "
    "man men th age ages"
)
ALL_SUFFIXES = f"{INFLECTIONS} {DERIVATIONS}"
SHORTEST_BASE = 3


class UnionFind:
    """Disjoint sets of strings."""

    def __init__(self, words: Iterable[str]) -> None:
        self._parent = {word: word for word in words}

    def find(self, word: str) -> str:
        """The representative of the set that holds `word`."""
        while self._parent[word] != word:
            self._parent[word] = self._parent[self._parent[word]]
            word = self._parent[word]
        return word

    def join(self, one: str, other: str) -> None:
        """Make one set of the sets of both words."""
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first


def possible_bases(word: str, suffixes: str = ALL_SUFFIXES) -> Iterator[str]:
    """Spellings that may give `word` with one of `suffixes` added (`hoping`: hop, hope, ...)."""
    for suffix in suffixes.split():
        if not word.endswith(suffix):
            continue
        base = word[: -len(suffix)]
        if len(base) < SHORTEST_BASE - 1:
            continue
        yield base
        yield base + "e"
        yield base + "y"
        if base.endswith("i"):
            yield base[:-1] + "y"
        if len(base) > SHORTEST_BASE and base[-1] == base[-2]:
            yield base[:-1]
        if base.endswith("v"):
            yield base[:-1] + "f"
            yield base[:-1] + "fe"


def word_families(words: Iterable[str], irregular: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Families of `words`: everything linked by a suffix rule or an irregular form.

    The rules ask for spelling alone, so they join too much rather than too little (`career` with
    `care`), which is the safe side for a split without leaks. A base that is not in the vocabulary
    still joins the forms that share it.

    Args:
        words: the vocabulary, lower case.
        irregular: irregular form to its base forms (`went` to `go`).

    Returns:
        Sorted families, each sorted.
    """
    vocabulary = sorted(set(words))
    links = [
        (word, base)
        for word in vocabulary
        for base in (*possible_bases(word), *irregular.get(word, ()))
        if len(base) >= SHORTEST_BASE or base in irregular.get(word, ())
    ]
    sets = UnionFind([*vocabulary, *(base for _, base in links)])
    for word, base in links:
        sets.join(word, base)
    families: dict[str, list[str]] = {}
    for word in vocabulary:
        families.setdefault(sets.find(word), []).append(word)
    return sorted(families.values())
