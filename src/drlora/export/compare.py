"""Whether two models give the same logits, and by how much they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drlora.errors import CheckpointError

Batch = Mapping[str, Tensor]
# Largest difference that rounding explains. In 16-bit models it is the root mean square that is
# bounded: rounding swaps experts where two are nearly tied, so single logits may differ widely.
ALLOWED_FLOAT32 = 1e-5
ALLOWED_16_BIT = {torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Difference:
    """How far logits lie apart, over all real tokens of a few batches.

    Attributes:
        tokens: number of tokens compared.
        largest: largest absolute difference.
        largest_logit: largest absolute logit of the adapter.
        root_mean_square: of the differences, divided by that of the logits.
        dtype: of the model's weights.
        allowed: on `largest / max(1, largest_logit)` in float32, on `root_mean_square` in 16 bits.
    """

    tokens: int
    largest: float
    largest_logit: float
    root_mean_square: float
    dtype: str
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is as small as rounding makes it; not so for NaN."""
        sixteen_bit = self.dtype in {str(dtype).removeprefix("torch.") for dtype in ALLOWED_16_BIT}
        found = self.root_mean_square if sixteen_bit else self.largest / max(1, self.largest_logit)
        return found <= self.allowed

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2g} (largest logit {self.largest_logit:.3g}), "
            f"root mean square {self.root_mean_square:.2g} of the logits', "
            f"{self.tokens} tokens in {self.dtype}"
        )


@torch.no_grad()
def logits_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """For each batch (N, V) float32 logits of its real tokens, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        mask_BL = batch["attention_mask"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask_BL}
        logits_BLV = model(
            **{key: x.to(device) for key, x in inputs.items()}, use_cache=False
        ).logits
        found.append(logits_BLV.float().cpu()[mask_BL.cpu() != 0])
    return found


def compare(wanted: Sequence[Tensor], model: nn.Module, batches: Sequence[Batch]) -> Difference:
    """How far `model` is from the logits `wanted`."""
    want_NV, got_NV = torch.cat(list(wanted)), torch.cat(logits_of(model, batches))
    gap_NV = got_NV - want_NV
    dtype = next(model.parameters()).dtype
    return Difference(
        tokens=len(want_NV),
        largest=gap_NV.abs().max().item(),
        largest_logit=want_NV.abs().max().item(),
        root_mean_square=(gap_NV.norm() / want_NV.norm().clamp(min=1e-30)).item(),
        dtype=str(dtype).removeprefix("torch."),
        allowed=ALLOWED_16_BIT.get(dtype, ALLOWED_FLOAT32),
    )


def refuse_if_different(difference: Difference, what: str) -> None:
    """Raises:
    CheckpointError: if more than rounding lies between the adapter and its export.
    """
    if not difference.is_rounding:
        raise CheckpointError(
            f"{what} does not give the adapter's logits: {difference}; allowed is "
            f"{difference.allowed:g}. Nothing was written. Please report it, with the model's name."
        )
