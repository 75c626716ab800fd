"""Make `known`: texts of the kind that the small models were pretrained on, held out there.

    python experiments/pretrain/corpus.py
    python experiments/tasks/known.py

The loss on them says what a run forgets (`evaluation.forgetting`). Only domains whose licence
permits it are in the repository: Python's standard library and its documentation (PSF-2.0). Pieces
of 700 characters, from all over each held-out document; the README beside the data names the
licences.
"""

import json
from pathlib import Path

CORPUS = Path(".cache/pretrain/documents.jsonl")
TARGET = Path(__file__).parent / "data" / "known" / "test.jsonl"
DOMAINS = ("code", "python-docs")
CHARACTERS, PIECES = 700, 60


def pieces() -> list[dict[str, str]]:
    """Up to PIECES of each domain, as many of each document."""
    found: dict[str, list[list[str]]] = {domain: [] for domain in DOMAINS}
    for line in CORPUS.open(encoding="utf-8"):
        document = json.loads(line)
        if document["split"] == "heldout" and document["domain"] in found:
            found[document["domain"]].append(cut(document["text"]))
    rows = []
    for domain, documents in found.items():
        in_turn = [
            piece for turn in zip(*padded(documents), strict=True) for piece in turn if piece
        ]
        rows += [{"text": piece, "domain": domain} for piece in in_turn[:PIECES]]
    return rows


def cut(text: str) -> list[str]:
    """Pieces evenly spread over the text, each beginning after a line break."""
    count = max(1, min(20, len(text) // (2 * CHARACTERS)))
    starts = [round(n * (len(text) - CHARACTERS) / max(1, count - 1)) for n in range(count)]
    return [text[max(start, 0) :].partition("\n")[2][:CHARACTERS].strip() for start in starts]


def padded(documents: list[list[str]]) -> list[list[str]]:
    """All as long as the longest."""
    longest = max(map(len, documents))
    return [pieces + [""] * (longest - len(pieces)) for pieces in documents]


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in pieces()]
    TARGET.write_text("".join(lines), "utf-8")
    print(f"{TARGET}: {len(lines)} pieces")
