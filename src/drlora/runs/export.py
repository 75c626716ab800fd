"""Export a finished run, or a folder with an adapter: `drlora export`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from drlora.adapter.embeddings import fit_embeddings
from drlora.adapter.layer import DrLoraExperts
from drlora.config.adapter import DrLoraConfig
from drlora.data import encode_examples, pad_token_id
from drlora.distributed import best_device
from drlora.errors import CheckpointError, ConfigError, DrLoraError
from drlora.export.check import Difference, Gap, logits_of
from drlora.export.choices import MERGE_INTO, ROUNDINGS, ROUTERS
from drlora.export.make import ROUNDING
from drlora.export.plan import ExportPlan, apply_plan, make_plan, refuse_full_folder
from drlora.io.files import home, read_json
from drlora.io.places import from_root
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from drlora.moe.packing import is_packed
from drlora.moe.stored.config import stored_settings
from drlora.ops.merge import Rounding, RoundingMode
from drlora.runs.data_section import default_split
from drlora.runs.loading import (
    load_adapter,
    load_architecture,
    load_base_model,
    load_tokenizer,
    model_on_meta,
    vocabulary_size,
)
from drlora.runs.quantise import QuantiseSection
from drlora.runs.roles import load_source
from drlora.runs.sources import Source, find_source
from drlora.trainer.preferences import wanted

EXAMPLES, MAX_TOKENS = 8, 128
ROOM = 0.8  # of a device's free memory, for weights


@dataclass(frozen=True)
class ExportResult:
    """What came of an export.

    Attributes:
        plan: what is, or would be, written.
        output: the folder with the export; None after a dry run.
        difference: how far the export is from the adapter; None after a dry run.
        notes: what was found when it was made.
    """

    plan: ExportPlan
    output: Path | None = None
    difference: Difference | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.plan.to_dict()
        found["notes"] += self.notes
        output = None if self.output is None else str(self.output)
        return {**found, "output": output, "logits": self.difference and self.difference.to_dict()}


def export_adapter(
    folder: str | Path,
    format: str,
    output: str | Path,
    rank: str = "padded",
    *,
    dry_run: bool = False,
    model: str | None = None,
    data: str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: str | None = None,
    rounding: RoundingMode = ROUNDING.mode,
    seed: int = ROUNDING.seed,
    merge_into: str = MERGE_INTO[0],
    routers: str = ROUTERS[0],
) -> ExportResult:
    """Export the adapter in `folder` to `output`; a dry run reads no weights but the adapter's.

    Args:
        folder: a run directory, or a folder with a saved DR-LoRA adapter.
        format: `peft`, `per-expert`, `mlx`, `gguf`, `sglang`, `merged`, or what
            `register_format` added.
        output: must not exist or be empty.
        rank: `padded` or `auto`.
        dry_run: make the plan and stop.
        model: the base model, where the adapter does not say or it has moved.
        data: examples to compare logits on; by default the run's held-out ones, and random tokens
            for an adapter without a run.
        trust_remote_code: whether code that comes with the model may run.
        max_shard_size: of one file of merged weights, such as `5GB`; by default transformers' own.
        rounding: of merged weights in 16 bits, `stochastic` or `nearest`.
        seed: of stochastic rounding.
        merge_into: of a run whose base was quantised, what the adapter is merged into: `trained`,
            the numbers that the quantised base stands for, or the `original`; how much that moves
            the logits is in the notes.
        routers: how trained routers leave in a format of LoRA: `auto`, `lora`, `exact` or `full`,
            see `drlora.export.plan.make_plan`.

    Raises:
        ConfigError: if the format does not fit the model, or `output` is not empty.
        CheckpointError: if the adapter is missing, damaged, made for another model, or the export
            would not give its logits.
        DataError: if `data` is missing or malformed.
    """
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r} is not known; choose one of {list(ROUNDINGS)}.")
    if merge_into not in MERGE_INTO:
        raise ConfigError(
            f"merge_into={merge_into!r} is not known; choose one of {list(MERGE_INTO)}."
        )
    how, notes = Rounding(rounding, seed), list[str]()
    source = _find_adapter(Path(folder), model, trust_remote_code)
    output = home(str(output))
    refuse_full_folder(output)
    if dry_run:
        return ExportResult(make_plan(_adapter_without_base(source), format, rank, routers))
    if merge_into != MERGE_INTO[0]:
        _refuse_original(source, format)
    base: Any = load_base_model(source)
    # Also a checkpoint that is quantised already, of which a recipe need not say anything.
    was_packed = any(is_packed(module) for module in base.modules())
    if was_packed:
        base = base.dequantize()  # the same numbers, that PEFT and transformers can compute with
    adapted = _quietly_on(base, source)
    vocab_size = vocabulary_size(base)
    tokenizer = _tokenizer(source, vocab_size, needed=data is not None)
    what, batches = _batches(source, data, tokenizer, vocab_size)
    if was_packed and format == "merged":
        kept = source.quantise if source.quantise.experts else "as in its checkpoint"
        notes = [f"merged into the numbers that the base stood for in training ({kept})"]
    if merge_into == "original":
        adapted, said = _on_the_original(source, adapted, batches)
        base, notes = adapted.get_base_model(), [said]
    plan = make_plan(adapted, format, rank, routers)
    record = {
        "adapter": from_root(str(folder)),
        "base_model": from_root(source.model),
        "output": os.path.abspath(output),
        "dtype": str(base.dtype).removeprefix("torch."),
        "compared_on": what,
        **({"merged_into": notes[0]} if notes else {}),
    }
    adapted.to(_device_for(base))
    written = apply_plan(plan, adapted, batches, output, tokenizer, record, max_shard_size, how)
    return ExportResult(plan, Path(output), written.difference, (*notes, *written.notes))


def _refuse_original(source: Source, format: str) -> None:
    """Raises:
    ConfigError: if there is no other base than the one of training.
    """
    if format != "merged" or source.quantise.experts is None:
        raise ConfigError(
            "merge_into='original' is for the format merged and an adapter that was trained on a "
            "quantised base; leave it out."
        )
    if stored_settings(load_architecture(source.model, source.trust_remote_code)) is not None:
        raise ConfigError(
            f"merge_into='original': the checkpoint {source.model} is quantised itself; name the "
            f"16-bit one as the model, or leave merge_into out."
        )


def _on_the_original(
    source: Source, trained: PeftModel, batches: list[dict[str, Tensor]]
) -> tuple[PeftModel, str]:
    """The adapter on the base before that was quantised, and what this moves; uses `trained` up."""
    device = _device_for(trained)
    before = logits_of(trained.to(device), batches)
    trained.to("meta")
    base = load_base_model(replace(source, quantise=QuantiseSection()))
    adapted = _quietly_on(base, source).to(device)
    moved = Gap(logits_of(adapted, batches), before).root_mean_square
    share = moved / max(torch.cat(before).square().mean().sqrt().item(), 1e-30)
    return adapted, (
        f"merged into the original base, which was {source.quantise} in training: logits move by "
        f"{share:.2%}"
    )


def _device_for(model: nn.Module) -> torch.device:
    """The best device; the CPU where a model that was quantised for it is too large for it now."""
    device = best_device()
    if device.type == "cuda":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if size > ROOM * torch.cuda.mem_get_info(device)[0]:
            return torch.device("cpu")
    return device


def _quietly_on(base: Any, source: Source) -> PeftModel:
    """The adapter on its base, which may be stored otherwise than in training on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the adapter was trained on experts stored as")
        return load_adapter(base, str(source.folder))


