"""The input gradient of a site group: one product over all projections and both adapters, in one launch.

``dS`` is stacked by adapter, so an adapter's part is one more range of features; rows of several ``A`` are stacked by
address and weights stay where they are. How a NaN stays with the rows that use its adapter: ``low_rank``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.low_rank import count_users, stacked
from twn_kernels.impl.triton.primitives import dot, grouped_tile

__all__ = ["group_dx_kernel"]


@triton.jit
def _add_projection(
    acc,  # [BLOCK_M, BLOCK_N]
    dy,  # first column of the projection
    w,
    rows,
    in_rows,
    columns,
    in_columns,
    N,
    stride_dm,
    stride_w,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc + dy[rows] @ w[:, columns]``."""
    n = tl.arange(0, BLOCK_K).to(tl.int64)
    dy_tiles = dy + rows[:, None] * stride_dm + n[None, :]
    w_tiles = w + n[:, None] * stride_w + columns[None, :]
    w_step = tl.cast(stride_w, tl.int64) * BLOCK_K
    for n0 in tl.range(0, N, BLOCK_K):
        in_n = n < N - n0
        tile_dy = tl.load(dy_tiles, mask=in_rows[:, None] & in_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        tile_w = tl.load(w_tiles, mask=in_n[:, None] & in_columns[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(tile_dy, tile_w, acc, PRECISION)
        dy_tiles += BLOCK_K
        w_tiles += w_step
    return acc


@triton.jit
def _add_stack(
    acc,
    ds,  # first column of the adapter
    a_0,
    a_1,
    a_2,
    rows,
    in_rows,
    uses,
    columns,
    in_columns,
    rank_0,
    rank_1,
    rank,  # of all projections
    limit,  # rank, or 0 to skip
    stride_sm,
    stride_0,
    stride_1,
    stride_2,
    MIXED: tl.constexpr,  # some rows do not use the adapter: what is not finite in A must not reach them
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``acc + ds[rows] @ [a_0; a_1; a_2][:, columns]``; zero iterations where ``limit`` is 0."""
    j = tl.arange(0, BLOCK_R).to(tl.int64)
    damaged = tl.zeros([BLOCK_N], dtype=tl.int32)
    for j0 in tl.range(0, limit, BLOCK_R, num_stages=1 if MIXED else None):
        in_rank = j < rank - j0
        tile_s = tl.load(  # [BLOCK_M, BLOCK_R]
            ds + rows[:, None] * stride_sm + (j0 + j)[None, :],
            mask=in_rows[:, None] & in_rank[None, :],
            other=0.0,
        )
        a_rows = stacked((j0 + j)[:, None], a_0, a_1, a_2, rank_0, rank_1, stride_0, stride_1, stride_2, COUNT, ALIGNED)
        tile_a = tl.load(a_rows + columns[None, :], mask=in_rank[:, None] & in_columns[None, :], other=0.0)
        if MIXED:
            finite = tl.abs(tile_a.to(tl.float32)) < float("inf")
            damaged |= tl.max(tl.where(finite, 0, 1), axis=0)
            tile_a = tl.where(finite, tile_a, 0.0)
        acc = dot(tile_s, tile_a, acc, PRECISION)
    if MIXED:
        if tl.max(damaged, axis=0) > 0:
            acc = tl.where(uses[:, None] & (damaged > 0)[None, :], float("nan"), acc)
    return acc


@triton.jit
def _add_adapter(
    acc,
    ds,
    a_0,
    a_1,
    a_2,
    rows,
    in_rows,
    uses,
    users,
    users_all,
    columns,
    in_columns,
    rank_0,
    rank_1,
    rank_2,
    stride_sm,
    stride_0,
    stride_1,
    stride_2,
    COUNT: tl.constexpr,
    SEPARATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``acc`` plus one adapter's term of every projection; a tile whose rows do not use it runs no iteration."""
    rank = rank_0 + rank_1 + rank_2
    if SEPARATE:
        delta = _add_stack(
            tl.zeros_like(acc), ds, a_0, a_1, a_2, rows, in_rows, uses, columns, in_columns, rank_0, rank_1, rank,
            tl.where(users > 0, rank, 0), stride_sm, stride_0, stride_1, stride_2,
            False, COUNT, ALIGNED, PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        return tl.where(uses[:, None], acc + delta, acc)
    else:
        acc = _add_stack(
            acc, ds, a_0, a_1, a_2, rows, in_rows, uses, columns, in_columns, rank_0, rank_1, rank,
            tl.where(users == users_all, rank, 0), stride_sm, stride_0, stride_1, stride_2,
            False, COUNT, ALIGNED, PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        return _add_stack(
            acc, ds, a_0, a_1, a_2, rows, in_rows, uses, columns, in_columns, rank_0, rank_1, rank,
            tl.where((users > 0) & (users < users_all), rank, 0), stride_sm, stride_0, stride_1, stride_2,
            True, COUNT, ALIGNED, PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def group_dx_kernel(
    dy,  # [M, N_0 + N_1 + N_2]
    w_0,  # [N_0, K]
    w_1,
    w_2,
    ds,  # [M, all ranks of reasoning + all of embedding]
    a_r0,  # [rank_r0, K]
    a_r1,
    a_r2,
    a_e0,
    a_e1,
    a_e2,
    routes,  # int8 [M]
    dx,  # [M, K]
    M,
    K,
    N_0,
    N_1,
    N_2,
    rank_r0,
    rank_r1,
    rank_r2,
    rank_e0,
    rank_e1,
    rank_e2,
    stride_dm,
    stride_w0,
    stride_w1,
    stride_w2,
    stride_sm,
    stride_ar0,
    stride_ar1,
    stride_ar2,
    stride_ae0,
    stride_ae1,
    stride_ae2,
    COUNT: tl.constexpr,  # projections
    PRESENT: tl.constexpr,
    SEPARATE: tl.constexpr,  # adapters in their own accumulator: they are fp32 beside 16-bit weights
    ALIGNED: tl.constexpr,  # every A can be read in 16-byte words
    BASE_PRECISION: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < M
    in_columns = columns < K
    if PRESENT != 0:
        route = tl.load(routes + rows, mask=in_rows, other=0).to(tl.int32)
        users_r, users_e, users_all = count_users(route, in_rows)

    acc_type: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc_type)
    acc = _add_projection(
        acc, dy, w_0, rows, in_rows, columns, in_columns, N_0, stride_dm, stride_w0, BASE_PRECISION, BLOCK_K
    )
    if COUNT > 1:
        acc = _add_projection(
            acc, dy + N_0, w_1, rows, in_rows, columns, in_columns, N_1, stride_dm, stride_w1, BASE_PRECISION, BLOCK_K
        )
    if COUNT > 2:
        acc = _add_projection(
            acc, dy + N_0 + N_1, w_2, rows, in_rows, columns, in_columns, N_2, stride_dm, stride_w2, BASE_PRECISION,
            BLOCK_K,
        )  # fmt: skip
    if PRESENT & 1:
        acc = _add_adapter(
            acc, ds, a_r0, a_r1, a_r2, rows, in_rows, (route & 1) != 0, users_r, users_all, columns, in_columns,
            rank_r0, rank_r1, rank_r2, stride_sm, stride_ar0, stride_ar1, stride_ar2,
            COUNT, SEPARATE, ALIGNED, LOW_RANK_PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    if PRESENT & 2:
        acc = _add_adapter(
            acc, ds + (rank_r0 + rank_r1 + rank_r2), a_e0, a_e1, a_e2, rows, in_rows, (route & 2) != 0, users_e,
            users_all, columns, in_columns, rank_e0, rank_e1, rank_e2, stride_sm, stride_ae0, stride_ae1, stride_ae2,
            COUNT, SEPARATE, ALIGNED, LOW_RANK_PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    tl.store(
        dx + rows[:, None] * K + columns[None, :],
        acc.to(dx.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )
