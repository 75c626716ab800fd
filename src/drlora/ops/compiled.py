"""The adapted experts under torch.compile: no graph break, and no recompilation when ranks grow.

dynamo can trace neither a loop over experts, whose bounds are data, nor `grouped_mm` in any dtype
but bfloat16. So one frozen matrix of all experts, with the LoRA pieces on it, is a single operator
that the compiler does not look into, with a backward of its own; what lies between (gathering rows,
the gate, the weighted sum) is traced and can be fused.

A compiled graph is used again as long as shapes and Python values stay the same. So factors come
with ALL rows of the pool, free ones last, and where an expert's rows begin is a tensor on the host,
which a growth event writes in place.

Where `loop` widens 16-bit experts, so does the loop here, and what lies between its two products is
then float32 too.

Letters as in `parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from drlora.config.registry import ENGINES
from drlora.ops.engine import AUTO, automatic
from drlora.ops.grouped import refuses as grouped_refuses
from drlora.ops.loop.engine import working_dtype
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.products import backward_grouped, backward_loop, forward_grouped, forward_loop
from drlora.ops.routing import Routing, combine
from drlora.ops.stand_ins import tell_once
from drlora.ops.storage.packed import from_traced
from drlora.ops.weights import ExpertWeights, Matrix


class TracedPiece(NamedTuple):
    """A `LoraPiece` whose shapes do not change when ranks do.

    Attributes:
        matrix, start, scaling, step: as in `LoraPiece`.
        a_RI: (R, in-features), owned rows ordered by expert, then the free rows of the pool.
        b_RO: (R, O), in the same order.
        offset_E1: (E + 1,) int64 on the CPU: expert e's rows are `offset_E1[e] : offset_E1[e + 1]`.
    """

    matrix: Matrix
    start: int
    a_RI: Tensor
    b_RO: Tensor
    offset_E1: Tensor
    scaling: float
    step: int = 1


def experts_traced(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[TracedPiece],
    masks: DropoutMasks,
    engine: str,
) -> Tensor:
    """(T, H) output of the adapted experts; see `drlora.ops.adapted_experts`."""
    num_tokens, top_k = weight_TK.shape
    order_S = routing.order_S
    ends_E = routing.ends_E
    grouped = _runs_grouped(engine, base)

    def adapted(matrix: Matrix, x_SI: Tensor, mask_SI: Tensor | None) -> Tensor:
        bias_EO = base.bias(matrix)
        known = base.matrix(matrix).traced()
        assert known is not None, "asked before (ExpertWeights.is_traceable)"
        weights, words = known
        own = [piece for piece in pieces if piece.matrix == matrix]
        factors = [factor for piece in own for factor in (piece.a_RI, piece.b_RO)]
        out_SO = adapted_product(
            x_SI, weights, ends_E, mask_SI, factors, [piece.offset_E1 for piece in own],
            base.matrix(matrix).shape[1], words, matrix, [piece.start for piece in own],
            [piece.step for piece in own], [piece.scaling for piece in own], grouped,
        )  # fmt: skip
        return out_SO if bias_EO is None else out_SO + bias_EO[routing.expert_S]

    # Repeated and put in order, not gathered by token: the gradient of a token is then a sum over
    # K neighbours, in fixed order and without rounding after each.
    x_SH = x_TH[:, None].expand(-1, top_k, -1).reshape(num_tokens * top_k, -1)[order_S]
    gate_up_SG = adapted("gate_up", x_SH, masks.gate_up_SH)
    y_SH = adapted("down", base.apply_gate(gate_up_SG), masks.down_SI)
    return combine(base.finish(y_SH), weight_TK, routing, x_TH.dtype)


def _runs_grouped(engine: str, base: ExpertWeights) -> bool:
    misfit = grouped_refuses(base)
    if engine == AUTO:
        return automatic(base) == "grouped" and misfit is None
    grouped = ENGINES[engine].traced == "grouped" and misfit is None
    computes = "grouped" if grouped else "loop"
    if engine != computes:
        tell_once(engine, computes, misfit or "torch.compile knows 'grouped' and 'loop' alone")
    return grouped


def _owned(
    factors: Sequence[Tensor],
    offsets: Sequence[Tensor],
    matrix: str,
    starts: Sequence[int],
    steps: Sequence[int],
    scalings: Sequence[float],
) -> list[LoraPiece]:
    """The pieces with their owned rows alone, and their ranks on the host."""
    pieces = []
    for a_RI, b_RO, offset_E1, start, step, scaling in zip(
        factors[::2], factors[1::2], offsets, starts, steps, scalings, strict=True
    ):
        bounds = tuple(offset_E1.tolist())
        owned = slice(bounds[-1])
        pieces.append(
            LoraPiece(cast(Matrix, matrix), start, a_RI[owned], b_RO[owned], bounds, scaling, step)
        )
    return pieces


_ARGUMENTS = (
    "Tensor x_SI, Tensor[] weights, Tensor ends_E, Tensor? mask_SI, Tensor[] factors, "
    "Tensor[] offsets, int outputs, str words, str matrix, int[] starts, int[] steps, "
    "float[] scalings, bool grouped"
)


@torch.library.custom_op(
    "drlora::adapted_product", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def adapted_product(
    x_SI: Tensor,
    weights: Sequence[Tensor],
    ends_E: Tensor,
    mask_SI: Tensor | None,
    factors: Sequence[Tensor],
    offsets: Sequence[Tensor],
    outputs: int,
    words: str,
    matrix: str,
    starts: Sequence[int],
    steps: Sequence[int],
    scalings: Sequence[float],
    grouped: bool,
) -> Tensor:
    """(S, O): each row through its expert's matrix, plus the LoRA pieces on it.

    The dtype is that of `x_SI`, or float32 if the products are computed in it (`_product_dtype`).

    Args:
        x_SI: (S, in-features), rows sorted by expert, of the weights' dtype or the products'.
        weights: of the frozen matrices (E, O, in-features), as `ExpertMatrix.traced` gives them.
        ends_E: (E,) int32, where the rows of each expert end.
        mask_SI: factors on the pieces' input, or None.
        factors: (R, in-features) and (R, columns) of each piece in turn, as in `TracedPiece`.
        offsets: of each piece, as in `TracedPiece`.
        outputs: O.
        words: that go with `weights`.
        matrix: which matrix it is, `gate_up` or `down`.
        starts: first output feature of each piece.
        steps: from one output feature of a piece to the next.
        scalings: factor on each piece's product.
        grouped: by grouped products over all experts, or expert by expert.
    """
    dtype = _product_dtype(x_SI, grouped)
    x_SI, factors = x_SI.to(dtype), [factor.to(dtype) for factor in factors]
    pieces = _owned(factors, offsets, matrix, starts, steps, scalings)
    adapter_SI = x_SI if mask_SI is None else x_SI * mask_SI
    with torch.autocast(x_SI.device.type, enabled=False):
        forward = forward_grouped if grouped else forward_loop
        return forward(x_SI, adapter_SI, from_traced(weights, words), ends_E, pieces)


@torch.library.custom_op(
    "drlora::adapted_product_backward",
    mutates_args=(),
    schema=f"(Tensor grad_SO, {_ARGUMENTS}) -> (Tensor, Tensor[])",
)
def _adapted_product_backward(
    grad_SO: Tensor,
    x_SI: Tensor,
    weights: Sequence[Tensor],
    ends_E: Tensor,
    mask_SI: Tensor | None,
    factors: Sequence[Tensor],
    offsets: Sequence[Tensor],
    outputs: int,
    words: str,
    matrix: str,
    starts: Sequence[int],
    steps: Sequence[int],
    scalings: Sequence[float],
    grouped: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `x_SI` and of the factors; that of a free row is exactly zero."""
    dtype = _product_dtype(x_SI, grouped)
    stored, x_SI = x_SI.dtype, x_SI.to(dtype)
    factor_dtypes, factors = [f.dtype for f in factors], [f.to(dtype) for f in factors]
    pieces = _owned(factors, offsets, matrix, starts, steps, scalings)
    grads = [torch.zeros_like(factor) for factor in factors]
    adapter_SI = x_SI if mask_SI is None else x_SI * mask_SI
    # Under dropout the pieces' part of dX is kept apart, until the mask was put on it.
    part_SI = None if mask_SI is None else torch.zeros_like(x_SI)
    with torch.autocast(x_SI.device.type, enabled=False):
        backward = backward_grouped if grouped else backward_loop
        dx_SI = backward(
            grad_SO.contiguous(),
            adapter_SI,
            from_traced(weights, words),
            ends_E,
            pieces,
            grads,
            part_SI,
        )
    if part_SI is not None and mask_SI is not None:
        dx_SI.addcmul_(part_SI, mask_SI)
    return dx_SI.to(stored), [g.to(d) for g, d in zip(grads, factor_dtypes, strict=True)]


