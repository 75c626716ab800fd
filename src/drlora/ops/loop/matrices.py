"""One matrix of all experts with the LoRA pieces on it, as the `loop` engine multiplies by it.

Everything is cut into views once, before the threads begin: cutting one by one would cost more
than the products of small experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drlora.ops.loop.buffers import Widen
from drlora.ops.loop.plan import Plan
from drlora.ops.loop.tasks import Segment, Task
from drlora.ops.parts import LoraPiece
from drlora.ops.weights import ExpertMatrix, Matrix


class Projection:
    """One matrix of all experts, with the LoRA pieces on it."""

    def __init__(
        self,
        matrix: Matrix,
        plan: Plan,
        factors: Sequence[Tensor],
        shrunk: Sequence[Tensor],
        mask_SI: Tensor | None,
    ) -> None:
        self.parts = _parts(plan.base.matrix(matrix).parts, plan.dtype)
        bias_EO = plan.base.bias(matrix)
        self.biases = None if bias_EO is None else bias_EO.to(plan.dtype).unbind()
        self.masks = None if mask_SI is None else plan.by_task(mask_SI)
        self.updates = []
        for number, piece in enumerate(plan.pieces):
            if piece.matrix == matrix:
                a_RI, b_RO = (plan.take_in(number, f) for f in factors[2 * number : 2 * number + 2])
                piece = piece._replace(a_RI=a_RI, b_RO=b_RO)
                whole = piece.b_RO.shape[1] == plan.base.out_features(matrix)
                columns = None if whole else piece.columns
                self.updates.append(_Update(number, piece, columns, plan, shrunk[number]))

    def forward(self, task: Task, widen: Widen, out_cO: Tensor, x_cI: Tensor) -> None:
        """out = x W^T (+ bias) + s (x A^T) B, segment by segment; keeps z = x A^T."""
        adapter_cI = x_cI if self.masks is None else x_cI * self.masks[task.number]
        views = zip(
            task.segments, rows(task, out_cO), rows(task, x_cI), columns(task, adapter_cI),
            strict=True,
        )  # fmt: skip
        for segment, out_nO, x_nI, adapter_In in views:
            for part in self.parts:
                part.product(x_nI, segment.expert, widen, part.own(out_nO))
            if self.biases is not None:
                out_nO.add_(self.biases[segment.expert])
            for update in self.updates:
                update.forward(segment, out_nO, adapter_In)

    def start_backward(self, plan: Plan, grads: Sequence[Tensor], weight_S1: Tensor | None) -> None:
        """Take the buffers for the factors' gradients, and the routing weights if they apply.

        With weights, the `g` and `dx` of `backward` are without them.
        """
        for update in self.updates:
            grad_a_RI, grad_b_RO = grads[2 * update.number : 2 * update.number + 2]
            update.start_backward(plan, grad_a_RI, grad_b_RO, weight_S1)

    def backward(self, task: Task, widen: Widen, dx_cI: Tensor, g_cO: Tensor, x_cI: Tensor) -> None:
        """dx = g W + s (g B^T) A, and dA and dB."""
        mask_cI = None if self.masks is None else self.masks[task.number]
        adapter_cI = x_cI if mask_cI is None else x_cI * mask_cI
        # Under dropout the base part is added after the mask was put on the adapter's part.
        part_cI = dx_cI if mask_cI is None else torch.zeros_like(dx_cI)
        dx_n = rows(task, dx_cI)
        part_n = dx_n if mask_cI is None else rows(task, part_cI)
        views = zip(
            task.segments, dx_n, part_n, rows(task, g_cO), columns(task, g_cO),
            rows(task, adapter_cI), strict=True,
        )  # fmt: skip
        first, *others = self.parts
        for segment, dx_nI, part_nI, g_nO, g_On, adapter_nI in views:
            g_own = first.scaled(first.own(g_nO), segment.expert)
            torch.mm(g_own, first.back(segment.expert, widen), out=dx_nI)
            for part in others:
                g_own = part.scaled(part.own(g_nO), segment.expert)
                dx_nI.addmm_(g_own, part.back(segment.expert, widen))
            for update in self.updates:
                update.backward(segment, part_nI, g_On)
                update.factor_gradients(segment, g_nO, adapter_nI)
        if mask_cI is not None:
            dx_cI.addcmul_(part_cI, mask_cI)

    def add_bias_products(self, task: Task, grad_w_c: Tensor, g_cO: Tensor) -> None:
        """The bias's part of the routing weights' gradient, <g, bias>."""
        if self.biases is not None:
            views = zip(task.segments, rows(task, grad_w_c), rows(task, g_cO), strict=True)
            for segment, grad_w_n, g_nO in views:
                grad_w_n.addmv_(g_nO, self.biases[segment.expert])


def rows(task: Task, tensor_cO: Tensor) -> Sequence[Tensor]:
    """Each segment's rows (n, O); `Tensor.split` does the same more slowly."""
    return tensor_cO.split_with_sizes(task.sizes)


