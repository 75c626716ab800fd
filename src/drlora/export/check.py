"""Whether an export does what the adapter does: errors as shares of the adapter's own effect.

A bound on the logits alone cannot be right in 16 bits: a forward pass in bfloat16 is off by more
than a mild adapter does. So everything is computed in float32 from the stored weights, every
weight is compared by itself, and logits are compared beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drlora.errors import CheckpointError
from drlora.export.float32 import Prepare, in_float32
from drlora.export.reference import ALLOWED, Deviation

Batch = Mapping[str, Tensor]
# What float32 itself may do to logits, beside the share of the adapter's effect; and 16 bits, where
# weights of a quantiser's own kind cannot be widened.
NOISE, NOISE_16_BIT = 1e-5, 3e-2
# Rounding moves a token now and then between two experts that are nearly tied.
LEFT_OUT = 0.05


@dataclass(frozen=True)
class Difference:
    """How far an export is from the adapter.

    Attributes:
        tokens: number of tokens whose logits were compared.
        largest: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the adapter.
        root_mean_square: of the differences, divided by that of the logits.
        effect: what the adapter does to the base model's logits, in the same measure.
        error: root mean square of the differences, without the tokens (5 %) that differ most, in
            the same measure.
        weight: where the weight is that is furthest from what the adapter makes of it.
        of_weight_effect: its error, divided by what the adapter does to it.
        dtype: that the weights are stored in.
        noise: what the dtype that is computed in, float32 if it can be had, may do to logits, in
            the measure of `error`.
        loss: of `base`, `adapter` and `export` on the batches, where they have labels.
    """

    tokens: int
    largest: float
    largest_logit: float
    root_mean_square: float
    effect: float
    error: float
    weight: str
    of_weight_effect: float
    dtype: str
    noise: float = NOISE
    loss: dict[str, float] | None = None

    @property
    def is_rounding(self) -> bool:
        """Whether weights and logits are as near as float32 makes them; not so for NaN."""
        near = self.error <= ALLOWED * self.effect + self.noise
        return self.of_weight_effect <= ALLOWED and near

    @property
    def of_effect(self) -> float:
        """The error as a share of the adapter's effect."""
        return ratio(self.error, self.effect)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        share = self.of_effect
        return {**asdict(self), "of_effect": share if math.isfinite(share) else None}

    def __str__(self) -> str:
        computed = "in float32" if self.noise == NOISE else "in their own dtype"
        losses = ""
        if self.loss is not None:
            base, adapter, export = (self.loss[name] for name in ("base", "adapter", "export"))
            losses = (
                f"; their loss is {base:.4f} without the adapter, {adapter:.4f} with it, "
                f"{export:.4f} exported"
            )
        return (
            f"the adapter moves the logits by {self.effect:.2%}, the export is off by "
            f"{self.of_effect:.2g} of that, in its worst weight by {self.of_weight_effect:.2g} "
            f"(allowed {ALLOWED:g}; {self.tokens} tokens, {self.dtype} weights, {computed}){losses}"
        )


@torch.no_grad()
def logits_of(
    model: nn.Module, batches: Sequence[Batch], prepare: Prepare | None = None
) -> list[Tensor]:
    """For each batch (N, V) float32 logits of its real tokens, on the CPU; computed in float32.

    `prepare`: see `in_float32`.
    """
    model.eval()
    device = next(model.parameters()).device
    found = []
    with in_float32(model, prepare):
        for batch in batches:
            mask_BL = batch["attention_mask"]
            inputs = {"input_ids": batch["input_ids"], "attention_mask": mask_BL}
            logits_BLV = model(
                **{key: x.to(device) for key, x in inputs.items()}, use_cache=False
            ).logits
            logits = logits_BLV.float().cpu()  # (B, V) of a model that classifies whole texts
            found.append(logits[mask_BL.cpu() != 0] if logits.dim() == 3 else logits)
    return found


