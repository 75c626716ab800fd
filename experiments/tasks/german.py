"""Make the task `german`: translate a German word into English.

    python experiments/tasks/german.py

Source: the dictionary of Ding in the Debian package trans-de-en, which is read, not installed. It
is under the GPL, so the task is not part of the repository: it is made into .cache/tasks/german
and named in a recipe by its files. The README beside this file says how it is split.
"""

import re
import subprocess
import tarfile
from collections.abc import Iterator

from common import CACHE, Grouped, Splits, fetched, main, make_example, split_by_key

VERSION = "1.9-6"
SHA256 = "45f6b4cf1c434776fba6811d7bc522efabb5425c43ba8afd0e289bf9e2e53df4"
MEMBER = "./usr/share/trans/de-en"
LONGEST_GERMAN_CHARS = 14
ANNOTATION = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|/[^/]*/|<[^>]*>")


def dictionary() -> str:
    """The text of the dictionary, read out of the package's archive."""
    client = ("apt-get", "download", "-o", "APT::Sandbox::User=root", f"trans-de-en={VERSION}")
    archive = fetched(f"trans-de-en_{VERSION}_all.deb", SHA256, *client)
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as files,
    ):
        for member in files:
            if member.name == MEMBER and (file := files.extractfile(member)):
                return file.read().decode()
    raise SystemExit(f"{archive} has no {MEMBER}")


def synonyms(side: str) -> list[str]:
    """The words of the headword's part of one side, without grammar, subject and usage notes."""
    headword = ANNOTATION.sub("", side.partition("|")[0])
    return [" ".join(word.split()) for word in headword.split(";")]


def read_pairs() -> Iterator[tuple[list[str], list[str]]]:
    """(German, English) synonyms of each entry: single German words, English of up to two."""
    for line in dictionary().splitlines():
        if line.startswith("#") or " :: " not in line:
            continue
        german, _, english = line.partition(" :: ")
        words = [w for w in synonyms(german) if re.fullmatch("[A-Za-zÄÖÜäöüß]{3,}", w)]
        answers = [w.removeprefix("to ") for w in synonyms(english)]
        answers = [w for w in answers if re.fullmatch("[A-Za-z]{2,}(-[a-z]+)?( [A-Za-z]+)?", w)]
        if words and answers:
            yield [w for w in words if len(w) <= LONGEST_GERMAN_CHARS], answers


def german_splits() -> Splits:
    """German words with all their translations; words that are the same in both are left out."""
    translations: dict[str, list[str]] = {}
    for words, answers in read_pairs():
        for word in words:
            known = translations.setdefault(word, [])
            known += [answer for answer in answers if answer not in known]
    examples: list[Grouped] = []
    for word, answers in translations.items():
        if any(answer.lower() == word.lower() for answer in answers):
            continue
        # The completion is one word: the first where there is one.
        answers = sorted(answers, key=lambda answer: " " in answer)
        if " " not in answers[0]:
            keys = {f"de:{word.lower()}", *(f"en:{answer.lower()}" for answer in answers)}
            examples.append((make_example(f"German: {word}\nEnglish:", answers), keys))
    return split_by_key(examples)


if __name__ == "__main__":
    main(german_splits, __doc__, CACHE / "german")