def columns(task: Task, tensor_cO: Tensor) -> Sequence[Tensor]:
    """The same transposed, (O, n)."""
    return tensor_cO.T.split_with_sizes(task.sizes, 1)


class _Part(NamedTuple):
    """What of a matrix lies together: all of it, or its gate or up.

    Attributes:
        columns: output features of the matrix, None for all.
        matrix: the part itself.
        turned: E views (in-features, out-features), None where experts are not stored so.
        stored: E views (out-features, in-features), likewise.
        scales: E scales (out-features,) that are put on products, so that an expert is read without
            them; None where there are none.
    """

    columns: slice | None
    matrix: ExpertMatrix
    turned: Sequence[Tensor] | None
    stored: Sequence[Tensor] | None
    scales: Sequence[Tensor] | None

    def product(self, x_nI: Tensor, expert: int, widen: Widen, out_nO: Tensor) -> None:
        """out = x W^T."""
        torch.mm(x_nI, self.into(expert, widen), out=out_nO)
        if self.scales is not None:
            out_nO.mul_(self.scales[expert])

    def scaled(self, g_nO: Tensor, expert: int) -> Tensor:
        """What is multiplied by `back` for `g W`."""
        if self.scales is None:
            return g_nO
        return torch.mul(g_nO, self.scales[expert], out=torch.empty_like(g_nO))

    def into(self, expert: int, widen: Widen) -> Tensor:
        """(in-features, out-features) in the working type, for `x @ W^T`."""
        if self.turned is None:
            return self._read(expert, widen).T
        return widen(self.turned[expert])

    def back(self, expert: int, widen: Widen) -> Tensor:
        """(out-features, in-features) in the working type, for `g @ W`."""
        return self._read(expert, widen) if self.stored is None else widen(self.stored[expert])

    def _read(self, expert: int, widen: Widen) -> Tensor:
        return widen.read(self.matrix, expert, unscaled=self.scales is not None)

    def own(self, out_nO: Tensor) -> Tensor:
        return out_nO if self.columns is None else out_nO[:, self.columns]


def _parts(matrices: Sequence[ExpertMatrix], dtype: torch.dtype) -> list[_Part]:
    parts, start = [], 0
    for matrix in matrices:
        width = matrix.shape[1]
        columns = None if len(matrices) == 1 else slice(start, start + width)
        # A product without its scales may be more than float16 holds.
        late_EO = None if dtype == torch.float16 else matrix.late_scales()
        scales = None if late_EO is None else late_EO.unbind()
        parts.append(_Part(columns, matrix, _turned(matrix), matrix.views(), scales))
        start += width
    return parts


def _turned(matrix: ExpertMatrix) -> Sequence[Tensor] | None:
    """The views, each transposed: all at once where that is possible."""
    if (dense_EOI := matrix.dense()) is not None:
        return dense_EOI.transpose(1, 2).unbind()
    views = matrix.views()
    return None if views is None else tuple(w_OI.T for w_OI in views)


