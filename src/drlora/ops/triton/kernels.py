"""Device code of the `triton` engine: products whose rows AND ranks differ from expert to expert.

    shrink        z = s x F^T          rank-wide; forward with F = A, backward with F = B
    product       out = x W_e + z F    the frozen product, with up to two expansions in it
    factor_grad   dF = z^T x           a program per expert, block of ranks and block of columns

Rows are sorted by expert. A tile is BLOCK_M rows of one expert; `tile_expert` and `tile_row` say
whose and from where, and a tile past the last has expert number `num_experts`. Expert e's rows are
`bound[e] : bound[e + 1]`, its ranks `offset[e] : offset[e + 1]`: all of it is read on the device.
No kernel adds atomically, so every sum has one order and two runs agree to the bit.

Columns of z beyond an expert's rank are never written, so no load may pass the rank. Rows past an
expert's end are instead read as its last row, and dropped at the store or by a zero in z.

Shape letters: M rows of a tile, N output columns, K reduced features, R ranks, C columns of a
factor. Sums are float32. Source of the math: docs/engines.md; defined by `drlora.ops.naive`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# No `from __future__ import annotations` here: Triton reads the annotations.

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc):
    """acc + a b. Triton's interpreter would multiply the bits of bfloat16 as whole numbers."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _span(bound_ptr, expert):
    """(start, end) of an expert's rows or ranks."""
    return tl.load(bound_ptr + expert), tl.load(bound_ptr + expert + 1)


@triton.jit
def _dropped(x, mask_ptr, index, keep, MASKED: tl.constexpr):
    """x times its dropout factors, in x's dtype, as the other engines round it."""
    if MASKED:
        factor = tl.load(mask_ptr + index, mask=keep, other=0.0)
        x = (x.to(tl.float32) * factor.to(tl.float32)).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["num_experts"])
