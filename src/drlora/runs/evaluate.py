"""Measure a finished run, an adapter or an exported model: `drlora eval`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drlora.data import prepare
from drlora.data.tokens import PlainSettings
from drlora.distributed import best_device
from drlora.errors import ConfigError
from drlora.evaluation.measure import Measurement, measure
from drlora.io.places import from_root
from drlora.runs.data_section import ROLES, default_split
from drlora.runs.loading import (
    load_adapter,
    load_architecture,
    load_base_model,
    load_tokenizer,
    longest_example,
    vocabulary_size,
)
from drlora.runs.roles import load_source
from drlora.runs.sources import Source, find_source
from drlora.trainer.preferences import wanted


@dataclass(frozen=True)
class Evaluation(Measurement):
    """A measurement, and of what.

    Attributes:
        model: the model that was loaded: the base model of an adapter, or the merged model.
        adapter: PEFT's name of the adapter's type on it, or None.
        dtype: of the model's weights.
        device: where it ran.
    """

    model: str = ""
    adapter: str | None = None
    dtype: str = ""
    device: str = ""

    def __str__(self) -> str:
        kind = {"DRLORA": " with a DR-LoRA adapter", "LORA": " with a LoRA of PEFT's"}
        with_adapter = kind.get(self.adapter or "", "")
        return f"{self.model}{with_adapter}, {self.dtype} on {self.device}\n{super().__str__()}"


def evaluate(
    folder: str | Path,
    split: str = "eval",
    data: str | None = None,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Loss and exact match of what is in `folder`, by its own base and dtype.

    Of preferences the answers are measured that are to be preferred.

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
    loaded = load_source(source.data, *_asked_for(source, split, data))
    architecture = load_architecture(source.model, source.trust_remote_code)
    length = longest_example(source.data, source.model, architecture)
    subject: Any = load_base_model(source)
    dtype = str(subject.dtype).removeprefix("torch.")
    if source.adapter is not None:
        subject = load_adapter(subject, str(source.folder))
    tokenizer = load_tokenizer(source, vocabulary_size(subject))
    settings = PlainSettings(max_length=length, **source.tokens)
    examples = prepare(replace(loaded, rows=wanted(loaded.rows)), tokenizer, settings)
    device = best_device()
    found = measure(subject.to(device), tokenizer, examples, source.evaluation)
    model = from_root(source.model)
    return Evaluation(
        found.loss,
        found.match,
        found.notes,
        model=model,
        adapter=source.adapter,
        dtype=dtype,
        device=str(device),
    )


def _asked_for(source: Source, split: str, data: str | None) -> tuple[Any, str, int | None]:
    """(source, split, limit) of the examples to measure on."""
    if data is not None:
        return data, default_split(data, split) if split in ROLES else split, None
    section = source.data
    if section is None:
        raise ConfigError(
            f"{source.folder} is of no run whose data could be used; name some with --data FILE."
            if source.run is None
            else f"the run that {source.folder} was made from is not in {source.run} any more, so "
            f"its data is not known; name some with --data FILE."
        )
    if split in ROLES:
        return *section.source(split), section.limits.get(split)
    return section.source("eval")[0], split, None
