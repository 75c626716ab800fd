"""Make the task `headlines`: was a headline written by a satirical paper or a serious one?

    python experiments/tasks/headlines.py

Source: `evals/registry/data/sarcasm` in the PyPI wheel of evals, which is read, not installed.
Writes experiments/tasks/data/headlines; the README there says how it is split.
"""

import json
import re
import zipfile

from common import COMMITTED, Example, Grouped, Splits, main, split_by_key, wheel

VERSION = "3.0.1.post1"
SHA256 = "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"
MEMBER = "evals/registry/data/sarcasm/samples.jsonl"
CHOICES = [" serious", " satire"]
SHORTEST_CHARS, LONGEST_CHARS = 20, 120


def key_of(headline: str) -> str:
    """The same for headlines that differ in case, punctuation or numbers (`... #12`)."""
    return re.sub("[^a-z]", "", headline.lower())


def headlines_splits() -> Splits:
    """Headlines once each; one that is found under both labels is left out."""
    labels: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    with zipfile.ZipFile(wheel("evals", VERSION, SHA256)) as archive:
        for line in archive.read(MEMBER).decode().splitlines():
            record = json.loads(line)
            text = " ".join(record["input"][-1]["content"].split())
            key = key_of(text)
            labels.setdefault(key, set()).add(CHOICES[int(record["ideal"])])
            texts.setdefault(key, text)
    examples: list[Grouped] = []
    for key, found in labels.items():
        if len(found) == 1 and SHORTEST_CHARS <= len(texts[key]) <= LONGEST_CHARS:
            example: Example = {
                "prompt": f"headline: {texts[key]}\nkind:",
                "completion": found.pop(),
                "choices": CHOICES,
            }
            examples.append((example, {key}))
    splits = split_by_key(examples)
    for example in splits["train"]:
        del example["choices"]  # only answering needs them
    return splits


if __name__ == "__main__":
    main(headlines_splits, __doc__, COMMITTED / "headlines")
