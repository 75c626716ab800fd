"""Rows go to their experts and come back: what surrounds the products of every engine.

    sort_by_expert    which rows are whose
    combine           a token's rows, weighted and summed

`loop` and `triton` have sums of their own, into which they put what else there is to do.

Shape letters as in `drlora.ops.parts`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Routed rows sorted by expert.

    Attributes:
        order_S: position of each sorted row in the flattened (T * K) routing.
        token_S: the token of each sorted row.
        counts_E: rows of each expert, on the routing's device.
    """

    order_S: Tensor
    token_S: Tensor
    counts_E: Tensor

    @property
    def expert_S(self) -> Tensor:  # noqa: N802
        """The expert of each sorted row."""
        row_S = torch.arange(self.order_S.numel(), device=self.order_S.device)
        return torch.searchsorted(self.counts_E.cumsum(0), row_S, right=True)

    @property
    def place_S(self) -> Tensor:  # noqa: N802
        """Where each row of the flattened (T * K) routing went in the sorted order."""
        place_S = torch.empty_like(self.order_S)
        place_S[self.order_S] = torch.arange(len(self.order_S), device=self.order_S.device)
        return place_S

    @property
    def ends_E(self) -> Tensor:  # noqa: N802
        """int32, where the rows of each expert end, as grouped products want it."""
        return self.counts_E.cumsum(0).to(torch.int32)

    def counts(self) -> list[int]:
        """Rows of each expert, on the host (a synchronisation on an accelerator)."""
        return self.counts_E.tolist()


def sort_by_expert(index_TK: Tensor, num_experts: int) -> Routing:
    """Sort the routed rows by expert, keeping token order inside an expert."""
    flat_S = index_TK.reshape(-1)
    sorted_S, order_S = torch.sort(flat_S, stable=True)
    bounds_E = torch.arange(num_experts, device=flat_S.device, dtype=flat_S.dtype)
    ends_E = torch.searchsorted(sorted_S, bounds_E, right=True)
    counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    return Routing(order_S, order_S // index_TK.shape[-1], counts_E)


def combine(y_SH: Tensor, weight_TK: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """(T, H) of `dtype`: each token's rows times their routing weights, summed.

    A gather and a sum, not index_add: the order of the sum is then fixed on an accelerator.

    Args:
        y_SH: (S, H), rows sorted by expert.
        weight_TK: (T, K).
        routing: of these rows.
        dtype: of the result; what comes before has the wider of the two dtypes.
    """
    weighted_SH = y_SH * weight_TK.reshape(-1)[routing.order_S, None]
    rows_TKH = weighted_SH[routing.place_S].view(*weight_TK.shape, -1)
    return rows_TKH.sum(dim=1).to(dtype)
