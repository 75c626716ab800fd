"""Exports in three steps: plan, validate, apply.

    plan = make_plan(model, "peft")               # ranks, sizes, files; refuses what cannot be
    made = apply_plan(plan, model, batches, "out")

What is said here holds for every format (see `format`). `apply_plan` has the export made in memory
and compared with the adapter; only then are files written, into a folder beside the target that is
renamed when it is complete, or into one in it, where it is there already.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora.adapter.inject import adapted_layers
from drlora.errors import CheckpointError, ConfigError
from drlora.export.check import Batch, refuse_if_different
from drlora.export.choices import RANKS, ROUTERS
from drlora.export.engines import LAYOUTS, Facts, Reading, readings
from drlora.export.format import Contents, Format, LoraFormat
from drlora.export.formats import FORMATS
from drlora.export.make import ROUNDING, Made
from drlora.export.readme import readme
from drlora.export.reference import Reference
from drlora.export.updates import Updates
from drlora.io.run_files import EXPORT_RECORD, README
from drlora.ops.merge import Rounding

VERSIONS = {module.__name__: module.__version__ for module in (peft, torch, transformers)}


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write.

    Attributes:
        format: a name of `FORMATS`.
        adapter: name of the exported adapter.
        rank: the one rank of the export; None if merged.
        owned: smallest, mean and largest rank of an expert in the adapter.
        weight_bytes: size of the written weights.
        files: names of the files to be written.
        notes: what the user should know.
        updates: the contents; None if merged.
        readings: what each engine does with it; none for a format of a program's own.
    """

    format: str
    adapter: str
    rank: int | None
    owned: tuple[int, float, int]
    weight_bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    updates: Updates | None
    readings: tuple[Reading, ...] = ()

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
            "engines": [reading.to_dict() for reading in self.readings],
            **({"routers_as_lora": self.updates.routers} if self.updates else {}),
        }


def make_plan(
    model: PeftModel, format: str, rank: str = "padded", routers: str = "auto"
) -> ExportPlan:
    """The plan for the active adapter of `model`, whose base weights may be on the meta device.

    Args:
        model: a model with a DR-LoRA adapter.
        format: a name of `drlora.export.formats.FORMATS`.
        rank: `padded`: all ranks are filled up to the largest; `auto`: each update is first brought
            to its numerical rank, which changes nothing but may be smaller.
        routers: how trained routers leave. `lora`: as LoRA of the export's rank, which loses a part
            where that is less than the number of experts; `exact`: as LoRA, and the rank of all is
            raised where it is less; `full`: as weights, which engines refuse and PEFT reads;
            `auto`: `exact` for per-expert, `full` for peft.

    Raises:
        ConfigError: if the format, the rank or the form of routers is not known, or the model
            cannot have it.
        CheckpointError: if the adapter holds NaN or infinite weights, or PEFT would not read its
            own LoRA on this model back.
    """
    if rank not in RANKS:
        raise ConfigError(f"rank={rank!r} is not known; choose one of {list(RANKS)}.")
    if routers not in ROUTERS:
        raise ConfigError(f"routers={routers!r} is not known; choose one of {list(ROUTERS)}.")
    kind, adapter, base = FORMATS[format], model.active_adapter, model.get_base_model()
    _refuse_not_finite(base, adapter)
    found = kind.plan(model, adapter, rank, routers)
    written_at = found.updates.rank if found.updates else None
    return ExportPlan(
        format,
        adapter,
        written_at,
        _owned_ranks(base, adapter),
        found.weight_bytes,
        kind.files,
        found.notes,
        found.updates,
        _readings(kind, found, cast(PreTrainedModel, base)),
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
        ConfigError: if `folder` holds something, or the plan lacks routers.
        CheckpointError: if the export does not do what the adapter does; nothing is written then.
    """
    refuse_full_folder(folder)
    if plan.updates and plan.updates.is_sketch:
        raise ConfigError(
            "the plan was made on a model without weights, so it has no trained routers to write; "
            "make it on the model that is exported."
        )
    kind = FORMATS[plan.format]
    is_nothing = Reference.of(model, model.active_adapter).is_nothing
    made = kind.make(plan.updates, model, batches, rounding)
    if is_nothing:
        made.notes.append("the adapter changes nothing: every B is zero, as before training")
    refuse_if_different(made.difference, f"the export as {plan.format}")
    said = {
        **(record or {}),
        "notes": [*plan.notes, *made.notes],
        "logits": made.difference.to_dict(),
        "rounding": made.rounding,
    }
    with written_at_once(Path(folder)) as temporary:
        kind.write(made, plan.updates, temporary, tokenizer, max_shard_size)
        write_about(temporary, plan, said, str(made.difference))
    return made


def write_about(folder: Path, plan: ExportPlan, said: dict[str, Any], checked: str) -> None:
    """The record and the README of an export.

    Args:
        folder: that it is in.
        plan: of the export.
        said: what the record has besides; its `notes` take the place of the plan's.
        checked: what was found when it was checked, in words.
    """
    record = {**plan.to_dict(), **said, "versions": VERSIONS}
    (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    (folder / README).write_text(readme(FORMATS[plan.format], record, checked), "utf-8")


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


def _readings(kind: Format, found: Contents, base: PreTrainedModel) -> tuple[Reading, ...]:
    if kind.name not in LAYOUTS:
        return ()
    updates = found.updates
    loads = kind.peft_loads(base) if isinstance(kind, LoraFormat) else True
    facts = Facts(kind.name, base.config.model_type, peft_loads=loads)
    if updates is not None:
        facts = replace(
            facts,
            rank=updates.rank,
            has_modules=bool(updates.modules or updates.embeddings),
            has_router_lora=bool(updates.routers),
        )
    return tuple(readings(facts))


def _owned_ranks(base: nn.Module, adapter: str) -> tuple[int, float, int]:
    """Smallest, mean and largest rank of an expert in a projection."""
    ranks = [
        rank
        for layer in adapted_layers(base, adapter).values()
        for ranks_E in layer.adapter(adapter).ranks().values()
        for rank in ranks_E
    ]
    return min(ranks), sum(ranks) / len(ranks), max(ranks)


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files are in `folder` when nothing went wrong.

    An empty `folder` stays the one it is: it may be the working directory, what a link leads to, or
    a disk of its own, none of which another can take the place of.
    """
    folder = folder.resolve()
    is_there = folder.is_dir()
    place = folder if is_there else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=place))
    try:
        yield temporary
        if is_there:
            # The record last: an export that has one is complete.
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == EXPORT_RECORD):
                path.replace(folder / path.name)
            temporary.rmdir()
        else:
            temporary.chmod(0o755)  # mkdtemp's own is for the user alone
            temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