def shrink_kernel(
    x_ptr,  # (n, K), rows `stride_x` apart
    source_ptr,  # (S,) the row of x that each sorted row reads, if GATHER
    mask_ptr,  # (S, K) dropout factors, if MASKED
    f_ptr,  # (R, K) factor
    offset_ptr,  # (E + 1,)
    z_ptr,  # (S, stride_z)
    tile_expert_ptr,
    tile_row_ptr,
    bound_ptr,  # (E + 1,)
    num_experts,
    K,
    stride_x,
    stride_z,
    scaling,
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """z[row, r] = scaling * sum_k x[row, k] f[offset + r, k], for r below the expert's rank."""
    tile = tl.program_id(0)
    rank_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= num_experts:
        return
    first, last = _span(offset_ptr, expert)
    if tl.program_id(1) * BLOCK_R >= last - first:
        return
    _, end = _span(bound_ptr, expert)
    row_M = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    live_M = row_M < end
    row_M = tl.minimum(row_M, end - 1).to(tl.int64)
    source_M = row_M
    if GATHER:
        source_M = tl.load(source_ptr + row_M).to(tl.int64)
    inside_R = rank_R < last - first
    f_R = f_ptr + (first + rank_R).to(tl.int64) * K
    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        inside_K = k_K < K
        if EVEN_K:
            x_MK = tl.load(x_ptr + source_M[:, None] * stride_x + k_K[None, :])
        else:
            x_MK = tl.load(
                x_ptr + source_M[:, None] * stride_x + k_K[None, :], inside_K[None, :], other=0.0
            )
        x_MK = _dropped(
            x_MK, mask_ptr, row_M[:, None] * K + k_K[None, :], inside_K[None, :], MASKED
        )
        f_KR = tl.load(
            f_R[None, :] + k_K[:, None], inside_K[:, None] & inside_R[None, :], other=0.0
        )
        acc_MR = _dot(x_MK, f_KR, acc_MR)
    z_MR = (acc_MR * scaling).to(z_ptr.dtype.element_ty)
    tl.store(
        z_ptr + row_M[:, None] * stride_z + rank_R[None, :],
        z_MR,
        live_M[:, None] & inside_R[None, :],
    )


@triton.jit
def _expand(
    acc_MN,
    z_ptr,  # (S, stride_z)
    f_ptr,  # (R, width)
    offset_ptr,
    stride_z,
    column,  # first column of the update
    width,
    expert,
    row_M,
    first_n,
    mask_MN,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + z F on the columns `column : column + width`; no loop where they do not meet."""
    first, last = _span(offset_ptr, expert)
    meets = (first_n < column + width) & (first_n + BLOCK_N > column)
    rank = tl.where(meets, last - first, 0)
    feature_N = first_n + tl.arange(0, BLOCK_N) - column
    inside_N = (feature_N >= 0) & (feature_N < width)
    for start in range(0, rank, BLOCK_R):
        rank_R = start + tl.arange(0, BLOCK_R)
        inside_R = rank_R < rank
        z_MR = tl.load(
            z_ptr + row_M[:, None] * stride_z + rank_R[None, :], inside_R[None, :], other=0.0
        )
        f_RN = tl.load(
            f_ptr + (first + rank_R).to(tl.int64)[:, None] * width + feature_N[None, :],
            inside_R[:, None] & inside_N[None, :],
            other=0.0,
        )
        if MASKED:
            acc_MN += mask_MN * _dot(z_MR, f_RN, tl.zeros_like(acc_MN))
        else:
            acc_MN = _dot(z_MR, f_RN, acc_MN)
    return acc_MN


@triton.jit
def _decoded(
    w_ptr,  # codes of one expert, in the order of rows
    table_ptr,
    scale_ptr,  # of one expert
    row,
    column,
    inside,
    columns,  # of a stored row
    scale_columns,  # of a row of scales
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):
    """Numbers of few bits: float32 entry of the table times float32 scale, rounded once."""
    index = row * columns + column
    if BITS == 4:
        byte = tl.load(w_ptr + index // 2, inside, other=0).to(tl.int32)
        is_first = index % 2 == 0
        if HIGH_FIRST:
            code = tl.where(is_first, byte >> 4, byte & 15)
        else:
            code = tl.where(is_first, byte & 15, byte >> 4)
    else:
        code = tl.load(w_ptr + index, inside, other=0).to(tl.int32)
    place = row // SCALE_ROWS * scale_columns + column // SCALE_COLUMNS
    scale = tl.load(scale_ptr + place, inside, other=0.0)
    return (tl.load(table_ptr + code) * scale).to(dtype)


# A new number of tiles, which follows the tokens, must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_experts", "num_tiles"])
def product_kernel(
    x_ptr,  # (n, K), rows `stride_x` apart
    source_ptr,  # (S,) the row of x that each sorted row reads, if GATHER
    w_ptr,  # (E, K, N) in any strides; if BITS, codes
    table_ptr,  # if BITS, as the next
    scale_ptr,
    out_ptr,  # (S, N)
    target_ptr,  # (S,) the row of out that each sorted row writes, if SCATTER
    mask_ptr,  # (S, N) dropout factors on the expansions, if MASKED
    tile_expert_ptr,
    tile_row_ptr,
    bound_ptr,
    z0_ptr,  # first expansion, if TERMS >= 1
    f0_ptr,
    offset0_ptr,
    stride_z0,
    column0,
    width0,
    z1_ptr,  # second expansion, if TERMS >= 2
    f1_ptr,
    offset1_ptr,
    stride_z1,
    column1,
    width1,
    num_experts,
    num_tiles,
    K,
    N,
    stride_x,
    stride_we,
    stride_wk,
    stride_wn,
    stride_scale,  # of an expert
    scale_columns,
    BITS: tl.constexpr,  # of a number of W; 0 where it is stored as it is
    HIGH_FIRST: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    ROW_IS_N: tl.constexpr,  # whether a stored row of codes is one of N
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    MASKED: tl.constexpr,
    BASE: tl.constexpr,  # whether x W is computed; otherwise the expansions are added to out
    TERMS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R0: tl.constexpr,
    BLOCK_R1: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[row] = x[row] W_e + z0[row] F0_e + z1[row] F1_e."""
    # GROUP tiles of rows share each block of W's columns while it is in cache.
    program, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    leader = program // (GROUP * blocks) * GROUP
    size = tl.minimum(num_tiles - leader, GROUP)
    tile = leader + program % (GROUP * blocks) % size
    first_n = program % (GROUP * blocks) // size * BLOCK_N
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= num_experts:
        return
    _, end = _span(bound_ptr, expert)
    row_M = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    live_M = row_M < end
    row_M = tl.minimum(row_M, end - 1).to(tl.int64)
    n_N = first_n + tl.arange(0, BLOCK_N)
    inside_N = n_N < N
    target_M = row_M
    if SCATTER:
        target_M = tl.load(target_ptr + row_M).to(tl.int64)
    out_MN = out_ptr + target_M[:, None] * N + n_N[None, :]
    written_MN = live_M[:, None] & inside_N[None, :]

    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BASE:
        source_M = row_M
        if GATHER:
            source_M = tl.load(source_ptr + row_M).to(tl.int64)
        x_M = x_ptr + source_M * stride_x
        w_N = w_ptr + expert.to(tl.int64) * stride_we + n_N * stride_wn
        for start in range(0, K, BLOCK_K):
            k_K = start + tl.arange(0, BLOCK_K)
            if BITS:
                inside_K = k_K < K
                x_MK = tl.load(x_M[:, None] + k_K[None, :], inside_K[None, :], other=0.0)
                inside_KN = inside_K[:, None] & inside_N[None, :]
                codes = w_ptr + expert.to(tl.int64) * stride_we
                scales = scale_ptr + expert.to(tl.int64) * stride_scale
                if ROW_IS_N:
                    w_KN = _decoded(
                        codes, table_ptr, scales, n_N[None, :], k_K[:, None], inside_KN, K,
                        scale_columns, x_MK.dtype, BITS, HIGH_FIRST, SCALE_ROWS, SCALE_COLUMNS,
                    )  # fmt: skip
                else:
                    w_KN = _decoded(
                        codes, table_ptr, scales, k_K[:, None], n_N[None, :], inside_KN, N,
                        scale_columns, x_MK.dtype, BITS, HIGH_FIRST, SCALE_ROWS, SCALE_COLUMNS,
                    )  # fmt: skip
            elif EVEN_K:
                x_MK = tl.load(x_M[:, None] + k_K[None, :])
                w_KN = tl.load(
                    w_N[None, :] + k_K[:, None] * stride_wk, inside_N[None, :], other=0.0
                )
            else:
                inside_K = k_K < K
                x_MK = tl.load(x_M[:, None] + k_K[None, :], inside_K[None, :], other=0.0)
                w_KN = tl.load(
                    w_N[None, :] + k_K[:, None] * stride_wk,
                    inside_K[:, None] & inside_N[None, :],
                    other=0.0,
                )
            acc_MN = _dot(x_MK, w_KN, acc_MN)
    else:
        acc_MN += tl.load(out_MN, written_MN, other=0.0).to(tl.float32)

    mask_MN = acc_MN
    if MASKED:
        index_MN = row_M[:, None] * N + n_N[None, :]
        mask_MN = tl.load(mask_ptr + index_MN, inside_N[None, :], other=0.0).to(tl.float32)
    if TERMS >= 1:
        acc_MN = _expand(
            acc_MN, z0_ptr, f0_ptr, offset0_ptr, stride_z0, column0, width0,
            expert, row_M, first_n, mask_MN, MASKED, BLOCK_N, BLOCK_R0,
        )  # fmt: skip
    if TERMS >= 2:
        acc_MN = _expand(
            acc_MN, z1_ptr, f1_ptr, offset1_ptr, stride_z1, column1, width1,
            expert, row_M, first_n, mask_MN, MASKED, BLOCK_N, BLOCK_R1,
        )  # fmt: skip
    tl.store(out_MN, acc_MN.to(out_ptr.dtype.element_ty), written_MN)


@triton.jit
def factor_grad_kernel(
    z_ptr,  # (S, stride_z)
    weight_ptr,  # (S,) routing weights in routing order, if WEIGHTED
    order_ptr,  # (S,) routing position of each sorted row, if WEIGHTED
    x_ptr,  # (n, C), rows `stride_x` apart
    source_ptr,  # (S,) the row of x that each sorted row reads, if GATHER
    mask_ptr,  # (S, C) dropout factors on x, if MASKED
    offset_ptr,
    bound_ptr,
    out_ptr,  # (R, C)
    C,
    stride_z,
    stride_x,
    WEIGHTED: tl.constexpr,
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[offset + r, c] = sum over the expert's rows of weight z[row, r] x[row, c].

    An expert without rows gets zeros, so every row of out is written.
    """
    c_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rank_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.program_id(2)
    first, last = _span(offset_ptr, expert)
    if tl.program_id(1) * BLOCK_R >= last - first:
        return
    begin, end = _span(bound_ptr, expert)
    inside_C, inside_R = c_C < C, rank_R < last - first
    # Wide side first: Hopper's products want 64 rows or more on the left.
    acc_CR = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_S):
        row_S = start + tl.arange(0, BLOCK_S)
        live_S = row_S < end
        row_S = tl.minimum(row_S, end - 1).to(tl.int64)
        source_S = row_S
        if GATHER:
            source_S = tl.load(source_ptr + row_S).to(tl.int64)
        z_SR = tl.load(
            z_ptr + row_S[:, None] * stride_z + rank_R[None, :],
            live_S[:, None] & inside_R[None, :],
            other=0.0,
        )
        if WEIGHTED:
            weight_S = tl.load(weight_ptr + tl.load(order_ptr + row_S)).to(tl.float32)
            z_SR = (z_SR.to(tl.float32) * weight_S[:, None]).to(z_SR.dtype)
        x_SC = tl.load(
            x_ptr + source_S[:, None] * stride_x + c_C[None, :], inside_C[None, :], other=0.0
        )
        x_SC = _dropped(
            x_SC, mask_ptr, row_S[:, None] * C + c_C[None, :], inside_C[None, :], MASKED
        )
        acc_CR = _dot(tl.trans(x_SC), z_SR, acc_CR)
    tl.store(
        out_ptr + (first + rank_R).to(tl.int64)[:, None] * C + c_C[None, :],
        tl.trans(acc_CR).to(out_ptr.dtype.element_ty),
        inside_R[:, None] & inside_C[None, :],
    )