def _product_dtype(x_SI: Tensor, grouped: bool) -> torch.dtype:
    """What the products are computed in; grouped ones take the numbers as they are."""
    return x_SI.dtype if grouped else working_dtype(x_SI)


@adapted_product.register_fake
def _(
    x_SI: Tensor,
    weights: Sequence[Tensor],
    ends_E: Tensor,
    mask_SI: Tensor | None,
    factors: Sequence[Tensor],
    offsets: Sequence[Tensor],
    outputs: int,
    *rest: Any,
) -> Tensor:
    dtype = _product_dtype(x_SI, grouped=rest[-1])
    return x_SI.new_empty(x_SI.shape[0], outputs, dtype=dtype)


@_adapted_product_backward.register_fake
def _(
    grad_SO: Tensor,
    x_SI: Tensor,
    weights: Sequence[Tensor],
    ends_E: Tensor,
    mask_SI: Tensor | None,
    factors: Sequence[Tensor],
    *_: Any,
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(x_SI), [torch.empty_like(factor) for factor in factors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_SI, weights, ends_E, mask_SI, factors, offsets, *settings = inputs
    ctx.save_for_backward(x_SI, ends_E, mask_SI, *weights, *factors, *offsets)
    ctx.counts, ctx.settings = (len(weights), len(factors)), settings


def _differentiate(ctx: Any, grad_SO: Tensor) -> tuple[Any, ...]:
    x_SI, ends_E, mask_SI, *rest = ctx.saved_tensors
    matrices, pieces = ctx.counts[0], ctx.counts[1] // 2
    weights, rest = rest[:matrices], rest[matrices:]
    dx_SI, grads = _adapted_product_backward(
        grad_SO, x_SI, weights, ends_E, mask_SI, rest[: 2 * pieces], rest[2 * pieces :],
        *ctx.settings,
    )  # fmt: skip
    # To torch an empty list of numbers is a list of tensors, and wants a list of gradients.
    of_numbers: list[None] | None = None if pieces else []
    of_settings = (None, None, None, of_numbers, of_numbers, of_numbers, None)
    return dx_SI, [None] * matrices, None, None, grads, [None] * pieces, *of_settings


adapted_product.register_autograd(_differentiate, setup_context=_keep)
