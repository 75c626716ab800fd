"""`drlora export --format merged --by-shard`: a merge in the memory of one file of weights.

The model is never whole in memory, so its logits are not compared. What is written is read again
instead, tensor by tensor, and compared with base and adapter as `drlora verify` does it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from drlora.embedded import resolve_model
from drlora.errors import CheckpointError, ConfigError, counted
from drlora.export.base_files import base_file, own_config, write_config, write_tokenizer
from drlora.export.base_weights import Base, find_base
from drlora.export.by_shard import (
    FromFiles,
    FromPacked,
    Source,
    merge_by_shard,
    refuse_unfit,
)
from drlora.export.formats.merged import in_words, rounding_record
from drlora.export.plan import make_plan, refuse_full_folder, write_about, written_at_once
from drlora.export.shards import ShardWriter, bytes_of
from drlora.io.places import from_root
from drlora.moe.stored.config import stored_settings
from drlora.ops.merge import Rounding
from drlora.ops.storage.packed import packed_format
from drlora.runs.export_source import (
    ExportResult,
    adapter_without_base,
    find_adapter,
    tokenizer_of,
)
from drlora.runs.loading import load_architecture, load_base_model, vocabulary_size
from drlora.runs.sources import Source as AdapterSource
from drlora.verification.verify import verify

SHARD_SIZE = "4GB"
_GENERATION = "generation_config.json"
_NOT_COMPARED = "logits were not compared: the model was never whole in memory"


def export_by_shard(
    folder: str | Path,
    output: str | Path,
    rounding: Rounding,
    *,
    model: str | None = None,
    max_shard_size: str | None = None,
    dry_run: bool = False,
) -> ExportResult:
    """Merge the adapter in `folder` into its base, file by file.

    Args:
        folder: a run directory, or a folder with a saved DR-LoRA adapter.
        output: must not exist or be empty.
        rounding: of weights in 16 bits.
        model: the base model, where the adapter does not say or it has moved.
        max_shard_size: of one file of weights; by default 4GB. About as much memory is needed, and
            one matrix of a block's experts besides.
        dry_run: make the plan, refuse what cannot be merged this way, and stop.

    Raises:
        ConfigError: if the base or the adapter is of a kind that must be merged whole.
        CheckpointError: if what was written is not what it must be; nothing is left of it.
    """
    source = find_adapter(Path(folder), model, trust_remote_code=False)
    refuse_full_folder(output)
    size = bytes_of(max_shard_size or SHARD_SIZE)
    adapted = adapter_without_base(source)
    plan = make_plan(adapted, "merged")
    if dry_run:
        _refuse_unfit(source, adapted)
        return ExportResult(plan)
    weights, base = _weights(source)
    skeleton = base.model if source.dtype == "auto" else base.model.to(_dtype(source))
    notes = [_NOT_COMPARED]
    with written_at_once(Path(output)) as temporary:
        writer = ShardWriter(temporary, size)
        kept = merge_by_shard(adapted, weights, rounding, writer)
        # Beside weights whose numbers are the files' own, what was written can be compared.
        if isinstance(weights, FromFiles) and weights.kind is None:
            checked = _checked(source, temporary, rounding)
        else:
            checked = (
                "not beside the base's files, which are not the numbers that it was merged into"
            )
        said: dict[str, Any] = {
            "adapter": from_root(str(folder)),
            "base_model": from_root(source.model),
            "dtype": str(skeleton.dtype).removeprefix("torch."),
            "logits": None,
            "rounding": None,
            "checked": checked,
        }
        if skeleton.dtype.itemsize == 2:
            said["rounding"] = rounding_record(rounding, kept, None)
            notes += [in_words(said["rounding"], said["dtype"])] if kept.entries else []
        if weights_kind := _kind_in_words(source, weights):
            notes.append(weights_kind)
        if isinstance(weights, FromFiles):
            notes += _left_out(set(base.weights.files) - writer.keys)
        notes += _write_beside(source, skeleton, temporary)
        said["notes"] = [*plan.notes, *notes]
        write_about(temporary, plan, said, checked)
    return ExportResult(plan, Path(output), None, tuple(notes), checked)


def _weights(source: AdapterSource) -> tuple[Source, Base]:
    """What is read, and the base without memory for its weights."""
    base = find_base(_name(source))
    if _is_packed(source):
        return FromPacked(load_base_model(source), base.model), base
    _refuse_quantised_rest(source)
    if not base.weights.files:
        raise ConfigError(f"{source.model!r} has no safetensors here; leave --by-shard out.")
    return _files(source, base), base


def _files(source: AdapterSource, base: Base) -> FromFiles:
    config = source.quantise.config()
    kind = None if config is None else packed_format(config.storage)
    return FromFiles(base, None if source.dtype == "auto" else _dtype(source), kind)


def _is_packed(source: AdapterSource) -> bool:
    """Whether the checkpoint of the base is quantised itself."""
    return stored_settings(load_architecture(source.model)) is not None


def _refuse_quantised_rest(source: AdapterSource) -> None:
    if source.quantise.rest is not None:
        raise ConfigError(
            "layers beside the experts were quantised in training, of which only bitsandbytes "
            "knows the numbers; leave --by-shard out, which needs memory for the whole model."
        )


def _refuse_unfit(source: AdapterSource, adapted: PeftModel) -> None:
    """Of a dry run: what can be said without a weight of the base, which may be elsewhere yet.

    Raises:
        ConfigError: if a merge would be refused before it reads one.
    """
    base, files = find_base(_name(source)), None
    if not _is_packed(source):
        _refuse_quantised_rest(source)
        files = _files(source, base) if base.weights.files else None
    refuse_unfit(adapted, files, base.model)


def _name(source: AdapterSource) -> str:
    """Of the base, so that it is found from any directory."""
    return from_root(resolve_model(source.model))


def _dtype(source: AdapterSource) -> torch.dtype:
    found: torch.dtype = getattr(torch, source.dtype)
    return found


def _kind_in_words(source: AdapterSource, weights: Source) -> str:
    if isinstance(weights, FromPacked):
        return "merged into the numbers that the base stood for in training (as in its checkpoint)"
    if source.quantise.experts is not None:
        return f"merged into the numbers that the base stood for in training ({source.quantise})"
    return ""


def _checked(source: AdapterSource, merged: Path, rounding: Rounding) -> str:
    """What `verify` says of the files, in words.

    Raises:
        CheckpointError: if they are not what they must be.
    """
    found = verify(source.folder, _name(source), merged)
    wrong = [finding for finding in found.findings if finding.is_fault]
    if rounding.mode == "nearest":  # loses a part of the update by its nature, which is told
        wrong = [finding for finding in wrong if finding.name != "lost-in-rounding"]
    if wrong:
        raise CheckpointError(
            f"the merged files are not what they must be: {wrong[0]}. Nothing was left of them. "
            f"Please report it, with the model's name."
        )
    shares = sorted(one.share for one in found.merged)
    between = f"{shares[0]:.1%} to {shares[-1]:.1%}" if shares else "nothing"
    return f"the files were read again beside base and adapter: {between} of each update is there"


def _left_out(keys: set[str]) -> list[str]:
    """What the checkpoint has besides the model; a merge of the whole model leaves it out too."""
    if not keys:
        return []
    return [
        f"of the checkpoint {counted(len(keys), 'tensor')} of no part of the model are not in the "
        f"export ({min(keys)} for one)"
    ]


def _write_beside(source: AdapterSource, skeleton: Any, folder: Path) -> list[str]:
    """Configuration and tokenizer; what the user should know of them."""
    _, note = own_config(skeleton)
    skeleton.config.save_pretrained(folder)
    write_config(skeleton, folder)
    generation = base_file(_name(source), _GENERATION)
    if generation is not None:
        shutil.copyfile(generation, folder / _GENERATION)
    tokenizer = tokenizer_of(source, vocabulary_size(skeleton), needed=False)
    if tokenizer is not None:
        write_tokenizer(tokenizer, _name(source), folder)
    return [note] if note else []
