"""Exports in three steps: plan, validate, apply.

    plan = make_plan(model, "peft")               # ranks, sizes, files; refuses what cannot be
    made = apply_plan(plan, model, batches, "out")

`apply_plan` makes the exported model in memory and compares it with the adapter (see `make`); only
then are files written, into a folder beside the target that is renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora.adapter.embeddings import has_tied_embeddings
from drlora.adapter.inject import adapted_layers, refuse_fixed_weights
from drlora.errors import CheckpointError, ConfigError
from drlora.export import peft_lora, per_expert
from drlora.export.check import Batch, refuse_if_different
from drlora.export.make import ROUNDING, Made, make
from drlora.export.readme import readme
from drlora.export.updates import Updates, base_of, collect_updates
from drlora.io.places import from_root
from drlora.ops.merge import Rounding

FORMATS = ("peft", "per-expert", "merged")
RANKS = ("padded", "auto")
VERSIONS = {module.__name__: module.__version__ for module in (peft, torch, transformers)}
RECORD = "drlora_export.json"
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD, "README.md")
MERGED_FILES = ("config.json", "generation_config.json", "model*.safetensors",
                "the tokenizer's files", RECORD, "README.md")  # fmt: skip


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write.

    Attributes:
        format: `peft`, `per-expert` or `merged`.
        adapter: name of the exported adapter.
        rank: the one rank of the export; None if merged.
        owned: smallest, mean and largest rank of an expert in the adapter.
        weight_bytes: size of the written weights.
        files: names of the files to be written.
        notes: what the user should know.
        updates: the contents; None if merged.
    """

    format: str
    adapter: str
    rank: int | None
    owned: tuple[int, float, int]
    weight_bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    updates: Updates | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        low, mean, high = self.owned
        return {
            "format": self.format,
            "rank": self.rank,
            "adapter_ranks": {"smallest": low, "mean": mean, "largest": high},
            "weight_bytes": self.weight_bytes,
            "files": list(self.files),
            "notes": list(self.notes),
        }


def make_plan(model: PeftModel, format: str, rank: str = "padded") -> ExportPlan:
    """The plan for the active adapter of `model`, whose base weights may be on the meta device.

    Args:
        model: a model with a DR-LoRA adapter.
        format: one of `FORMATS`.
        rank: `padded`: all ranks are filled up to the largest; `auto`: each update is first brought
            to its numerical rank, which changes nothing but may be smaller.

    Raises:
        ConfigError: if the format or the rank is not known, or the model cannot have the format.
        CheckpointError: if the adapter holds NaN or infinite weights, or PEFT would not read its
            own LoRA on this model back.
    """
    for name, value, choices in (("format", format, FORMATS), ("rank", rank, RANKS)):
        if value not in choices:
            raise ConfigError(f"{name}={value!r} is not known; choose one of {list(choices)}.")
    adapter, base = model.active_adapter, cast(PreTrainedModel, model.get_base_model())
    _refuse_not_finite(base, adapter)
    owned = _owned_ranks(base, adapter)
    if format == "merged":
        if rank != "padded":
            raise ConfigError(
                f"rank={rank!r} is for the formats peft and per-expert; leave it out."
            )
        refuse_fixed_weights(base)
        return ExportPlan(format, adapter, None, owned, _merged_bytes(base), MERGED_FILES, (), None)
    updates = collect_updates(model, adapter, all_matrices=format == "per-expert")
    notes = []
    if updates.embeddings:
        notes.append("the embeddings were resized; their rows and the tokenizer are in the export")
    if rank == "auto":
        smaller = updates.shrunk()
        notes.append(f"rank auto: padded to {smaller.rank} instead of {updates.rank}")
        updates = smaller
    if format == "per-expert":
        notes += per_expert.notes(updates, base)
        size = _bytes(per_expert.make_tensors(updates, base))
    else:
        peft_lora.refuse_if_not_readable(base, updates)
        size = peft_lora.size_bytes(updates)
    return ExportPlan(
        format, adapter, updates.rank, owned, size, ADAPTER_FILES, tuple(notes), updates
    )