def _find_adapter(folder: Path, model: str | None, trust_remote_code: bool) -> Source:
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


def _adapter_without_base(source: Source) -> PeftModel:
    """The adapter with its weights, on a base that has none."""
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


def _tokenizer(source: Source, vocab_size: int, needed: bool) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; an adapter without a run may go without."""
    try:
        return load_tokenizer(source, vocab_size)
    except ConfigError:
        if needed or source.data is not None:
            raise
        return None


def _batches(
    source: Source,
    data: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> tuple[str, list[dict[str, Tensor]]]:
    """What logits are compared on, in words and as batches."""
    if tokenizer is None or (data is None and source.data is None):
        ids_NL = torch.randint(vocab_size, (EXAMPLES, 64), generator=torch.Generator())
        return "random tokens", [{"input_ids": ids_NL, "attention_mask": torch.ones_like(ids_NL)}]
    if data is None:
        assert source.data is not None
        name, split = source.data.source("eval")
    else:
        name, split = data, default_split(data, "eval")
    loaded = load_source(source.data, name, split, EXAMPLES)
    rows = encode_examples(replace(loaded, rows=wanted(loaded.rows)), tokenizer, MAX_TOKENS)
    features = [rows.tokens[i] for i in range(len(rows.tokens))]
    # In one batch: what merging makes of the weights is computed once for each.
    collator = DataCollatorForLanguageModeling(pad_token_id(tokenizer))
    return f"{name}, split {split}", [collator(features)]
