"""Launches the `triton` engine's kernels.

Nothing here waits for the device. How many rows an expert got is known there alone, so grids come
from what the host knows: the number of tiles that can be in use (`triton_tiles`) and the largest
rank of the pool. Programs without work leave at once.

Shape letters: T tokens, S routed rows, E experts, R rows of a packed factor, P largest active rank
rounded up to 16, K reduced features, N and C columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from drlora.ops.parts import LoraPiece
from drlora.ops.storage import Coded, ExpertMatrix
from drlora.ops.triton import kernels, rowwise
from drlora.ops.triton.tiles import Sorted

RANK_BLOCK = 16  # the least width of a tensor core product
_GROUP = 8
_ROWWISE_TILE = (16, 128)
# A second expansion, a mask or a ragged edge takes registers that the widest tiles do not leave.
_NARROW_COLUMNS = 128


class Rows(NamedTuple):
    """Values of the sorted rows: row i is `values[source_S[i]]`, or `values[i]` without source.

    Attributes:
        values: (n, K), features side by side in memory.
        source_S: which row of values a sorted row reads.
        mask_SK: dropout factors on the rows in sorted order.
    """

    values: Tensor
    source_S: Tensor | None = None
    mask_SK: Tensor | None = None


class Weight(NamedTuple):
    """Frozen matrices (E, K, N) of all experts, as the product reads them.

    Attributes:
        values: (E, K, N) in any strides; of few bits, their codes.
        shape: (E, K, N).
        coded: how codes are read; None where the numbers are stored as they are.
        row_is_n: of codes, whether a stored row is one of N.
    """

    values: Tensor
    shape: tuple[int, int, int]
    coded: Coded | None = None
    row_is_n: bool = False

    @classmethod
    def of(cls, matrix: ExpertMatrix) -> Weight:
        """(E, O, I), for `g W`."""
        dense_EOI = matrix.dense()
        if dense_EOI is not None:
            return cls(dense_EOI, matrix.shape)
        coded = matrix.coded()
        assert coded is not None, "asked before (the engine's refusal)"
        return cls(coded.codes, matrix.shape, coded, row_is_n=coded.is_turned)

    def turned(self) -> Weight:
        """(E, I, O), for `x W^T`."""
        experts, k, n = self.shape
        values = self.values if self.coded else self.values.transpose(1, 2)
        return Weight(values, (experts, n, k), self.coded, not self.row_is_n)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Values, table and scales."""
        if self.coded is None:
            return self.values, self.values, self.values
        return self.values, self.coded.table, self.coded.scale_EPQ

    @property
    def strides(self) -> tuple[int, ...]:
        """Of values from expert to expert, along K and along N; of scales; a row of scales."""
        if self.coded is None:
            return *self.values.stride(), 0, 0
        scale_EPQ = self.coded.scale_EPQ
        return self.values.stride(0), 0, 0, scale_EPQ.stride(0), scale_EPQ.shape[2]

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel is compiled for."""
        coded = self.coded
        return {
            "BITS": coded.bits if coded else 0,
            "HIGH_FIRST": bool(coded and coded.is_high_first),
            "SCALE_ROWS": coded.rows if coded else 1,
            "SCALE_COLUMNS": coded.columns if coded else 1,
            "ROW_IS_N": self.row_is_n,
        }


class RankOffsets(NamedTuple):
    """Where each expert's ranks are, for the device and for the host.

    Attributes:
        offset_E1: (E + 1,) int32 on the device.
        padded: P, the largest rank rounded up to 16; the width that rank-wide tensors get. How much
            a packed one would need depends on the counts, which the host would have to wait for.
    """

    offset_E1: Tensor
    padded: int

    @property
    def block(self) -> int:
        """Ranks of one program: a power of two, at most 64."""
        return min(64, triton.next_power_of_2(self.padded))


@lru_cache(maxsize=1024)
def rank_offsets(offsets: tuple[int, ...], device: torch.device) -> RankOffsets:
    """Copied to the device once for each set of ranks, which is once per growth event."""
    largest = max(end - start for start, end in zip(offsets, offsets[1:], strict=False))
    padded = -(-largest // RANK_BLOCK) * RANK_BLOCK
    return RankOffsets(torch.tensor(offsets, dtype=torch.int32, device=device), padded)


class Expansion(NamedTuple):
    """The update z F of the columns from `column` on.

    Attributes:
        z_SP: scaled rank-wide rows; columns past an expert's rank are garbage.
        factor_RN: packed factor.
        column: first column of the product that is updated.
        ranks: whose rows of the factor are whose.
    """

    z_SP: Tensor
    factor_RN: Tensor
    column: int
    ranks: RankOffsets


def shrink(at: Sorted, rows: Rows, factor_RK: Tensor, ranks: RankOffsets, scale: float) -> Tensor:
    """(S, P) `scale` * rows @ factor[expert's ranks].T; columns past the rank are not written."""
    x, features = rows.values, factor_RK.shape[1]
    z_SP = x.new_empty(at.num_rows, ranks.padded)
    grid = (at.tile_expert_Q.numel(), triton.cdiv(ranks.padded, ranks.block))
    kernels.shrink_kernel[grid](
        x, _or(rows.source_S, x), _or(rows.mask_SK, x), factor_RK, ranks.offset_E1, z_SP,
        at.tile_expert_Q, at.tile_row_Q, at.bound_E1,
        at.num_experts, features, x.stride(0), ranks.padded, scale,
        GATHER=rows.source_S is not None,
        MASKED=rows.mask_SK is not None,
        EVEN_K=features % at.tiles.depth == 0,
        BLOCK_M=at.tile_rows,
        BLOCK_K=at.tiles.depth,
        BLOCK_R=ranks.block,
        num_warps=at.tiles.warps,
        num_stages=at.tiles.stages,
    )  # fmt: skip
    return z_SP


def product(
    at: Sorted,
    rows: Rows,
    weight_EKN: Weight,
    expansions: list[Expansion],
    *,
    mask_SN: Tensor | None = None,
    unsort: bool = False,
) -> Tensor:
    """(S, N) rows @ weight[expert] + mask * the expansions.

    Two expansions ride in the product. More of them (several adapters at once) are added in
    further passes over the output.

    Args:
        at: the sorted rows.
        rows: what is multiplied; its dropout factors are not read.
        weight_EKN: frozen weights.
        expansions: low-rank updates.
        mask_SN: dropout factors on the sum of the expansions.
        unsort: write in routing order instead of sorted order.
    """
    out_SN = rows.values.new_empty(at.num_rows, weight_EKN.shape[2])
    for start in range(0, max(1, len(expansions)), 2):
        _product(
            at, rows, weight_EKN, expansions[start : start + 2], mask_SN, unsort, out_SN, start
        )
    return out_SN


def _product(
    at: Sorted,
    rows: Rows,
    weight_EKN: Weight,
    expansions: list[Expansion],
    mask_SN: Tensor | None,
    unsort: bool,
    out_SN: Tensor,
    done: int,
) -> None:
    x, (_, features, columns) = rows.values, weight_EKN.shape
    tiles, num_tiles = at.tiles, at.tile_expert_Q.numel()
    arguments = [_expansion_arguments(expansion) for expansion in expansions]
    arguments += [(x, x, at.bound_E1, 0, 0, 0)] * (2 - len(arguments))
    blocks = [expansion.ranks.block for expansion in expansions] + [RANK_BLOCK] * 2
    is_coded = weight_EKN.coded is not None
    plain = len(expansions) < 2 and mask_SN is None and not (features % 16 or columns % 16)
    plain = plain and not is_coded
    block_n = tiles.columns if plain else min(tiles.columns, _NARROW_COLUMNS)
    grid = (num_tiles * triton.cdiv(columns, block_n),)
    kernels.product_kernel[grid](
        x, _or(rows.source_S, x), *weight_EKN.arguments, out_SN, at.order_S, _or(mask_SN, x),
        at.tile_expert_Q, at.tile_row_Q, at.bound_E1, *arguments[0], *arguments[1],
        at.num_experts, num_tiles, features, columns, x.stride(0), *weight_EKN.strides,
        **weight_EKN.constants,
        GATHER=rows.source_S is not None,
        SCATTER=unsort,
        MASKED=mask_SN is not None,
        BASE=done == 0,
        TERMS=len(expansions),
        EVEN_K=features % tiles.depth == 0,
        BLOCK_M=at.tile_rows,
        BLOCK_N=block_n,
        BLOCK_K=tiles.depth,
        BLOCK_R0=blocks[0],
        BLOCK_R1=blocks[1],
        GROUP=_GROUP,
        num_warps=tiles.warps,
        # Codes and scales are loaded for each number, and take shared memory of their own.
        num_stages=min(tiles.stages, 2) if is_coded else tiles.stages,
    )  # fmt: skip


def _expansion_arguments(e: Expansion) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
    return e.z_SP, e.factor_RN, e.ranks.offset_E1, e.ranks.padded, e.column, e.factor_RN.shape[1]


def factor_grad(
    at: Sorted,
    z_SP: Tensor,
    rows: Rows,
    piece: LoraPiece,
    ranks: RankOffsets,
    weight_S: Tensor | None = None,
) -> Tensor:
    """(R, C) z[expert's rows].T @ rows, per expert.

    Args:
        at: the sorted rows.
        z_SP: rank-wide rows.
        rows: (S, C) what they are multiplied with.
        piece: whose factor it is the gradient of.
        ranks: the piece's ranks.
        weight_S: factors on z's rows, in routing order.
    """
    x, columns, tiles = rows.values, rows.values.shape[1], at.tiles
    out_RC = x.new_empty(piece.offsets[-1], columns)
    # Columns run fastest in the grid: neighbours then read the same z.
    block_c = min(tiles.columns, _NARROW_COLUMNS)
    rank_blocks = triton.cdiv(ranks.padded, ranks.block)
    grid = (triton.cdiv(columns, block_c), rank_blocks, at.num_experts)
    kernels.factor_grad_kernel[grid](
        z_SP, _or(weight_S, x), at.order_S, x, _or(rows.source_S, x), _or(rows.mask_SK, x),
        ranks.offset_E1, at.bound_E1, out_RC, columns, ranks.padded, x.stride(0),
        WEIGHTED=weight_S is not None,
        GATHER=rows.source_S is not None,
        MASKED=rows.mask_SK is not None,
        BLOCK_S=tiles.depth,
        BLOCK_R=ranks.block,
        BLOCK_C=block_c,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    return out_RC


def silu_mul(gate_up_SG: Tensor) -> Tensor:
    """(S, I) silu(gate) * up."""
    rows, width = gate_up_SG.shape[0], gate_up_SG.shape[1] // 2
    h_SI = gate_up_SG.new_empty(rows, width)
    block_m, block_n = _ROWWISE_TILE
    grid = (triton.cdiv(rows, block_m), triton.cdiv(width, block_n))
    rowwise.silu_mul_kernel[grid](gate_up_SG, h_SI, rows, width, BLOCK_M=block_m, BLOCK_N=block_n)
    return h_SI


def silu_mul_backward(
    at: Sorted, gate_up_SG: Tensor, dh_SI: Tensor, weight_S: Tensor
) -> tuple[Tensor, Tensor]:
    """((S, 2 * I) gradient, (S,) <dh, h> in routing order); turns `dh_SI` into h in place.

    `dh_SI` lacks the routing weight; the gradient has it.
    """
    rows, width = dh_SI.shape
    dgate_up_SG, dweight_S = torch.empty_like(gate_up_SG), torch.empty_like(weight_S)
    block_m, block_n = _ROWWISE_TILE
    rowwise.silu_mul_backward_kernel[(triton.cdiv(rows, block_m),)](
        gate_up_SG, dh_SI, weight_S, at.order_S, dgate_up_SG, dweight_S, rows, width,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return dgate_up_SG, dweight_S


def combine(y_SN: Tensor, top_k: int, weight_S: Tensor | None) -> Tensor:
    """(T, N) sum over each token's `top_k` rows, weighted; rows and weights in routing order."""
    tokens, columns = y_SN.shape[0] // top_k, y_SN.shape[1]
    out_TN = y_SN.new_empty(tokens, columns)
    block_m, block_n = _ROWWISE_TILE
    rowwise.combine_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(columns, block_n))](
        y_SN, _or(weight_S, y_SN), out_TN, tokens, top_k, columns,
        WEIGHTED=weight_S is not None, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return out_TN


def _or(tensor: Tensor | None, unread: Tensor) -> Tensor:
    """A kernel argument for a tensor that may be missing: any tensor will do, it is not read."""
    return unread if tensor is None else tensor
