"""Held-out loss of a model folder per domain.

    python experiments/pretrain/evaluate.py src/drlora/embedded/olmoe-tiny

Prints the losses and writes them to `--output`. Bits a byte do not depend on the vocabulary, unlike
nats a token.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CACHE = Path(".cache/pretrain")
BATCH_ROWS = 16


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, rows: list[list[int]]) -> float:
    """Mean next-token loss in nats over rows of equal length."""
    losses = []
    for start in range(0, len(rows), BATCH_ROWS):
        input_ids = torch.tensor(rows[start : start + BATCH_ROWS])
        losses.append(model(input_ids=input_ids, labels=input_ids).loss.item() * len(input_ids))
    return sum(losses) / len(rows)


def domain_rows(heldout: Dataset) -> dict[str, list[list[int]]]:
    """Held-out rows by domain."""
    rows: dict[str, list[list[int]]] = {}
    for row in heldout:
        rows.setdefault(row["domain"], []).append(row["input_ids"])
    return dict(sorted(rows.items()))


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]
) -> dict[str, float]:
    """Loss, its equivalent in bits a byte, and how much text it was measured on."""
    loss = mean_loss(model, rows)
    text = tokenizer.batch_decode([row[1:] for row in rows], skip_special_tokens=True)
    n_bytes = sum(len(row.encode()) for row in text)
    predicted = len(rows) * (len(rows[0]) - 1)
    return {
        "tokens": predicted,
        "bytes": n_bytes,
        "loss": round(loss, 4),
        "bits_per_byte": round(loss * predicted / math.log(2) / n_bytes, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows a domain, at most")
    parser.add_argument("--output", type=Path, default=CACHE / "heldout.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more of them wait for each other where the cores are shared
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.cache / "tokenizer")
    heldout = DatasetDict.load_from_disk(options.cache / "packed")["heldout"]
    domains = {
        name: measure(model, tokenizer, rows[: options.rows])
        for name, rows in domain_rows(heldout).items()
    }
    options.output.write_text(json.dumps({"domains": domains}, indent=1) + "\n")
    for name, row in domains.items():
        print(f"{name:12} {row['loss']:.3f} nats a token, {row['bits_per_byte']:.3f} bits a byte")


if __name__ == "__main__":
    main()
