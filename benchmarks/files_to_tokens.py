"""Files to tokens: CPU seconds and memory of reading and tokenizing 100,000 examples, and again.

    python -m benchmarks.files_to_tokens                # two files, made in a scratch folder
    python -m benchmarks.files_to_tokens FILE.jsonl     # a file of your own

The second time everything comes from datasets' cache. The tokenizer is the embedded model's, whose
chat template has no generation marks. Of the two files rows are appended to
`results/files_to_tokens.jsonl`, with --dry none.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import append, where

ROWS = 100_000


def write_examples(folder: Path) -> list[Path]:
    """The examples of an embedded task, as pairs and as conversations of four turns."""
    from drlora.data import load_examples

    task = load_examples("embedded:definitions")
    pairs, chats = folder / "pairs.jsonl", folder / "conversations.jsonl"
    with pairs.open("w") as one, chats.open("w") as other:
        for number in range(ROWS):
            row = task[number % len(task)]
            asked = {"role": "user", "content": f"{number} {row['prompt']}"}
            answer = {"role": "assistant", "content": row["completion"]}
            pair = {"prompt": asked["content"], "completion": answer["content"]}
            again = {"role": "user", "content": "and then?"}
            print(json.dumps(pair), file=one)
            print(json.dumps({"messages": [asked, answer, again, answer]}), file=other)
    return [pairs, chats]


def measure(path: Path, cache: Path) -> None:
    """Print what it costs in this process, as JSON."""
    import datasets
    from transformers import AutoTokenizer

    from drlora.data import encode_examples
    from drlora.data.files import load_placed
    from drlora.embedded import model_folder

    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    begin = time.process_time()
    rows = encode_examples(load_placed(str(path)), tokenizer, 256).tokens
    seconds = time.process_time() - begin
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"examples": len(rows), "cpu_s": seconds, "peak_gb": peak_gb}))


def measured(path: Path, cache: Path) -> dict[str, Any]:
    """The same in a process of its own, on one thread."""
    words = [sys.executable, "-m", "benchmarks.files_to_tokens", str(path), "--cache", str(cache)]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, **threads}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Each file twice, the second time from the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--dry", action="store_true", help="append no rows")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cache:
        measure(arguments.files[0], arguments.cache)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in arguments.files or write_examples(Path(folder)):
            for way in ("made", "from the cache"):
                found = measured(path, Path(folder) / "cache")
                print(
                    f"{path.name}, {way}: {found['examples']:,} examples, "
                    f"{found['cpu_s']:.1f} CPU s, peak {found['peak_gb']:.2f} GB"
                )
                place = {**where(), "trl": version("trl"), "datasets": version("datasets")}
                rows.append({"case": path.name, "way": way, **found, **place})
    if not arguments.dry and not arguments.files:
        append("files_to_tokens", rows)


if __name__ == "__main__":
    main()
