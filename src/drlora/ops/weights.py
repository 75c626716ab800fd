"""The frozen experts of one block, as every engine is given them.

Shape letters as in `drlora.ops.parts`: E experts, H hidden size, I expert width, G = 2 * I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from drlora.ops.storage import Apart, ExpertMatrix, as_matrix

__all__ = ["Apart", "ExpertMatrix", "ExpertWeights", "MATRICES", "Matrix", "as_matrix"]

Matrix = Literal["gate_up", "down"]
MATRICES: tuple[Matrix, ...] = ("gate_up", "down")


@dataclass(frozen=True)
class ExpertWeights:
    """The frozen experts of one block: the model's own parameters, never copies of them.

    Experts without a gate have their only first matrix, (E, I, H), in the place of gate_up.

    Attributes:
        gate_up: (E, G, H), G = 2 * I output features in the order that `apply_gate` expects, in
            most models gate before up.
        down: (E, H, I).
        apply_gate: maps (n, G) to (n, I); for most models `act(gate) * up`.
        is_silu: whether `apply_gate` is exactly `silu(gate) * up` of two halves, whose derivative
            is known.
        gate_up_bias_EG: added to the first matrix's output, or None.
        down_bias_EH: added to the second's, before the routing weight, or None.
        post_norm: what each expert's output goes through before the routing weight, or None.
    """

    gate_up: ExpertMatrix
    down: ExpertMatrix
    apply_gate: Callable[[Tensor], Tensor]
    is_silu: bool
    gate_up_bias_EG: Tensor | None = None
    down_bias_EH: Tensor | None = None
    post_norm: Callable[[Tensor], Tensor] | None = None

    def matrix(self, matrix: Matrix) -> ExpertMatrix:
        """The one that is called so."""
        return self.down if matrix == "down" else self.gate_up

    @property
    def gate_up_EGH(self) -> Tensor:  # noqa: N802
        """The first matrices in one tensor, where they are (see `is_fused`)."""
        dense_EGH = self.gate_up.dense()
        assert dense_EGH is not None
        return dense_EGH

    @property
    def down_EHI(self) -> Tensor:  # noqa: N802
        """The second matrices in one tensor, where they are."""
        dense_EHI = self.down.dense()
        assert dense_EHI is not None
        return dense_EHI

    @property
    def is_fused(self) -> bool:
        """Whether each matrix of all experts is one tensor."""
        return self.gate_up.dense() is not None and self.down.dense() is not None

    @property
    def is_traceable(self) -> bool:
        """Whether a compiler can be given each matrix of all experts."""
        return self.gate_up.traced() is not None and self.down.traced() is not None

    @property
    def is_stacked(self) -> bool:
        """The same, but gate and up may be two tensors."""
        return all(part.dense() is not None for m in MATRICES for part in self.matrix(m).parts)

    @property
    def fixed(self) -> str | None:
        """Why the weights cannot be changed, or None if they can."""
        return self.gate_up.fixed or self.down.fixed

    @property
    def is_plain(self) -> bool:
        """Whether the model itself can compute with what is stored."""
        return self.gate_up.is_plain and self.down.is_plain

    @property
    def dtype(self) -> torch.dtype:
        """What the experts compute in."""
        return self.down.dtype

    @property
    def device(self) -> torch.device:
        """Where their weights are."""
        return self.down.device

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def width(self) -> int:
        """I, the in-features of down."""
        return self.down.shape[2]

    def bias(self, matrix: Matrix) -> Tensor | None:
        """(E, out-features), or None."""
        return self.down_bias_EH if matrix == "down" else self.gate_up_bias_EG

    def out_features(self, matrix: Matrix) -> int:
        """Output features of one expert's matrix."""
        return self.matrix(matrix).shape[1]

    def in_features(self, matrix: Matrix) -> int:
        """Input features of one expert's matrix."""
        return self.matrix(matrix).shape[2]

    def linear(self, matrix: Matrix, expert: int, x_nI: Tensor) -> Tensor:
        """One expert's matrix, with its bias if it has one."""
        outs = [F.linear(x_nI, part.read(expert)) for part in self.matrix(matrix).parts]
        out_nO = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        bias_EO = self.bias(matrix)
        return out_nO if bias_EO is None else out_nO + bias_EO[expert]

    def finish(self, y_nH: Tensor) -> Tensor:
        """What is done to an expert's output before the routing weight."""
        return y_nH if self.post_norm is None else self.post_norm(y_nH)
