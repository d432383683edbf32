"""The fused product: base weight and both low-rank terms in one accumulator.

Owns the kernel behind the forward (``y``), the fan-out (``y_reasoning``, ``y_embedding``) and the input gradient
(``dx``: the same kernel on ``dy``, ``weight^T``, ``dS`` and ``A^T``; only strides differ). It reads the routes of its
own rows and runs no, one or two low-rank ranges after the base range, so a base-only tile does no work for adapters.

Isolation. ``s`` holds exact zeros where a row does not use an adapter, but 0 * NaN is NaN, so a NaN in ``B`` would
cross rows inside a tile. A tile whose rows all use the adapter needs no care. A mixed tile replaces the NaN and Inf of
its slice of ``B`` by zeros and afterwards writes NaN where a row does use the adapter and its column had one. That
needs no second accumulator, so the largest tiles stay free of spills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.primitives import (
    dot,
    dropout_keep,
    dropout_rows,
    grouped_tile,
)

__all__ = ["gemm_kernel"]


@triton.jit
def _add_low_rank(
    acc,  # [BLOCK_M, BLOCK_N]
    s,  # first column of the adapter
    b,
    rows,
    in_rows,
    columns,
    in_columns,
    rank,
    limit,  # rank, or 0 to skip
    stride_sm,
    stride_bn,
    stride_bk,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``acc + s[rows] @ b[columns]^T`` over the adapter's rank; zero iterations where ``limit`` is 0."""
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    for r0 in tl.range(0, limit, BLOCK_R):
        in_rank = r < rank - r0
        s_tile = tl.load(  # [BLOCK_M, BLOCK_R]
            s + rows[:, None] * stride_sm + (r0 + r)[None, :],
            mask=in_rows[:, None] & in_rank[None, :],
            other=0.0,
        )
        b_tile = tl.load(  # [BLOCK_R, BLOCK_N]
            b + (r0 + r)[:, None] * stride_bk + columns[None, :] * stride_bn,
            mask=in_rank[:, None] & in_columns[None, :],
            other=0.0,
        )
        acc = dot(s_tile, b_tile, acc, PRECISION)
    return acc


@triton.jit
def _add_low_rank_to_mixed(
    acc,
    s,
    b,
    rows,
    in_rows,
    uses,
    columns,
    in_columns,
    rank,
    limit,
    stride_sm,
    stride_bn,
    stride_bk,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same sum where only some rows use the adapter: what is not finite in ``b`` reaches those rows alone."""
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    damaged = tl.zeros([BLOCK_N], dtype=tl.int32)
    for r0 in tl.range(0, limit, BLOCK_R, num_stages=1):
        in_rank = r < rank - r0
        s_tile = tl.load(
            s + rows[:, None] * stride_sm + (r0 + r)[None, :],
            mask=in_rows[:, None] & in_rank[None, :],
            other=0.0,
        )
        b_tile = tl.load(
            b + (r0 + r)[:, None] * stride_bk + columns[None, :] * stride_bn,
            mask=in_rank[:, None] & in_columns[None, :],
            other=0.0,
        )
        finite = tl.abs(b_tile.to(tl.float32)) < float("inf")
        damaged |= tl.max(tl.where(finite, 0, 1), axis=0)
        acc = dot(s_tile, tl.where(finite, b_tile, 0.0), acc, PRECISION)
    if tl.max(damaged, axis=0) > 0:
        acc = tl.where(uses[:, None] & (damaged > 0)[None, :], float("nan"), acc)
    return acc


@triton.jit
def _add_selected(
    base,
    s,
    b,
    rows,
    in_rows,
    uses,
    columns,
    in_columns,
    rank,
    limit,
    stride_sm,
    stride_bn,
    stride_bk,
    seed,
    adapter: tl.constexpr,
    threshold,
    inverse_keep,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``base`` plus the adapter's term from its own accumulator, selected by row and, with dropout, by element."""
    delta = _add_low_rank(
        tl.zeros_like(base), s, b, rows, in_rows, columns, in_columns, rank, limit,
        stride_sm, stride_bn, stride_bk, PRECISION, BLOCK_R,
    )  # fmt: skip
    taken = uses[:, None]
    if DROPOUT:
        hashes = dropout_rows(seed, adapter, rows)
        taken = taken & dropout_keep(hashes[:, None], columns[None, :], threshold)
        delta = delta * tl.cast(inverse_keep, tl.float32)
    return tl.where(taken, base + delta, base)


@triton.jit
def _add_adapter(
    acc,
    s,
    b,
    rows,
    in_rows,
    uses,
    users,
    users_all,
    columns,
    in_columns,
    rank,
    stride_sm,
    stride_bn,
    stride_bk,
    seed,
    adapter: tl.constexpr,
    threshold,
    inverse_keep,
    SEPARATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``acc`` plus one adapter's term for the rows that use it; a tile without such rows runs no iteration."""
    if SEPARATE:
        limit = tl.where(users > 0, rank, 0)
        return _add_selected(
            acc, s, b, rows, in_rows, uses, columns, in_columns, rank, limit, stride_sm, stride_bn, stride_bk,
            seed, adapter, threshold, inverse_keep, DROPOUT, PRECISION, BLOCK_R,
        )  # fmt: skip
    else:
        pure = tl.where(users == users_all, rank, 0)
        mixed = tl.where((users > 0) & (users < users_all), rank, 0)
        acc = _add_low_rank(
            acc, s, b, rows, in_rows, columns, in_columns, rank, pure,
            stride_sm, stride_bn, stride_bk, PRECISION, BLOCK_R,
        )  # fmt: skip
        return _add_low_rank_to_mixed(
            acc, s, b, rows, in_rows, uses, columns, in_columns, rank, mixed,
            stride_sm, stride_bn, stride_bk, PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip


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
        # one reduction counts three things, 10 bits each (BLOCK_M < 1024); rows past the end of x count nowhere
        counts = (route & 1) + ((route & 2) << 9) + (in_rows.to(tl.int32) << 20)
        counts = tl.sum(counts, axis=0)
        users_r = counts & 1023
        users_e = (counts >> 10) & 1023
        users_all = counts >> 20

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
        out = _add_adapter(
            out, s, b_r, rows, in_rows, (route & 1) != 0, users_r, users_all, columns, in_columns, rank_r,
            stride_sm, stride_brn, stride_brk, seed, 0, threshold_r, inverse_keep_r,
            SEPARATE, DROPOUT, LOW_RANK_PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    if FANOUT:
        tl.store(y + targets, out.to(y.dtype.element_ty), mask=in_tile)
        out = acc
    if PRESENT & 2:
        out = _add_adapter(
            out, s + rank_r, b_e, rows, in_rows, (route & 2) != 0, users_e, users_all, columns, in_columns,
            rank_e, stride_sm, stride_ben, stride_bek, seed, 1, threshold_e, inverse_keep_e,
            SEPARATE, DROPOUT, LOW_RANK_PRECISION, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    if FANOUT:
        tl.store(y_e + targets, out.to(y.dtype.element_ty), mask=in_tile)
    else:
        tl.store(y + targets, out.to(y.dtype.element_ty), mask=in_tile)
