"""Measure a finished run, an adapter or an exported model: `drlora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drlora.assemble import (
    Examples,
    load_adapter,
    load_architecture,
    load_base_model,
    load_source,
    load_tokenizer,
    longest_example,
    vocabulary_size,
)
from drlora.data import encode_examples
from drlora.errors import ConfigError
from drlora.measure import Measurement, measure
from drlora.recipe import ROLES, default_split
from drlora.sources import Source, find_source


def evaluate_run(
    folder: str | Path,
    split: str = "eval",
    data: str | None = None,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Measurement:
    """Loss and exact match of what is in `folder`.

    Args:
        folder: a run directory, or a folder with an adapter (DR-LoRA or PEFT's LoRA) or a model,
            such as an export.
        split: train, eval or test, as the recipe names them, or the name of a split.
        data: other data than the recipe's: a file, a hub data set or `embedded:TASK`.
        model: the base model, where the adapter does not say or it has moved.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: if the run is unfinished, damaged, or was made for another model.
        ConfigError: if no run says which data is meant, and `data` does not either.
        DataError: if the data is missing or malformed.
    """
    source = find_source(Path(folder), model, trust_remote_code)
    raw = load_source(source.data, *_asked_for(source, split, data))
    architecture = load_architecture(source.model, source.trust_remote_code)
    length = longest_example(source.data, source.model, architecture)
    subject: Any = load_base_model(source)
    tokenizer = load_tokenizer(source, vocabulary_size(subject))
    examples = Examples(raw, encode_examples(raw, tokenizer, length))
    if source.adapter is not None:
        subject = load_adapter(subject, str(source.folder))
    subject.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    return measure(subject, tokenizer, examples, source.evaluation)


def _asked_for(source: Source, split: str, data: str | None) -> tuple[str, str, int | None]:
    """(source, split, limit) of the examples to measure on."""
    if data is not None:
        return data, default_split(data, split) if split in ROLES else split, None
    section = source.data
    if section is None:
        raise ConfigError(
            f"{source.folder} is of no run whose data could be used; name some with --data FILE."
        )
    if split in ROLES:
        return *section.source(split), section.limits.get(split)
    return section.source("eval")[0], split, None