def loss_of(logits: Sequence[Tensor], batches: Sequence[Batch]) -> float | None:
    """Mean cross-entropy of the tokens that are learned; None without labels.

    Args:
        logits: from `logits_of` for these batches.
        batches: with `labels`, int64 (B, L), -100 where nothing is learned.
    """
    total, count = 0.0, 0
    for logits_NV, batch in zip(logits, batches, strict=True):
        mask_BL = batch["attention_mask"].cpu() != 0
        if batch.get("labels", mask_BL[0]).dim() != 2 or len(logits_NV) != int(mask_BL.sum()):
            return None
        next_BL = F.pad(batch["labels"].cpu()[:, 1:], (0, 1), value=-100)
        targets_N = next_BL[mask_BL]
        total += F.cross_entropy(logits_NV, targets_N, reduction="sum").item()
        count += int((targets_N != -100).sum())
    return total / count if count else None


class Gap:
    """The differences between logits, token by token; no logits are kept."""

    def __init__(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        gaps = [a_NV - b_NV for a_NV, b_NV in zip(one, other, strict=True)]
        self.largest = max(gap_NV.abs().max().item() for gap_NV in gaps)
        self.squares_N = torch.cat([_mean_square(gap_NV) for gap_NV in gaps])

    @property
    def root_mean_square(self) -> float:
        """Over all tokens and logits."""
        return self.squares_N.mean().sqrt().item()

    @property
    def trimmed(self) -> float:
        """The same without the tokens that differ most."""
        kept = len(self.squares_N) - math.ceil(LEFT_OUT * len(self.squares_N))
        return self.squares_N.sort().values[: max(kept, 1)].mean().sqrt().item()


def difference(
    wanted: Sequence[Tensor],
    got: Sequence[Tensor],
    effect: Gap,
    weights: Deviation,
    dtype: torch.dtype,
    widened: bool,
    loss: dict[str, float] | None = None,
) -> Difference:
    """How far an export is from the adapter.

    Args:
        wanted: logits that the export must give.
        got: logits that it gives.
        effect: between the adapter's logits and the base model's.
        weights: from the comparison of its weights.
        dtype: that they are stored in.
        widened: whether logits were computed in float32.
        loss: see `Difference`.
    """
    gap = Gap(got, wanted)
    scale = _root_mean_square(wanted)
    return Difference(
        tokens=len(gap.squares_N),
        largest=gap.largest,
        largest_logit=max(want_NV.abs().max().item() for want_NV in wanted),
        root_mean_square=gap.root_mean_square / scale,
        effect=effect.root_mean_square / scale,
        error=gap.trimmed / scale,
        weight=weights.where,
        of_weight_effect=weights.share,
        dtype=str(dtype).removeprefix("torch."),
        noise=NOISE if widened or dtype == torch.float32 else NOISE_16_BIT,
        loss=loss,
    )


def _mean_square(x_NV: Tensor) -> Tensor:
    """(N,) float64, over the logits of each token."""
    return x_NV.square().mean(dim=1, dtype=torch.float64)


def _root_mean_square(logits: Sequence[Tensor]) -> float:
    squares_N = torch.cat([_mean_square(x_NV) for x_NV in logits])
    return max(squares_N.mean().sqrt().item(), 1e-30)


def ratio(error: float, effect: float) -> float:
    """`error` as a share of `effect`; no error is none of any effect."""
    if error == 0:
        return 0.0
    return error / effect if effect else math.inf


def refuse_if_different(found: Difference, what: str) -> None:
    """Raises:
    CheckpointError: if more than rounding lies between the adapter and its export.
    """
    if found.is_rounding:
        return
    if not found.of_weight_effect <= ALLOWED:
        share = _percent(found.of_weight_effect)
        where = f"{found.weight} is off by {share} of what the adapter does to it"
    else:
        share = _percent(found.of_effect)
        where = f"its logits are off by {share} of what the adapter does to them"
    raise CheckpointError(
        f"{what} does not do what the adapter does: {where}; allowed is {ALLOWED:.0%} "
        f"({found}). Nothing was written. Please report it, with the model's name."
    )


def _percent(share: float) -> str:
    return f"{share:.3%}" if share < 1e4 else "far more than 100 %"
