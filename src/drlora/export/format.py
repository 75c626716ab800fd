"""What a format of an export is: a plan, an export in memory that is checked, files.

    plan     what will be written; refuses what the format has no place for; reads no base weights
    make     the export in memory, measured against the adapter (see `make`)
    write    its files, into an empty folder

`LoraFormat` has the first two for whatever PEFT can put on the base model as a plain LoRA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora.export.attached import compare_attached
from drlora.export.check import Batch
from drlora.export.make import Made, measured
from drlora.export.reference import compare_trained
from drlora.export.routers import can_be_lora, note_on, routers_as_lora
from drlora.export.updates import Updates, base_of, collect_updates
from drlora.io.places import from_root
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPORT_RECORD, README
from drlora.ops.merge import NEAREST, Rounding


@dataclass(frozen=True)
class Contents:
    """What a format will write.

    Attributes:
        updates: of the adapter, as they are written; None where weights are written whole.
        weight_bytes: size of the written weights.
        notes: what the user should know.
    """

    updates: Updates | None
    weight_bytes: int
    notes: tuple[str, ...] = ()


class Format(ABC):
    """One format.

    Attributes:
        name: as `--format` and `drlora_export.json` say it.
        summary: a sentence or two for the README of an export; `{rank}` stands for its one rank.
        loading: Python for the README that loads it, `{base}` being the base model; "" if an engine
            does.
        files: what is written.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    loading: ClassVar[str] = ""
    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def plan(self, model: PeftModel, adapter: str, rank: str, routers: str = "auto") -> Contents:
        """What an export will write.

        Args:
            model: carries the adapter; its base weights may be on the meta device.
            adapter: its name.
            rank: `padded` or `auto`, see `make_plan`.
            routers: one of `choices.ROUTERS`, see `make_plan`.

        Raises:
            ConfigError: if the format has no place for the adapter, or none for `rank` or
                `routers`.
            CheckpointError: if what would be written could not be read back.
        """

    @abstractmethod
    def make(
        self,
        updates: Updates | None,
        model: PeftModel,
        batches: Sequence[Batch],
        rounding: Rounding,
    ) -> Made:
        """The export in memory, and how far it is from the adapter; `model` is used up.

        Args:
            updates: of the plan.
            model: the model with its weights; its active adapter is exported.
            batches: `input_ids` and `attention_mask`, int64 (B, L), on which logits are compared.
            rounding: of what is written in 16 bits.
        """

    @abstractmethod
    def write(
        self,
        made: Made,
        updates: Updates | None,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        max_shard_size: str | None,
    ) -> None:
        """Write the files but the record and the README.

        Args:
            made: from `make`.
            updates: of the plan.
            folder: an empty one.
            tokenizer: of the model, if there is one.
            max_shard_size: of one file of weights, such as `5GB`; None: transformers' own.
        """


class LoraFormat(Format):
    """A format that PEFT, without drlora, can put on the base model as a LoRA.

    Attributes:
        all_matrices: whether a matrix of the experts that is not adapted is written at rank 0.
        routers: what `auto` stands for: how its readers take trained routers.
    """

    files: ClassVar[tuple[str, ...]] = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPORT_RECORD, README)
    all_matrices: ClassVar[bool] = False
    routers: ClassVar[str] = "full"

    @abstractmethod
    def attach(self, base: PreTrainedModel, updates: Updates) -> PeftModel:
        """`base` with what PEFT makes of the export, as the adapter `default`."""

    def peft_loads(self, base: PreTrainedModel) -> bool:
        """Whether PEFT itself loads such a folder."""
        return True

    @abstractmethod
    def size_bytes(self, base: PreTrainedModel, updates: Updates) -> int:
        """Of the written tensors; refuses what could not be read back."""

    def notes(self, base: PreTrainedModel, updates: Updates) -> list[str]:
        """What the user of such an export should know."""
        return []

    def plan(self, model: PeftModel, adapter: str, rank: str, routers: str = "auto") -> Contents:
        """All updates at one rank."""
        base: Any = model.get_base_model()
        updates = collect_updates(model, adapter, self.all_matrices)
        notes = []
        if updates.embeddings:
            notes.append(
                "the embeddings were resized; their rows and the tokenizer are in the export"
            )
        if rank == "auto":
            smaller = updates.shrunk()
            notes.append(f"rank auto: padded to {smaller.rank} instead of {updates.rank}")
            updates = smaller
        kind = routers
        if kind == "auto":
            kind = self.routers if can_be_lora(updates, model, adapter) else "full"
        if kind != "full":
            before = updates.rank
            updates = routers_as_lora(updates, model, adapter, exact=kind == "exact")
            if updates.rank > before:
                notes.append(
                    f"the rank is raised from {before} to {updates.rank} for the routers; "
                    f"--routers lora keeps it, and leaves a part of them out"
                )
        notes += [*note_on(updates), *self.notes(base, updates)]
        return Contents(updates, self.size_bytes(base, updates), tuple(notes))

    def make(
        self,
        updates: Updates | None,
        model: PeftModel,
        batches: Sequence[Batch],
        rounding: Rounding,
    ) -> Made:
        """The base with the LoRA that PEFT reads, each weight compared."""
        assert updates is not None
        known = measured(model, batches, NEAREST, merged=False, updates=updates)
        base = base_of(model, known.adapter)
        result = self.attach(base, updates)
        weights = compare_attached(result, known.reference)
        copies: Any = base.get_submodule
        compare_trained(weights, lambda n: copies(n).modules_to_save["default"], known.reference)
        notes = []
        if known.cost:
            cause = (
                "what is left out of the routers"
                if any(updates.routers.values())
                else f"trained routers are in {known.dtype} beside this base; that rounding"
            )
            effect = "of what the adapter does to them"
            notes.append(f"{cause} moves logits by {known.cost:.1%} {effect}")
        return Made(result, known.compared(result, weights), None, notes)


def write_tokens(updates: Updates, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """The tokenizer of an adapter that has tokens of its own: by it PEFT's AutoPeftModel resizes
    the base.
    """
    if updates.embeddings and tokenizer is not None:
        tokenizer.save_pretrained(folder)


def name_base_from_root(config: Any) -> None:
    """Let a configuration of PEFT's name its base so that it is found from any directory."""
    name = config.base_model_name_or_path
    config.base_model_name_or_path = from_root(name) if name else None
