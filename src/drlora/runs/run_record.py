"""What a run holds fast when it begins, in run.json: its length, its batches, its data.

    {"steps": 48, "num_train_epochs": 4.0, "batch_size": 4, "processes": 1,
     "data": {"train": {"examples": 48, "content": "9f2c...", "tokens": "03ab..."}, "eval": ...},
     "encoding": {"max_length": 64, "vocabulary": 512, "chat_template": "e3b0..."},
     "held_out": {"loss": {"examples": 20, "of": 93, "line": [3, 7, ...]}, ...},
     "restarts": [...]}

A run that is resumed is compared with it: other data, or other tokens of the same data, would make
another run of it. `content` is a hash of the examples as read (prompt, completion and the like, in
their order), `tokens` one of what batches are made of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from drlora.data.formats import PLACES
from drlora.data.tokens import Prepared
from drlora.distributed import world_size
from drlora.errors import ConfigError
from drlora.evaluation.draw import drawn
from drlora.evaluation.measure import EvaluationSection
from drlora.io.files import read_json

_BATCH = 1000
_TOKENS = (
    "input_ids", "labels", "seq_lengths", "prompt_ids", "chosen_ids", "rejected_ids",
    "completion_ids",
)  # fmt: skip
_NAMES = {"train": "training", "eval": "held-out"}


def read_record(path: Path) -> dict[str, Any]:
    """The record in run.json; {} of a run that was begun by an older drlora.

    Raises:
        CheckpointError: if it is damaged.
    """
    return read_json(path, "the record") if path.is_file() else {}


def data_record(
    examples: Mapping[str, Prepared], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """The parts of a record that say what batches are made of.

    Args:
        examples: role -> its examples.
        tokenizer: that they were encoded with.
        max_length: in tokens.
    """
    data = {
        role: {
            "examples": len(one.raw),
            "content": _content(one.raw),
            "tokens": _tokens(one.tokens),
        }
        for role, one in examples.items()
    }
    template = json.dumps(tokenizer.chat_template or "", sort_keys=True)
    encoding = {
        "max_length": max_length,
        "vocabulary": len(tokenizer),
        "padding": tokenizer.pad_token_id,
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
    }
    return {"data": data, "encoding": encoding, "processes": world_size()}


def refuse_other_data(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Compare the data of a run that is resumed with those that it began with.

    Args:
        before: the record of the run.
        now: of `data_record`.
        where: the run, for the message.

    Raises:
        ConfigError: saying what changed.
    """
    for role, found in now["data"].items():
        then = before.get("data", {}).get(role)
        if then is None:  # begun by an older drlora, or without a record
            continue
        if then["content"] != found["content"]:
            raise ConfigError(
                f"the {_NAMES[role]} data is not what the run in {where} began with: "
                f"{_counts(then['examples'], found['examples'])}. A resumed run goes on with its "
                f"own data: put the file back, or start a new run (another output_dir, or "
                f"--overwrite)."
            )
        if then["tokens"] != found["tokens"]:
            raise ConfigError(
                f"the {_NAMES[role]} data is that of the run in {where}, but it is encoded "
                f"otherwise: {_encoding(before['encoding'], now['encoding'])}. Put that back, or "
                f"start a new run (another output_dir, or --overwrite)."
            )


def _counts(before: int, now: int) -> str:
    if before == now:
        return f"{before} examples then and now, but with other content"
    return f"{before} examples then, {now} now"


def _encoding(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [
        "another chat template" if name == "chat_template" else f"{name} was {before[name]}, is {v}"
        for name, v in now.items()
        if before.get(name) != v
    ]
    return "; ".join(changed) or "the tokenizer gives other tokens"


def held_out_record(held_out: Prepared, section: EvaluationSection) -> dict[str, Any]:
    """Which held-out examples are measured, by their place in the data."""
    return {
        "loss": _drawn(held_out.tokens, section.loss_examples, section.draw),
        "exact_match": _drawn(held_out.raw, section.exact_match_examples, section.draw),
    }


def _drawn(rows: Dataset, wanted: int | None, how: str) -> dict[str, Any]:
    """How many of how many, and which, unless it is all rows of a file or of a part of one."""
    chosen = drawn(len(rows), wanted, how)
    place = next((name for name in PLACES if name in rows.column_names), "example")
    numbers = rows[place] if place in rows.column_names else range(1, len(rows) + 1)
    kept = [numbers[row] for row in chosen]
    found: dict[str, Any] = {"examples": len(kept), "of": len(rows)}
    if len(kept) == kept[-1] - kept[0] + 1 == len(rows):
        return found
    return found | {"draw": how, place: kept}


def _content(rows: Dataset) -> str:
    """A hash of the examples, whatever lines they stand in."""
    digest = hashlib.sha256()
    names = [name for name in sorted(rows.column_names) if name not in PLACES]
    for batch in rows.select_columns(names).iter(_BATCH):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _tokens(rows: Dataset) -> str:
    """A hash of input_ids and labels, or of what preferences have, as numbers and lengths."""
    digest = hashlib.sha256()
    names = [name for name in _TOKENS if name in rows.column_names]
    for batch in rows.with_format("arrow").iter(_BATCH):
        for name in names:
            column = batch.column(name).combine_chunks()
            for part in (column.value_lengths(), column.flatten()):
                digest.update(np.asarray(part).astype(np.int64).tobytes())
    return digest.hexdigest()
