"""What an export starts from, and what comes of it: for `export` and `export_by_shard`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from drlora.adapter.embeddings import fit_embeddings
from drlora.adapter.layer import DrLoraExperts
from drlora.config.adapter import DrLoraConfig
from drlora.errors import CheckpointError, ConfigError, DrLoraError
from drlora.export.check import Difference
from drlora.export.plan import ExportPlan
from drlora.io.files import read_json
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from drlora.runs.loading import load_architecture, load_tokenizer, model_on_meta
from drlora.runs.sources import Source, find_source


@dataclass(frozen=True)
class ExportResult:
    """What came of an export.

    Attributes:
        plan: what is, or would be, written.
        output: the folder with the export; None after a dry run.
        difference: how far the export is from the adapter; None after a dry run, and of one that
            was made file by file.
        notes: what was found when it was made.
        checked: how it was checked, in words; "" after a dry run.
    """

    plan: ExportPlan
    output: Path | None = None
    difference: Difference | None = None
    notes: tuple[str, ...] = ()
    checked: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.plan.to_dict()
        found["notes"] += self.notes
        output = None if self.output is None else str(self.output)
        return {**found, "output": output, "logits": self.difference and self.difference.to_dict()}


def find_adapter(folder: Path, model: str | None, trust_remote_code: bool) -> Source:
    """The DR-LoRA adapter in `folder`, and where its base is.

    Raises:
        CheckpointError: if there is none, or it is for another task than to go on writing.
    """
    source = find_source(folder, model, trust_remote_code)
    if source.adapter != "DRLORA":
        what = f"the adapter in {folder} is of type {source.adapter!r}"
        raise CheckpointError(
            f"{what if source.adapter else f'{folder} holds a whole model'}; only DR-LoRA adapters "
            f"are exported."
        )
    task = read_json(source.folder / ADAPTER_CONFIG).get("task_type")
    if task not in (None, TaskType.CAUSAL_LM.value):
        raise CheckpointError(
            f"the adapter in {folder} is for task_type={task!r}, and this command loads causal "
            f"language models. Export it from Python, with the model that it is on: "
            f"drlora.export.plan.make_plan and apply_plan."
        )
    return source


def adapter_without_base(source: Source) -> PeftModel:
    """The adapter with its weights, on a base that has none.

    Raises:
        CheckpointError: if it is damaged or made for another model.
    """
    base = model_on_meta(
        load_architecture(source.model, source.trust_remote_code), source.trust_remote_code
    )
    try:
        config = DrLoraConfig.from_pretrained(str(source.folder))
        tensors = load_file(source.folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the adapter in {source.folder} cannot be read: {error}") from error
    fit_embeddings(base, source.folder)
    config.base_model_name_or_path = None  # the base may be named otherwise by now
    with warnings.catch_warnings():
        # It is on no base here, whatever that was stored as.
        warnings.filterwarnings("ignore", "the adapter was trained on experts stored as")
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    for part in _adapter_parts(model):
        part.to_empty(device="cpu")
    try:
        with warnings.catch_warnings():
            # Of resized embeddings, which have no memory here.
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            set_peft_model_state_dict(model, tensors)
    except DrLoraError:
        raise
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the adapter in {source.folder} does not fit {source.model!r}: {error}"
        ) from error
    return model


def _adapter_parts(model: PeftModel) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, DrLoraExperts):
            yield module.drlora_adapters
        elif isinstance(module, ModulesToSaveWrapper):
            yield module.modules_to_save
        elif isinstance(module, LoraLayer):
            yield from (module.lora_A, module.lora_B)


def tokenizer_of(source: Source, vocab_size: int, needed: bool) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; an adapter without a run may go without."""
    try:
        return load_tokenizer(source, vocab_size)
    except ConfigError:
        if needed or source.data is not None:
            raise
        return None
