"""The exported model in memory, and how far it is from the adapter.

    1. logits of the base and of the adapter, in float32: their difference is the adapter's effect
    2. the export is made, and every weight compared with what the adapter makes of it
    3. logits of the export, in float32, against those that it must give

A merge in 16 bits cannot give the adapter's own logits, since weights are rounded. What it must
give is known all the same: the logits of the base with each sum rounded as the merge rounds it.
What that rounding costs is told, not refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from drlora.export import peft_lora, per_expert
from drlora.export.attached import compare_attached
from drlora.export.check import Batch, Difference, Gap, difference, logits_of, ratio
from drlora.export.float32 import NARROW, can_be_widened
from drlora.export.merging import as_if_merged, merge, round_trained, untie
from drlora.export.reference import Deviation, Reference, compare_trained
from drlora.export.updates import Updates, base_of
from drlora.ops.merge import NEAREST, Rounding

ROUNDING = Rounding("stochastic")
WORTH_SAYING = 0.1  # of the adapter's effect


@dataclass(frozen=True)
class Made:
    """An export that is not written yet.

    Attributes:
        result: the model, or the PeftModel.
        difference: between it and the adapter.
        rounding: of a merge, for the record: mode, seed, the share of updated entries that rounded
            back to what they were, the part of the update that is in the weights, and what
            rounding does to the logits as a share of the adapter's effect.
        notes: what the user should know.
    """

    result: Any
    difference: Difference
    rounding: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Measured:
    """What is known before the export is made.

    Attributes:
        adapter: its name.
        reference: what it changes, with modules that were trained in full in the base's dtype.
        dtype: of the base.
        effect: between the logits of the adapter and of the base.
        wanted: logits that the export must give.
        cost: what rounding alone does to them, as a share of the effect.
    """

    adapter: str
    reference: Reference
    dtype: torch.dtype
    effect: Gap
    wanted: list[Tensor]
    cost: float


def make(
    format: str,
    updates: Updates | None,
    model: PeftModel,
    batches: Sequence[Batch],
    rounding: Rounding = ROUNDING,
) -> Made:
    """Make an export of the active adapter and compare it with that; `model` is used up.

    Args:
        format: `peft`, `per-expert` or `merged`.
        updates: what is exported; None if merged.
        model: the model with its weights.
        batches: `input_ids` and `attention_mask`, int64 (B, L), on which logits are compared.
        rounding: of merged weights in 16 bits.
    """
    dtype = cast(PreTrainedModel, model.get_base_model()).dtype
    is_nothing = Reference.of(model, model.active_adapter).is_nothing
    if updates is not None or dtype not in NARROW:
        rounding = NEAREST
    known = _measure(model, batches, dtype, rounding, merged=updates is None)
    if updates is None:
        made = _merged(model, known, batches, rounding)
    else:
        made = _attached(format, updates, model, known, batches)
    if is_nothing:
        made.notes.append("the adapter changes nothing: every B is zero, as before training")
    return made


def _measure(
    model: PeftModel,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    rounding: Rounding,
    merged: bool,
) -> _Measured:
    adapter = model.active_adapter
    with model.disable_adapter():
        plain = logits_of(model, batches)
    adapted = logits_of(model, batches)
    effect = Gap(adapted, plain)
    del plain
    is_rounded = round_trained(model, adapter, rounding)
    reference, wanted = Reference.of(model, adapter), adapted
    if merged:
        untie(model, reference)
    if merged and dtype in NARROW and can_be_widened(model):
        with as_if_merged(model, reference, rounding) as prepare:
            wanted = logits_of(model, batches, prepare)
    elif is_rounded:
        wanted = logits_of(model, batches)
    cost = ratio(Gap(wanted, adapted).trimmed, effect.root_mean_square)
    return _Measured(adapter, reference, dtype, effect, wanted, cost)


def _merged(
    model: PeftModel, known: _Measured, batches: Sequence[Batch], rounding: Rounding
) -> Made:
    base, weights, kept = merge(model, known.adapter, known.reference, rounding)
    compare_trained(weights, base.get_submodule, known.reference)
    found = _compare(base, known, batches, weights)
    if known.dtype not in NARROW:
        return Made(base, found)
    said = {
        "mode": rounding.mode,
        "seed": rounding.seed if rounding.mode == "stochastic" else None,
        "unmoved": kept.unmoved_share,
        "kept": kept.share,
        "of_effect": known.cost,
    }
    notes = [_in_words(said, found.dtype)] if kept.entries else []
    return Made(base, found, said, notes)


def _attached(
    format: str,
    updates: Updates,
    model: PeftModel,
    known: _Measured,
    batches: Sequence[Batch],
) -> Made:
    base = base_of(model, known.adapter)
    attach = per_expert.read_back if format == "per-expert" else peft_lora.attach
    result = attach(base, updates)
    weights = compare_attached(result, known.reference)
    copies: Any = base.get_submodule
    compare_trained(weights, lambda n: copies(n).modules_to_save["default"], known.reference)
    notes = []
    if known.cost:
        notes.append(
            f"trained routers are in {known.dtype} beside this base; that rounding moves "
            f"logits by {known.cost:.1%} of what the adapter does to them"
        )
    return Made(result, _compare(result, known, batches, weights), None, notes)


def _compare(
    result: Any, known: _Measured, batches: Sequence[Batch], weights: Deviation
) -> Difference:
    got = logits_of(result, batches)
    wide = can_be_widened(result)
    return difference(known.wanted, got, known.effect, weights, known.dtype, wide)


def _in_words(said: dict[str, Any], dtype: str) -> str:
    way_out = "; merge into a float32 base, or export as peft, to lose none of it"
    return (
        f"rounding to {dtype} ({said['mode']}): {said['unmoved']:.1%} of the updated entries are "
        f"as they were, {said['kept']:.1%} of the update is in the weights; logits move by "
        f"{said['of_effect']:.1%} of what the adapter does to them"
        f"{way_out if said['of_effect'] > WORTH_SAYING else ''}"
    )
