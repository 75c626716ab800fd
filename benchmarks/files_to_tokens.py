"""Files to tokens: CPU seconds and memory of reading and tokenizing 100,000 examples, and again.

    python -m benchmarks.files_to_tokens                # two files, made in a scratch folder
    python -m benchmarks.files_to_tokens FILE.jsonl     # a file of your own

The second time everything comes from datasets' cache. The tokenizer is the embedded model's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    """Print what it costs in this process."""
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
    print(f"{path.name}: {len(rows):,} examples, {seconds:.1f} CPU s, peak {peak_gb:.2f} GB")


def main() -> None:
    """Each measurement in a process of its own, twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cache:
        measure(arguments.files[0], arguments.cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in arguments.files or write_examples(Path(folder)):
            for _ in range(2):
                words = [
                    sys.executable,
                    "-m",
                    "benchmarks.files_to_tokens",
                    str(path),
                    "--cache",
                    str(Path(folder) / "cache"),
                ]
                subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