def apply_plan(
    plan: ExportPlan,
    model: PeftModel,
    batches: Sequence[Batch],
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: dict[str, Any] | None = None,
    max_shard_size: str | None = None,
    rounding: Rounding = ROUNDING,
) -> Made:
    """Validate and write; `model` is used up.

    Args:
        plan: from `make_plan` on a model with the same adapter.
        model: the model with its weights.
        batches: `input_ids` and `attention_mask`, int64 (B, L), on which logits are compared.
        folder: where to write; must not exist or be empty.
        tokenizer: written beside merged weights, and wherever the adapter has tokens of its own.
        record: what else to say in the record, such as where the adapter came from.
        max_shard_size: of one file of merged weights, such as `5GB`; by default transformers' own.
        rounding: of merged weights in 16 bits.

    Returns:
        The export, how far it is off, and what rounding did.

    Raises:
        ConfigError: if `folder` holds something.
        CheckpointError: if the export does not do what the adapter does; nothing is written then.
    """
    refuse_full_folder(folder)
    made = make(plan.format, plan.updates, model, batches, rounding)
    refuse_if_different(made.difference, f"the export as {plan.format}")
    said = {
        **plan.to_dict(),
        **(record or {}),
        "notes": [*plan.notes, *made.notes],
        "logits": made.difference.to_dict(),
        "rounding": made.rounding,
        "versions": VERSIONS,
    }
    with _written_at_once(Path(folder)) as temporary:
        _write_weights(plan, made.result, tokenizer, temporary, max_shard_size)
        (temporary / RECORD).write_text(json.dumps(said, indent=2) + "\n", "utf-8")
        (temporary / "README.md").write_text(readme(said, str(made.difference)), "utf-8")
    return made


def refuse_full_folder(folder: str | Path) -> None:
    """Raises:
    ConfigError: if `folder` is a file or holds something.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not an empty folder; name another one to export to.")


def _refuse_not_finite(base: nn.Module, adapter: str) -> None:
    for name, layer in adapted_layers(base, adapter).items():
        for key, parameter in layer.adapter(adapter).named_parameters():
            if not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"the adapter has NaN or infinite weights in {name} ({key}); it cannot be "
                    f"exported. Go back to a checkpoint from before its loss became NaN."
                )


def _owned_ranks(base: nn.Module, adapter: str) -> tuple[int, float, int]:
    """Smallest, mean and largest rank of an expert in a projection."""
    ranks = [
        rank
        for layer in adapted_layers(base, adapter).values()
        for ranks_E in layer.adapter(adapter).ranks().values()
        for rank in ranks_E
    ]
    return min(ranks), sum(ranks) / len(ranks), max(ranks)


def _merged_bytes(base: PreTrainedModel) -> int:
    """Size of the merged model's weights; tied ones once, unless one of them was trained alone."""
    added = (".lora_", ".drlora_adapters.", ".modules_to_save.", ".trainable_tokens_")
    own = [p for name, p in base.named_parameters() if not any(part in name for part in added)]
    size = sum(p.numel() * p.element_size() for p in own)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = any(hasattr(end, "original_module") for end in (head, embedding))
    if has_tied_embeddings(base) and (adapted or hasattr(head, "base_layer")):
        weight = next(iter(embedding.parameters()))
        size += weight.numel() * weight.element_size()
    return size


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _write_weights(
    plan: ExportPlan,
    result: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    max_shard_size: str | None,
) -> None:
    if plan.updates and plan.updates.embeddings and tokenizer is not None:
        tokenizer.save_pretrained(folder)  # by its tokens PEFT's AutoPeftModel resizes the base
    if plan.format == "per-expert":
        assert plan.updates is not None
        base = base_of(result, "default")
        tensors = per_expert.make_tensors(plan.updates, base)
        config = per_expert.make_config(plan.updates, base, tensors)
        config.inference_mode = True
        config.base_model_name_or_path = _named_from_root(config)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        return
    if plan.format == "peft":
        assert plan.updates is not None
        config = result.peft_config["default"]
        config.base_model_name_or_path = _named_from_root(config)
        result.save_pretrained(folder, save_embedding_layers=bool(plan.updates.embeddings))
        return
    result.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _named_from_root(config: PeftConfig) -> str | None:
    """The base model, so that it is found from any working directory."""
    name = config.base_model_name_or_path
    return from_root(name) if name else None


@contextmanager
def _written_at_once(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when nothing went wrong."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's own is for the user alone
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
