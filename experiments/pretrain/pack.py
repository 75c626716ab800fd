"""Tokenise the corpus into rows of 256 tokens, each row from one domain only.

    python experiments/pretrain/pack.py

Rows of one domain let a held-out loss and the routing be measured per domain; shuffling the rows
is what mixes the domains within a training batch. Writes `packed/train` and `packed/heldout`.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CACHE = Path(".cache/pretrain")
ROW_TOKENS = 256
BATCH_DOCUMENTS = 512


def tokenised(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token ids of each text, BOS before and EOS after it."""
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        batch = tokenizer(texts[start : start + BATCH_DOCUMENTS], verbose=False)["input_ids"]
        yield from (ids + [tokenizer.eos_token_id] for ids in batch)


def rows_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, row_tokens: int) -> np.ndarray:
    """Texts one after another, cut into rows [rows, row_tokens] (int32); the rest is dropped."""
    pieces = [np.array(ids, dtype=np.int32) for ids in tokenised(texts, tokenizer)]
    stream = np.concatenate(pieces)
    rows = len(stream) // row_tokens
    return stream[: rows * row_tokens].reshape(rows, row_tokens)


def pack(
    documents: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, row_tokens: int
) -> DatasetDict:
    """Both splits as data sets with the columns `input_ids` and `domain`, rows shuffled."""
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for document in documents:
        texts[document["split"], document["domain"]].append(document["text"])
    packed = DatasetDict()
    for split in ("train", "heldout"):
        rows, domains = [], []
        for (of_split, domain), group in sorted(texts.items()):
            if of_split == split:
                random.Random(0).shuffle(group)
                rows.append(rows_of(group, tokenizer, row_tokens))
                domains += [domain] * len(rows[-1])
        columns = {"input_ids": np.concatenate(rows), "domain": domains}
        packed[split] = Dataset.from_dict(columns).shuffle(seed=0).flatten_indices()
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.cache / "tokenizer")
    with (arguments.cache / "documents.jsonl").open() as file:
        documents = [json.loads(line) for line in file]
    packed = pack(documents, tokenizer, ROW_TOKENS)
    packed.save_to_disk(arguments.cache / "packed")
    for split, rows in packed.items():
        print(f"{split}: {len(rows) * ROW_TOKENS:,} tokens")


if __name__ == "__main__":
    main()