class _Update:
    """One LoRA piece, cut into views of its experts at once: one by one would cost more.

    z and dz are kept transposed, (rank, rows): products of 8 or 16 rows are faster than products
    of 8 or 16 columns.
    """

    def __init__(
        self, number: int, piece: LoraPiece, columns: slice | None, plan: Plan, flat_z: Tensor
    ) -> None:
        self.number, self.ranks, self.columns = number, piece.ranks, columns
        self.scaling, self.flat_z = piece.scaling, flat_z
        self.a, self.b = piece.a_RI.split(self.ranks), piece.b_RO.split(self.ranks)
        self.shapes = [(self.ranks[s.expert], s.rows) for s in plan.segments]
        self.z = self._views(flat_z)

    def forward(self, segment: Segment, out_nO: Tensor, x_In: Tensor) -> None:
        if self.ranks[segment.expert]:
            z_rn = torch.mm(self.a[segment.expert], x_In, out=self.z[segment.number])
            self._own(out_nO).addmm_(z_rn.T, self.b[segment.expert], alpha=self.scaling)

    def start_backward(
        self, plan: Plan, grad_a_RI: Tensor, grad_b_RO: Tensor, weight_S1: Tensor | None
    ) -> None:
        """Room for dz, and where each segment's dA and dB go: the gradient, or a part of it."""
        flat_dz = torch.empty_like(self.flat_z)
        self.dz = self._views(flat_dz)
        self.weights: Sequence[Tensor] = ()
        if weight_S1 is not None:
            self.weights = plan.by_segment(weight_S1[:, 0])
        self.grad_a, self.grad_b = grad_a_RI.split(self.ranks), grad_b_RO.split(self.ranks)
        met = {segment.expert for segment in plan.segments}
        for expert in set(range(len(self.ranks))) - met:
            self.grad_a[expert].zero_()
            self.grad_b[expert].zero_()
        whole = [(self.grad_a[s.expert], self.grad_b[s.expert]) for s in plan.segments]
        self.parts = [
            (torch.empty_like(a), torch.empty_like(b)) if segment.part else (a, b)
            for segment, (a, b) in zip(plan.segments, whole, strict=True)
        ]
        later = [segment.number for segment in plan.segments if segment.part]
        self.joins = [(whole[number], self.parts[number]) for number in later]

    def backward(self, segment: Segment, dx_nI: Tensor, g_On: Tensor) -> None:
        if self.ranks[segment.expert]:
            dz_rn = self.dz[segment.number]
            own_On = g_On if self.columns is None else g_On[self.columns]
            torch.mm(self.b[segment.expert], own_On, out=dz_rn)
            dx_nI.addmm_(dz_rn.T, self.a[segment.expert], alpha=self.scaling)

    def factor_gradients(self, segment: Segment, g_nO: Tensor, x_nI: Tensor) -> None:
        if self.ranks[segment.expert]:
            da_rI, db_rO = self.parts[segment.number]
            z_rn, dz_rn = self.z[segment.number], self.dz[segment.number]
            if self.weights:
                w_n = self.weights[segment.number]
                z_rn, dz_rn = z_rn * w_n, dz_rn.mul_(w_n)
            torch.addmm(da_rI, dz_rn, x_nI, beta=0, alpha=self.scaling, out=da_rI)
            torch.addmm(db_rO, z_rn, self._own(g_nO), beta=0, alpha=self.scaling, out=db_rO)

    def join_parts(self) -> None:
        """Add up the gradients of experts whose rows were cut, in fixed order."""
        for (grad_a, grad_b), (part_a, part_b) in self.joins:
            grad_a.add_(part_a)
            grad_b.add_(part_b)

    def _own(self, out_nO: Tensor) -> Tensor:
        return out_nO if self.columns is None else out_nO[:, self.columns]

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The (rank, rows) block of each segment."""
        parts = flat.split([rank * rows for rank, rows in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def empty_shrunk(piece: LoraPiece, plan: Plan) -> Tensor:
    """Room for z = x A^T of all tasks: (rows x rank) blocks of unequal size, end to end."""
    ranks = piece.ranks
    size = sum(segment.rows * ranks[segment.expert] for segment in plan.segments)
    return torch.empty(size, dtype=plan.dtype, device=piece.a_RI.device)
