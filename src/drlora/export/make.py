"""How far an export in memory is from the adapter; each format makes its own (see `format`).

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

from drlora.export.check import (
    Batch,
    Difference,
    Gap,
    difference,
    logits_of,
    loss_of,
    ratio,
)
from drlora.export.factors import Factors
from drlora.export.float32 import NARROW, can_be_widened
from drlora.export.merging import as_if_merged, round_trained, untie
from drlora.export.reference import Deviation, Reference
from drlora.export.updates import Updates
from drlora.ops.merge import Rounding

ROUNDING = Rounding("stochastic")


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
class Measured:
    """What is known before the export is made.

    Attributes:
        adapter: its name.
        reference: what it changes, with modules that were trained in full in the base's dtype.
        dtype: of the base.
        batches: what logits are compared on.
        effect: between the logits of the adapter and of the base.
        wanted: logits that the export must give.
        cost: what rounding alone does to them, as a share of the effect.
        loss: of the base and of the adapter on the batches; None where they have no labels.
    """

    adapter: str
    reference: Reference
    dtype: torch.dtype
    batches: Sequence[Batch]
    effect: Gap
    wanted: list[Tensor]
    cost: float
    loss: dict[str, float] | None

    def compared(self, result: Any, weights: Deviation) -> Difference:
        """How far the export `result` is off, whose `weights` were compared already."""
        got = logits_of(result, self.batches)
        wide, loss = can_be_widened(result), None
        if self.loss is not None and (own := loss_of(got, self.batches)) is not None:
            loss = {**self.loss, "export": own}
        return difference(self.wanted, got, self.effect, weights, self.dtype, wide, loss)


def measured(
    model: PeftModel,
    batches: Sequence[Batch],
    rounding: Rounding,
    merged: bool,
    updates: Updates | None = None,
) -> Measured:
    """Measure the active adapter of `model`, and prepare its modules for what will be exported.

    Args:
        model: the model with its weights.
        batches: `input_ids` and `attention_mask`, int64 (B, L).
        rounding: of the export.
        merged: whether it is the base with the adapter in its weights.
        updates: of the export, for the routers that leave as LoRA; None if it has none.
    """
    adapter, dtype = model.active_adapter, cast(PreTrainedModel, model.get_base_model()).dtype
    with model.disable_adapter():
        plain = logits_of(model, batches)
    adapted = logits_of(model, batches)
    effect = Gap(adapted, plain)
    before, after = (loss_of(logits, batches) for logits in (plain, adapted))
    loss = None if before is None or after is None else {"base": before, "adapter": after}
    del plain
    routers = updates.routers if updates else {}
    is_changed = round_trained(model, adapter, rounding, besides=routers)
    for name in (name for name, lost in routers.items() if lost):
        assert updates is not None
        _cut_router(model, adapter, name, updates.linears[name])
        is_changed = True
    reference, wanted = Reference.of(model, adapter).with_routers_as_lora(routers), adapted
    if merged:
        untie(model, reference)
    if merged and dtype in NARROW and can_be_widened(model):
        with as_if_merged(model, reference, rounding) as prepare:
            wanted = logits_of(model, batches, prepare)
    elif is_changed:
        wanted = logits_of(model, batches)
    cost = ratio(Gap(wanted, adapted).trimmed, effect.root_mean_square)
    return Measured(adapter, reference, dtype, batches, effect, wanted, cost, loss)


@torch.no_grad()
def _cut_router(model: PeftModel, adapter: str, name: str, factors: Factors) -> None:
    """Leave of a trained router what the export's LoRA holds of it."""
    wrapper: Any = model.get_base_model().get_submodule(name)
    weight, before_EH = wrapper.modules_to_save[adapter].weight, wrapper.original_module.weight
    update_EH = factors.b[0].double() @ factors.a[0].double()
    weight.copy_(before_EH.double() + update_EH.to(weight.device))
