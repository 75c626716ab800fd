"""The equations of DR-LoRA's signals, as pure functions on tensors.

Shapes: E experts, R pool rows, I in-features, O out-features. Source: arXiv 2601.04823; where its
text leaves a choice open, docs/method.md says which one is taken and why.

    f_t = beta * f_{t-1} + (1 - beta) * w_t          routing frequency, per expert
    s_j = |dL/da_j * a_j|_1 * |dL/db_j * b_j|_1      importance of rank j at one step
    g_j = beta * g_j + (1 - beta) * s_j              its moving average
    g_i = mean of g_j over the rows that expert i owns
    S_i = f_i * g_i / (r_i + 1) ** gamma             saliency

The registry SALIENCIES holds S and what may stand in its place, by the name of the setting
`saliency`; `RANK_IMPORTANCES` holds s by that of the option `rank_importance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drlora.adapter.row_book import in_turns
from drlora.config.registry import SALIENCIES


def ema(previous: Tensor, value: Tensor, beta: float) -> Tensor:
    """`beta * previous + (1 - beta) * value`; entries of `value` that are not finite are skipped.

    So a step without tokens, or with NaN among the router's weights, leaves the average as it was.
    """
    updated = torch.lerp(value, previous, beta)
    return torch.where(torch.isfinite(value), updated, previous)


def routed_share(routing_sum_E: Tensor, num_tokens: Tensor) -> Tensor:
    """(E,) mean routing per token: w_t of one optimizer step; NaN if there was no token."""
    return routing_sum_E / num_tokens


def row_sums(weight_RN: Tensor, grad_RN: Tensor, is_signed: bool = False) -> Tensor:
    """(R,) float32: sum of |gradient * weight| over each row, or of gradient * weight itself.

    Not `vector_norm(ord=1)`, which takes three times as long on a CPU.
    """
    product_RN = grad_RN * weight_RN
    return (product_RN if is_signed else product_RN.abs_()).sum(dim=1, dtype=torch.float32)


class RowSums(NamedTuple):
    """What the importance of rows is made of: `row_sums` of both factors.

    Attributes:
        a_R: (R,) those of lora_A.
        b_R: (R,) those of lora_B, whose row j is the j-th column of LoRA's B.
        in_features, out_features: elements in a row of each.
    """

    a_R: Tensor
    b_R: Tensor
    in_features: int
    out_features: int


def rank_importance(sums: RowSums) -> Tensor:
    """(R,) float32: s_j of each row, the PRODUCT of the two 1-norms of gradient times weight.

    The absolute value is taken inside the sum.
    """
    return sums.a_R * sums.b_R


def rank_sensitivity(sums: RowSums) -> Tensor:
    """(R,) float32: AdaLoRA's, the SUM of the mean |gradient * weight| of the two (2303.10512)."""
    return sums.a_R / sums.in_features + sums.b_R / sums.out_features


def released_importance(sums: RowSums) -> Tensor:
    """(R,) float32: that of the script which was released with the paper.

    The absolute value is taken after the sum, and the terms of the two factors are added.
    """
    return sums.a_R.abs() + sums.b_R.abs()


def expert_sums(value_R: Tensor, owner_R: Tensor, num_experts: int) -> Tensor:
    """(E,) sum of `value_R` over the rows that each expert owns, on the CPU.

    Free rows (owner -1) are left out. The order of the sum is that of the rows, on every device.
    """
    value, sums_E = value_R.cpu(), torch.zeros(num_experts, dtype=value_R.dtype)
    for experts, rows in in_turns(owner_R.cpu().numpy()):
        sums_E[experts] += value[rows]  # none of them twice
    return sums_E


def saliency(frequency_E: Tensor, importance_E: Tensor, ranks_E: Tensor, gamma: float) -> Tensor:
    """(E,) S_i = f_i * g_i / (r_i + 1) ** gamma."""
    return frequency_E * importance_E / (ranks_E + 1.0) ** gamma


class RankImportance(NamedTuple):
    """Importance of each row at one step.

    Attributes:
        of: the sums of rows -> (R,).
        is_signed: whether the sums are of signed numbers.
    """

    of: Callable[[RowSums], Tensor]
    is_signed: bool = False


# By the option `rank_importance`.
RANK_IMPORTANCES: dict[str, RankImportance] = {
    "product": RankImportance(rank_importance),
    "sensitivity": RankImportance(rank_sensitivity),
    "released": RankImportance(released_importance, is_signed=True),
}


@dataclass(frozen=True)
class Signals:
    """What a rule may know of the experts that compete for ranks.

    Attributes:
        frequency_E: (E,) f.
        importance_E: (E,) g.
        ranks_E: (E,) current ranks.
        gamma: exponent of the rank penalty.
        seed: of this event; equal on all processes, and the same after a resume.
        options: those of the configuration, for rules that have some of their own.
    """

    frequency_E: Tensor
    importance_E: Tensor
    ranks_E: Tensor
    gamma: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)


@SALIENCIES.register("product")
def _product(signals: Signals) -> Tensor:
    return saliency(signals.frequency_E, signals.importance_E, signals.ranks_E, signals.gamma)


@SALIENCIES.register("routing")
def _by_routing(signals: Signals) -> Tensor:
    return signals.frequency_E / (signals.ranks_E + 1.0) ** signals.gamma


@SALIENCIES.register("importance")
def _by_importance(signals: Signals) -> Tensor:
    return signals.importance_E / (signals.ranks_E + 1.0) ** signals.gamma


@SALIENCIES.register("random")
def _random(signals: Signals) -> Tensor:
    generator = torch.Generator().manual_seed(signals.seed)
    return torch.rand(len(signals.ranks_E), generator=generator)
