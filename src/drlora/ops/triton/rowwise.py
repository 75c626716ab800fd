"""Device code of the `triton` engine that works row by row: the silu gate, and the combination.

    silu_mul            h = silu(gate) up
    silu_mul_backward   its backward, and the gradient <dh, h> of the routing weight with it
    combine             out_t = sum_k w_tk y_tk

They are kernels because each is bound by memory traffic: as torch operators the gate's backward
would pass about a dozen times over (S, I), here it reads three such tensors and writes three.
Sorted rows find their routing weight through `order`; nothing is added atomically.

Shape letters: M rows or tokens of a block, N columns of a block, I expert width, S routed rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# No `from __future__ import annotations` here: Triton reads the annotations.

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]


@triton.jit(do_not_specialize=["num_rows"])
def silu_mul_kernel(
    gate_up_ptr,  # (S, 2 * I)
    h_ptr,  # (S, I)
    num_rows,
    I,  # noqa: E741
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h = silu(gate) * up."""
    row_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_MN = (row_M < num_rows)[:, None] & (n_N < I)[None, :]
    gate_ptr = gate_up_ptr + row_M[:, None] * (2 * I) + n_N[None, :]
    gate_MN = tl.load(gate_ptr, inside_MN, other=0.0).to(tl.float32)
    up_MN = tl.load(gate_ptr + I, inside_MN, other=0.0).to(tl.float32)
    h_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN
    tl.store(h_ptr + row_M[:, None] * I + n_N[None, :], h_MN.to(h_ptr.dtype.element_ty), inside_MN)


@triton.jit(do_not_specialize=["num_rows"])
def silu_mul_backward_kernel(
    gate_up_ptr,  # (S, 2 * I)
    dh_ptr,  # (S, I): in, dh without the routing weight; out, h
    weight_ptr,  # (S,) routing weights in routing order
    order_ptr,  # (S,) routing position of each sorted row
    dgate_up_ptr,  # (S, 2 * I)
    dweight_ptr,  # (S,) in routing order
    num_rows,
    I,  # noqa: E741
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dgate_up with the routing weight in it, <dh, h> of each row, and h in place of dh.

    h is not kept by forward; here it costs one store, and dh is not needed again.
    """
    row_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live_M = row_M < num_rows
    order_M = tl.load(order_ptr + row_M, live_M, other=0)
    weight_M = tl.load(weight_ptr + order_M, live_M, other=0.0).to(tl.float32)
    dweight_M = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, I, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        inside_MN = live_M[:, None] & (n_N < I)[None, :]
        at_MN = row_M[:, None] * (2 * I) + n_N[None, :]
        dh_MN_ptr = dh_ptr + row_M[:, None] * I + n_N[None, :]
        gate_MN = tl.load(gate_up_ptr + at_MN, inside_MN, other=0.0).to(tl.float32)
        up_MN = tl.load(gate_up_ptr + at_MN + I, inside_MN, other=0.0).to(tl.float32)
        dh_MN = tl.load(dh_MN_ptr, inside_MN, other=0.0).to(tl.float32)
        sigmoid_MN = tl.sigmoid(gate_MN)
        silu_MN = gate_MN * sigmoid_MN
        h_MN = silu_MN * up_MN
        dweight_M += tl.sum(dh_MN * h_MN, axis=1)
        dh_MN *= weight_M[:, None]
        dgate_MN = dh_MN * up_MN * (sigmoid_MN + silu_MN * (1.0 - sigmoid_MN))
        dtype = dgate_up_ptr.dtype.element_ty
        tl.store(dgate_up_ptr + at_MN, dgate_MN.to(dtype), inside_MN)
        tl.store(dgate_up_ptr + at_MN + I, (dh_MN * silu_MN).to(dtype), inside_MN)
        tl.store(dh_MN_ptr, h_MN.to(dh_ptr.dtype.element_ty), inside_MN)
    tl.store(dweight_ptr + order_M, dweight_M.to(dweight_ptr.dtype.element_ty), live_M)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    y_ptr,  # (T * top_k, N), in routing order
    weight_ptr,  # (T * top_k,), if WEIGHTED
    out_ptr,  # (T, N)
    num_tokens,
    top_k,
    N,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[t] = sum over k of weight[t, k] y[t, k], always in the order of k."""
    token_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_M = token_M < num_tokens
    inside_MN = live_M[:, None] & (n_N < N)[None, :]
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, top_k):
        row_M = token_M * top_k + k
        y_MN = tl.load(y_ptr + row_M[:, None] * N + n_N[None, :], inside_MN, other=0.0)
        y_MN = y_MN.to(tl.float32)
        if WEIGHTED:
            weight_M = tl.load(weight_ptr + row_M, live_M, other=0.0).to(tl.float32)
            y_MN *= weight_M[:, None]
        acc_MN += y_MN
    tl.store(
        out_ptr + token_M[:, None] * N + n_N[None, :],
        acc_MN.to(out_ptr.dtype.element_ty),
        inside_MN,
    )
