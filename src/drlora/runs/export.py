"""Export a finished run, or a folder with an adapter: `drlora export`."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from drlora.data import encode_examples, pad_token_id
from drlora.distributed import best_device
from drlora.errors import ConfigError
from drlora.export.check import Gap, logits_of
from drlora.export.choices import MERGE_INTO, ROUNDINGS, ROUTERS
from drlora.export.format import LoraFormat
from drlora.export.formats import FORMATS
from drlora.export.make import ROUNDING
from drlora.export.plan import apply_plan, make_plan, refuse_full_folder
from drlora.export.shards import bytes_of
from drlora.io.files import home
from drlora.io.places import from_root
from drlora.moe.packing import is_packed
from drlora.moe.stored.config import stored_settings
from drlora.ops.merge import Rounding, RoundingMode
from drlora.runs.data_section import default_split
from drlora.runs.export_by_shard import export_by_shard
from drlora.runs.export_source import (
    ExportResult,
    adapter_without_base,
    find_adapter,
    tokenizer_of,
)
from drlora.runs.loading import (
    load_adapter,
    load_architecture,
    load_base_model,
    vocabulary_size,
)
from drlora.runs.quantise import QuantiseSection
from drlora.runs.roles import load_source
from drlora.runs.sources import Source
from drlora.trainer.preferences import wanted

EXAMPLES, MAX_TOKENS = 8, 128
ROOM = 0.8  # of a device's free memory, for weights


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
    by_shard: bool = False,
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
        by_shard: of `merged`: read, merge and write in turn, in the memory of one file of weights;
            logits are not compared then (see `drlora.runs.export_by_shard`).

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
    _refuse_size(format, max_shard_size)
    how, notes = Rounding(rounding, seed), list[str]()
    if by_shard:
        _refuse_by_shard(format, merge_into, data, trust_remote_code)
        return export_by_shard(
            folder,
            home(str(output)),
            how,
            model=model,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
        )
    source = find_adapter(Path(folder), model, trust_remote_code)
    output = home(str(output))
    refuse_full_folder(output)
    if merge_into != MERGE_INTO[0]:
        _refuse_original(source, format)
    if dry_run:
        if data is not None:
            load_source(source.data, data, default_split(data, "eval"), EXAMPLES)
        return ExportResult(make_plan(adapter_without_base(source), format, rank, routers))
    base: Any = load_base_model(source)
    # Also a checkpoint that is quantised already, of which a recipe need not say anything.
    was_packed = any(is_packed(module) for module in base.modules())
    if was_packed:
        base = base.dequantize()  # the same numbers, that PEFT and transformers can compute with
    adapted = _quietly_on(base, source)
    vocab_size = vocabulary_size(base)
    tokenizer = tokenizer_of(source, vocab_size, needed=data is not None)
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
    difference = written.difference
    return ExportResult(plan, Path(output), difference, (*notes, *written.notes), str(difference))


def _refuse_size(format: str, max_shard_size: str | None) -> None:
    """Raises:
    ConfigError: if it is no size, or the format has one file of weights.
    """
    if max_shard_size is None:
        return
    bytes_of(max_shard_size)
    if isinstance(FORMATS.get(format), LoraFormat):
        raise ConfigError(
            f"max_shard_size={max_shard_size!r} is of merged weights, and the format {format} has "
            f"one file; leave it out."
        )


def _refuse_by_shard(
    format: str, merge_into: str, data: str | None, trust_remote_code: bool
) -> None:
    """Raises:
    ConfigError: if something is asked for that a merge file by file has no place for.
    """
    if format != "merged":
        raise ConfigError(f"by_shard is for the format merged, not {format!r}; leave it out.")
    asked = {
        "merge_into": merge_into != MERGE_INTO[0],
        "data": data is not None,
        "trust_remote_code": trust_remote_code,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise ConfigError(f"{name} needs the whole model in memory; leave it or by_shard out.")


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
