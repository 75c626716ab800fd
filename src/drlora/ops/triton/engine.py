"""The accelerator engine with kernels of our own, for ragged tokens and ragged ranks.

One autograd function for the whole expert MLP, as in `loop`: it keeps the input, the gate_up output
and the rank-wide intermediates, nothing else of the size of the routed rows. LoRA's expansion is
added inside the frozen product, forward and in dX. No step waits for the device: the number of an
expert's rows and its ranks are read there (`triton_tiles`, `triton_launch`), and nothing is added
atomically, so results repeat to the bit.

Forward, per expert (s folded into z):

    z = s x A^T      gate_up = W x + z B      h = gate(gate_up)      (again with `down`)

Backward, with g the token's output gradient and w the routing weight:

    dz = s g B^T     dh = g W + dz A      dw = <dh, h>      dA = (w dz)^T h      dB = (w z)^T g

and dgate_up = gate'(w dh), from where gate_up's pieces go the same way without w. For the silu gate
this middle part is a kernel (`triton_rowwise` says why); other activations run as torch operators.

Shape letters: as in `drlora.ops.parts`; P largest rank rounded up to 16. Tested against `naive`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drlora.errors import ConfigError
from drlora.ops.parts import DropoutMasks, LoraPiece
from drlora.ops.routing import Routing
from drlora.ops.triton import launch
from drlora.ops.triton.kernels import INTERPRETED
from drlora.ops.triton.launch import Expansion, RankOffsets, Rows, Weight
from drlora.ops.triton.tiles import Sorted, sorted_rows
from drlora.ops.weights import ExpertMatrix, ExpertWeights, Matrix

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts_triton(
    x_TH: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    base: ExpertWeights,
    pieces: list[LoraPiece],
    masks: DropoutMasks,
) -> Tensor:
    """(T, H) output of the adapted experts; see `drlora.ops.adapted_experts`.

    Raises:
        ConfigError: on the CPU outside Triton's interpreter, or for float64 experts.
    """
    _check_fits(x_TH)
    factors = [factor for piece in pieces for factor in (piece.a_RI, piece.b_RO)]
    with torch.cuda.device_of(x_TH):  # Triton launches on the current device, not the tensors'
        plan = _Plan(base, pieces, sorted_rows(routing, x_TH))
        return _TritonExperts.apply(
            plan, x_TH, weight_TK, masks.gate_up_SH, masks.down_SI, *factors
        )


def _check_fits(x_TH: Tensor) -> None:
    if x_TH.dtype not in _DTYPES:
        raise ConfigError(
            f"engine='triton' takes float32, bfloat16 or float16 experts, not {x_TH.dtype}; "
            f"choose engine='loop'."
        )
    if x_TH.device.type == "cpu" and not INTERPRETED.value:
        raise ConfigError(
            "engine='triton' needs a GPU, and the experts are on the CPU; choose engine='auto'. "
            "(For tests: TRITON_INTERPRET=1, set before Python starts, runs its kernels slowly.)"
        )


class _Plan(NamedTuple):
    """What is not a tensor, or needs no gradient."""

    base: ExpertWeights
    pieces: list[LoraPiece]
    at: Sorted


class _Piece(NamedTuple):
    """A piece with at least one rank, its factors as the function received them."""

    number: int
    piece: LoraPiece
    ranks: RankOffsets

    def slot(self) -> int:
        """Number of its A among the factors; B is the next."""
        return 2 * self.number


class _TritonExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x_TH: Tensor,
        weight_TK: Tensor,
        mask_SH: Tensor | None,
        mask_SI: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        base, at = plan.base, plan.at
        x_TH, weight_S = x_TH.contiguous(), weight_TK.reshape(-1).contiguous()
        bound = _bind(plan.pieces, factors)
        x = Rows(x_TH, at.token_S, mask_SH)
        gate_up_SG, z_up = _adapted("gate_up", at, x, base.gate_up, bound)
        h = Rows(_gate(base, gate_up_SG), mask_SK=mask_SI)
        y_SH, z_down = _adapted("down", at, h, base.down, bound)
        ctx.plan = plan
        ctx.z_slots = [*z_up, *z_down]
        # Through save_for_backward, so that checkpointing can drop them.
        ctx.save_for_backward(
            x_TH,
            weight_TK,
            mask_SH,
            mask_SI,
            gate_up_SG,
            *z_up.values(),
            *z_down.values(),
            *factors,
        )
        return launch.combine(y_SH, weight_TK.shape[-1], weight_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        base, at = plan.base, plan.at
        x_TH, weight_TK, mask_SH, mask_SI, gate_up_SG, *rest = ctx.saved_tensors
        z = dict(zip(ctx.z_slots, rest, strict=False))
        factors = rest[len(z) :]
        bound = _bind(plan.pieces, factors)
        grads = [torch.zeros_like(factor) if factor.numel() == 0 else None for factor in factors]
        weight_S = weight_TK.reshape(-1).contiguous()
        g = Rows(grad_TH.contiguous(), at.token_S)
        x = Rows(x_TH, at.token_S, mask_SH)
        with torch.cuda.device_of(x_TH):
            dz = _shrunk_grads("down", at, g, bound)
            dh_SI = _input_grad("down", at, g, base.down, bound, dz, mask_SI)
            h_SI, dgate_up_SG, dweight_S = _gate_backward(base, at, gate_up_SG, dh_SI, weight_S)
            h = Rows(h_SI, mask_SK=mask_SI)
            _factor_grads("down", at, g, h, bound, z, dz, weight_S, grads)
            del h, h_SI, dh_SI
            dgate_up = Rows(dgate_up_SG)
            dz = _shrunk_grads("gate_up", at, dgate_up, bound)
            _factor_grads("gate_up", at, dgate_up, x, bound, z, dz, None, grads)
            grad_x_TH = None
            if ctx.needs_input_grad[1]:
                dx_SH = _input_grad(
                    "gate_up", at, dgate_up, base.gate_up, bound, dz, mask_SH, unsort=True
                )
                grad_x_TH = launch.combine(dx_SH, weight_TK.shape[-1], None)
        return None, grad_x_TH, dweight_S.view_as(weight_TK), None, None, *grads


def _bind(pieces: list[LoraPiece], factors: Any) -> list[_Piece]:
    """The pieces that have ranks, with the factors as this function received them."""
    pairs = zip(pieces, factors[::2], factors[1::2], strict=True)
    return [
        _Piece(
            number,
            piece._replace(a_RI=a_RI.contiguous(), b_RO=b_RO.contiguous()),
            launch.rank_offsets(piece.offsets, a_RI.device),
        )
        for number, (piece, a_RI, b_RO) in enumerate(pairs)
        if piece.offsets[-1] > 0
    ]


def _of(matrix: Matrix, bound: list[_Piece]) -> list[_Piece]:
    return [b for b in bound if b.piece.matrix == matrix]


def _adapted(
    matrix: Matrix, at: Sorted, rows: Rows, weight: ExpertMatrix, bound: list[_Piece]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Output of one adapted matrix, in routing order for `down`, and z by number of the piece."""
    z = {
        b.number: launch.shrink(at, rows, b.piece.a_RI, b.ranks, b.piece.scaling)
        for b in _of(matrix, bound)
    }
    expansions = [
        Expansion(z[b.number], b.piece.b_RO, b.piece.start, b.ranks) for b in _of(matrix, bound)
    ]
    weight_EIO = Weight.of(weight).turned()
    return launch.product(at, rows, weight_EIO, expansions, unsort=matrix == "down"), z


