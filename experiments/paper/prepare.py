"""Three of the paper's data sets as prompts and completions, for the recipes paper/TASK of drlora.

    python experiments/paper/prepare.py medmcqa      writes data/medmcqa/train.jsonl and eval.jsonl

Needs the hub, for `openlifescienceai/medmcqa`, `RicardoRei/wmt-da-human-evaluation` or
`coastalcph/lex_glue`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

LETTERS = "ABCD"
LANGUAGES = {"en-cs": "Czech", "en-de": "German", "en-zh": "Chinese"}
HELD_OUT = 1000
Record = dict[str, Any]


def medmcqa(record: Record) -> Record:
    """A question with four options; the answer is a letter, chosen by the least loss."""
    options = "\n".join(f"{letter}. {record[f'op{letter.lower()}']}" for letter in LETTERS)
    right = f" {LETTERS[record['cop']]}"
    return {
        "prompt": f"{record['question'].strip()}\n{options}\nAnswer:",
        "completion": right,
        "answers": [right],
        "choices": [f" {letter}" for letter in LETTERS],
    }


def wmt(record: Record) -> Record:
    """A sentence and its reference translation."""
    language = LANGUAGES[record["lp"]]
    prompt = f"Translate from English to {language}.\nEnglish: {record['src']}\n{language}:"
    return {"prompt": prompt, "completion": f" {record['ref']}"}


def ledgar(record: Record, kinds: list[str]) -> Record:
    """A provision of a contract and what kind it is of."""
    return {
        "prompt": f"{record['text'].strip()}\nKind of provision:",
        "completion": f" {kinds[record['label']]}",
    }


def once(records: Iterable[Record]) -> Iterator[Record]:
    """Each prompt once: the assessments have a row for each system that was judged."""
    seen = set()
    for record in records:
        if record["prompt"] not in seen:
            seen.add(record["prompt"])
            yield record


def splits_of(task: str) -> dict[str, Iterable[Record]]:
    """File name -> records of a task, from the hub."""
    if task == "medmcqa":
        names = {"train": "train", "eval": "validation"}
        found = datasets.load_dataset("openlifescienceai/medmcqa")
        return {file: map(medmcqa, found[split]) for file, split in names.items()}
    if task == "ledgar":
        found = datasets.load_dataset("coastalcph/lex_glue", "ledgar")
        kinds = found["train"].features["label"].names
        names = {"train": "train", "eval": "validation", "test": "test"}
        return {
            file: (ledgar(record, kinds) for record in found[split])
            for file, split in names.items()
        }
    rows = datasets.load_dataset("RicardoRei/wmt-da-human-evaluation", split="train")
    pairs = once(wmt(record) for record in rows if record["lp"] in LANGUAGES)
    return {"eval": list(islice(pairs, HELD_OUT)), "train": pairs}


def write(folder: Path, splits: dict[str, Iterable[Record]]) -> None:
    """A .jsonl file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in splits.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """Write the files of one task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["medmcqa", "wmt", "ledgar"])
    parser.add_argument("--out", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    write(arguments.out / arguments.task, splits_of(arguments.task))


if __name__ == "__main__":
    main()
