"""The fused product: base weight and both low-rank terms in one accumulator.

Owns the kernel behind the forward (``y``), the fan-out (``y_reasoning``, ``y_embedding``) and the input gradient
(``dx``: the same kernel on ``dy``, ``weight^T``, ``dS`` and ``A^T``; only strides differ). It reads the routes of its
own rows and runs no, one or two low-rank ranges after the base range, so a base-only tile does no work for adapters.
How a NaN in ``B`` stays with the rows that use it: ``low_rank``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.low_rank import add_adapter, count_users
from twn_kernels.impl.triton.primitives import dot, grouped_tile

__all__ = ["gemm_kernel"]


@triton.jit(do_not_specialize=["M", "threshold_r", "threshold_e"])
def gemm_kernel(
    x,  # [M, K]
    w,  # [N, K] by strides
    bias,  # [N] or None
    s,  # [M, rank_r + rank_e]
    b_r,  # [N, rank_r] by strides
    b_e,  # [N, rank_e] by strides
    routes,  # int8 [M]
    seed,  # int64 [1] or None
    y,  # [M, N]; reasoning's with FANOUT
    y_e,  # [M, N] or None
    M,
    N,
    K,
    rank_r,
    rank_e,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_brn,
    stride_brk,
    stride_ben,
    stride_bek,
    threshold_r,
    threshold_e,
    inverse_keep_r,
    inverse_keep_e,
    PRESENT: tl.constexpr,  # adapters that can occur: 0 is a plain linear layer
    FANOUT: tl.constexpr,  # two outputs, one adapter each
    SEPARATE: tl.constexpr,  # low-rank terms in their own accumulator: fan-out, dropout, fp32 adapters
    DROPOUT: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < M
    in_columns = columns < N

    if PRESENT != 0:
        route = tl.load(routes + rows, mask=in_rows, other=0).to(tl.int32)
        users_r, users_e, users_all = count_users(route, in_rows)

    acc_type: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc_type)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_tiles = x + rows[:, None] * stride_xm + k[None, :] * stride_xk
    w_tiles = w + k[:, None] * stride_wk + columns[None, :] * stride_wn
    x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
    w_step = tl.cast(stride_wk, tl.int64) * BLOCK_K
    for k0 in tl.range(0, K, BLOCK_K):
        in_k = k < K - k0
        x_tile = tl.load(x_tiles, mask=in_rows[:, None] & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w_tile = tl.load(w_tiles, mask=in_k[:, None] & in_columns[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x_tile, w_tile, acc, BASE_PRECISION)
        x_tiles += x_step
        w_tiles += w_step

    if bias is not None:
        acc += tl.load(bias + columns, mask=in_columns, other=0.0).to(acc_type)[None, :]

    out = acc
    targets = rows[:, None] * N + columns[None, :]
    in_tile = in_rows[:, None] & in_columns[None, :]
    if PRESENT & 1:
        out = add_adapter(
            out, s, b_r, rows, in_rows, (route & 1) != 0, users_r, users_all, columns, in_columns, rank_r,
            stride_sm, stride_brn, stride_brk, seed, 0, threshold_r, inverse_keep_r,
            SEPARATE, DROPOUT, LOW_RANK_PRECISION, BLOCK_R, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    if FANOUT:
        tl.store(y + targets, out.to(y.dtype.element_ty), mask=in_tile)
        out = acc
    if PRESENT & 2:
        out = add_adapter(
            out, s + rank_r, b_e, rows, in_rows, (route & 2) != 0, users_e, users_all, columns, in_columns,
            rank_e, stride_sm, stride_ben, stride_bek, seed, 1, threshold_e, inverse_keep_e,
            SEPARATE, DROPOUT, LOW_RANK_PRECISION, BLOCK_R, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    if FANOUT:
        tl.store(y_e + targets, out.to(y.dtype.element_ty), mask=in_tile)
    else:
        tl.store(y + targets, out.to(y.dtype.element_ty), mask=in_tile)