def _shrunk_grads(matrix: Matrix, at: Sorted, g: Rows, bound: list[_Piece]) -> dict[int, Tensor]:
    """dz by number of the piece: the gradient of the piece's columns, times B^T."""
    return {
        b.number: launch.shrink(at, _columns(g, b), b.piece.b_RO, b.ranks, b.piece.scaling)
        for b in _of(matrix, bound)
    }


def _input_grad(
    matrix: Matrix,
    at: Sorted,
    g: Rows,
    weight: ExpertMatrix,
    bound: list[_Piece],
    dz: dict[int, Tensor],
    mask_SI: Tensor | None,
    *,
    unsort: bool = False,
) -> Tensor:
    """g W + mask * sum of dz A."""
    expansions = [Expansion(dz[b.number], b.piece.a_RI, 0, b.ranks) for b in _of(matrix, bound)]
    return launch.product(at, g, Weight.of(weight), expansions, mask_SN=mask_SI, unsort=unsort)


def _factor_grads(
    matrix: Matrix,
    at: Sorted,
    g: Rows,
    inputs: Rows,
    bound: list[_Piece],
    z: dict[int, Tensor],
    dz: dict[int, Tensor],
    weight_S: Tensor | None,
    grads: list[Tensor | None],
) -> None:
    """Write dA and dB of the matrix's pieces into `grads`.

    With `weight_S`, `g` lacks the routing weight: it is put on the rank-wide side, the narrowest.
    """
    for b in _of(matrix, bound):
        args = b.piece, b.ranks, weight_S
        grads[b.slot()] = launch.factor_grad(at, dz[b.number], inputs, *args)
        grads[b.slot() + 1] = launch.factor_grad(at, z[b.number], _columns(g, b), *args)


def _columns(g: Rows, b: _Piece) -> Rows:
    return g._replace(values=g.values[:, b.piece.columns])


def _gate(base: ExpertWeights, gate_up_SG: Tensor) -> Tensor:
    return launch.silu_mul(gate_up_SG) if base.is_silu else base.apply_gate(gate_up_SG).contiguous()


def _gate_backward(
    base: ExpertWeights, at: Sorted, gate_up_SG: Tensor, dh_SI: Tensor, weight_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate_up with the routing weight in it, gradient of the routing weight)."""
    if base.is_silu:
        dgate_up_SG, dweight_S = launch.silu_mul_backward(at, gate_up_SG, dh_SI, weight_S)
        return dh_SI, dgate_up_SG, dweight_S
    with torch.enable_grad():
        leaf_SG = gate_up_SG.detach().requires_grad_()
        h_SI = base.apply_gate(leaf_SG)
    weighted_SI = dh_SI * weight_S[at.order_S, None].to(dh_SI.dtype)
    (dgate_up_SG,) = torch.autograd.grad(h_SI, leaf_SG, weighted_SI)
    h_SI = h_SI.detach().contiguous()
    dweight_S = torch.empty_like(weight_S)
    dweight_S[at.order_S] = (dh_SI.float() * h_SI).sum(-1).to(weight_S.dtype)
    return h_SI, dgate_up_SG.contiguous(), dweight_S
