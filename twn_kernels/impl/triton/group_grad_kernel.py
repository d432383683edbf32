"""The gradients of a site group, one launch each: ``dS``, ``dx`` and all ``dA``, over up to three projections.

``dS`` is stacked by adapter, reasoning's blocks of every projection first: an adapter's columns are then one range,
``dx`` runs over it as over more features and ``dA`` is one product with it. Weights and adapters stay where they are:
projections are told apart by pointers, rows of several ``A`` are stacked by address. How a NaN stays with the rows
that use its adapter: ``low_rank`` for ``dx``, load masks for ``dA``, a select for ``dS``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.low_rank import count_users
from twn_kernels.impl.triton.primitives import any_of, dot, grouped_tile

__all__ = ["group_dx_kernel", "group_grad_kernel", "group_shrink_kernel"]


@triton.jit
def _pick(second, third, first_value, second_value, third_value):
    """The value of a program's projection."""
    return tl.where(third, third_value, tl.where(second, second_value, first_value))


@triton.jit
def _shrink_operand(b, n, in_n, r, in_rank, stride_bn):
    """``[BLOCK_K, BLOCK_R]`` of one ``B``."""
    return tl.load(
        b + n.to(tl.int64)[:, None] * stride_bn + r[None, :], mask=in_n[:, None] & in_rank[None, :], other=0.0
    )


@triton.jit
def _store_shrink(out, acc, rows, in_rows, uses, r, rank, scaling, stride_om):
    s = tl.where(uses[:, None], acc * tl.cast(scaling, tl.float32), 0.0)
    tl.store(
        out + rows[:, None] * stride_om + r[None, :],
        s.to(out.dtype.element_ty),
        mask=in_rows[:, None] & (r < rank)[None, :],
    )


@triton.jit(do_not_specialize=["M", "tiles", "splits"])
def group_shrink_kernel(
    dy,  # [M, N_0 + N_1 + N_2]
    b_r0,  # [N_0, rank_r0]
    b_r1,
    b_r2,
    b_e0,
    b_e1,
    b_e2,
    routes,  # int8 [M]
    out,  # dS [M, all ranks of reasoning + all of embedding]; or fp32 parts [splits, M, the same]
    M,
    tiles,
    splits,
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
    stride_br0,
    stride_br1,
    stride_br2,
    stride_be0,
    stride_be1,
    stride_be2,
    stride_om,
    stride_os,
    scaling_r0,
    scaling_r1,
    scaling_r2,
    scaling_e0,
    scaling_e1,
    scaling_e2,
    PRESENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program has the same ranks of both adapters of one projection, so that ``dy`` is read once for both."""
    tile = tl.program_id(0) % tiles
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    tiles_0 = tl.cdiv(tl.maximum(rank_r0, rank_e0), BLOCK_R)
    tiles_1 = tl.cdiv(tl.maximum(rank_r1, rank_e1), BLOCK_R)
    second = tile >= tiles_0
    third = tile >= tiles_0 + tiles_1
    r = (tile - _pick(second, third, 0, tiles_0, tiles_0 + tiles_1)) * BLOCK_R + tl.arange(0, BLOCK_R)
    N = _pick(second, third, N_0, N_1, N_2)
    dy_rows = dy + _pick(second, third, 0, N_0, N_0 + N_1) + rows[:, None] * stride_dm
    rank_r = _pick(second, third, rank_r0, rank_r1, rank_r2)
    rank_e = _pick(second, third, rank_e0, rank_e1, rank_e2)
    b_r = _pick(second, third, b_r0, b_r1, b_r2)
    b_e = _pick(second, third, b_e0, b_e1, b_e2)
    stride_br = _pick(second, third, stride_br0, stride_br1, stride_br2)
    stride_be = _pick(second, third, stride_be0, stride_be1, stride_be2)

    route = tl.load(routes + rows, mask=in_rows, other=0).to(tl.int32) & PRESENT
    in_rank_r = r < tl.where(any_of((route & 1) != 0) > 0, rank_r, 0)
    in_rank_e = r < tl.where(any_of((route & 2) != 0) > 0, rank_e, 0)
    used_r = any_of(in_rank_r) > 0
    used_e = any_of(in_rank_e) > 0
    steps = tl.cdiv(tl.cdiv(N, BLOCK_K), splits)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(N, begin + steps * BLOCK_K)
    acc_type: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    acc_r = tl.zeros([BLOCK_M, BLOCK_R], dtype=acc_type)
    acc_e = tl.zeros([BLOCK_M, BLOCK_R], dtype=acc_type)
    k = tl.arange(0, BLOCK_K)
    for n0 in tl.range(begin, tl.where(used_r & used_e, end, begin), BLOCK_K):
        in_n = k < end - n0
        tile_dy = tl.load(dy_rows + (n0 + k)[None, :], mask=in_rows[:, None] & in_n[None, :], other=0.0)
        tile_r = _shrink_operand(b_r, n0 + k, in_n, r, in_rank_r, stride_br)
        tile_e = _shrink_operand(b_e, n0 + k, in_n, r, in_rank_e, stride_be)
        acc_r = dot(tile_dy.to(tile_r.dtype), tile_r, acc_r, PRECISION)
        acc_e = dot(tile_dy.to(tile_e.dtype), tile_e, acc_e, PRECISION)
    b = tl.where(used_r, b_r, b_e)
    stride_b = tl.where(used_r, stride_br, stride_be)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=acc_type)
    for n0 in tl.range(begin, tl.where(used_r != used_e, end, begin), BLOCK_K):
        in_n = k < end - n0
        tile_dy = tl.load(dy_rows + (n0 + k)[None, :], mask=in_rows[:, None] & in_n[None, :], other=0.0)
        tile_b = _shrink_operand(b, n0 + k, in_n, r, in_rank_r | in_rank_e, stride_b)
        acc = dot(tile_dy.to(tile_b.dtype), tile_b, acc, PRECISION)
    alone = used_r != used_e
    acc_r = tl.where(alone & used_r, acc, acc_r)
    acc_e = tl.where(alone & used_e, acc, acc_e)

    out_r = out + tl.program_id(1).to(tl.int64) * stride_os + _pick(second, third, 0, rank_r0, rank_r0 + rank_r1)
    out_e = out + tl.program_id(1).to(tl.int64) * stride_os + (rank_r0 + rank_r1 + rank_r2)
    out_e += _pick(second, third, 0, rank_e0, rank_e0 + rank_e1)
    scaling_r = _pick(second, third, scaling_r0, scaling_r1, scaling_r2)
    scaling_e = _pick(second, third, scaling_e0, scaling_e1, scaling_e2)
    _store_shrink(out_r, acc_r, rows, in_rows, (route & 1) != 0, r, rank_r, scaling_r, stride_om)
    _store_shrink(out_e, acc_e, rows, in_rows, (route & 2) != 0, r, rank_e, scaling_e, stride_om)


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
def _stacked(
    j, a_0, a_1, a_2, rank_0, rank_1, stride_0, stride_1, stride_2, COUNT: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointers to rows ``j`` of the matrices on top of one another."""
    pointers = a_0 + j * stride_0
    if COUNT > 1:
        pointers = tl.where(j >= rank_0, a_1 + (j - rank_0) * stride_1, pointers)
    if COUNT > 2:
        pointers = tl.where(j >= rank_0 + rank_1, a_2 + (j - rank_0 - rank_1) * stride_2, pointers)
    if ALIGNED:  # a select hides it from Triton 3.9
        pointers = tl.multiple_of(pointers, [16, 16])
    return pointers


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
        a_rows = _stacked(
            (j0 + j)[:, None], a_0, a_1, a_2, rank_0, rank_1, stride_0, stride_1, stride_2, COUNT, ALIGNED
        )
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


@triton.jit(do_not_specialize=["M", "tokens_per_split"])
def group_grad_kernel(
    x,  # [M, F]
    ds,  # [M, all ranks of reasoning + all of embedding]
    routes,  # int8 [M]
    out_r0,  # [rank_r0, F] by strides, with a stride between parts
    out_r1,
    out_r2,
    out_e0,
    out_e1,
    out_e2,
    M,
    F,
    rank_r0,  # all 0 where no gradient of reasoning is wanted
    rank_r1,
    rank_r2,
    rank_e0,
    rank_e1,
    rank_e2,
    column_e,  # embedding's first column of ds
    tokens_per_split,
    stride_xm,
    stride_sm,
    stride_of,
    stride_or,
    stride_os,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STRETCH: tl.constexpr,
):
    tiles_r = tl.cdiv(rank_r0 + rank_r1 + rank_r2, BLOCK_R)
    embedding = tl.program_id(1) >= tiles_r
    bit = tl.where(embedding, 2, 1)
    rank_0 = tl.where(embedding, rank_e0, rank_r0)
    rank_1 = tl.where(embedding, rank_e1, rank_r1)
    rank = rank_0 + rank_1 + tl.where(embedding, rank_e2, rank_r2)
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    tile = tl.program_id(1) - tl.where(embedding, tiles_r, 0)
    j = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    in_f = f < F
    in_rank = j < rank
    narrow = ds + tl.where(embedding, column_e, 0)
    acc_type: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_F, BLOCK_R], dtype=acc_type)
    begin = tl.program_id(2) * tokens_per_split
    end = begin + tl.minimum(M - begin, tokens_per_split)
    t = tl.arange(0, BLOCK_T)
    stretch = tl.arange(0, STRETCH)
    for start in tl.range(begin, end, STRETCH, num_stages=1):
        ahead = tl.load(routes + (start + stretch).to(tl.int64), mask=start + stretch < end, other=0).to(tl.int32)
        used = any_of((ahead & bit) != 0) > 0
        stop = tl.where(used, tl.minimum(start + STRETCH, end), start)
        for t0 in tl.range(start, stop, BLOCK_T):
            rows = (t0 + t).to(tl.int64)
            route = tl.load(routes + rows, mask=t0 + t < stop, other=0).to(tl.int32)
            uses = (route & bit) != 0
            wide = tl.load(  # [BLOCK_T, BLOCK_F]
                x + rows[:, None] * stride_xm + f[None, :], mask=uses[:, None] & in_f[None, :], other=0.0
            )
            tile_s = tl.load(  # [BLOCK_T, BLOCK_R]
                narrow + rows[:, None] * stride_sm + j[None, :], mask=uses[:, None] & in_rank[None, :], other=0.0
            )
            acc = dot(tl.trans(wide.to(tile_s.dtype)), tile_s, acc, PRECISION)
    pointers = _stacked(
        j[None, :], tl.where(embedding, out_e0, out_r0), tl.where(embedding, out_e1, out_r1),
        tl.where(embedding, out_e2, out_r2), rank_0, rank_1, stride_or, stride_or, stride_or, COUNT, False,
    )  # fmt: skip
    tl.store(
        pointers + tl.program_id(2).to(tl.int64) * stride_os + f[:, None] * stride_of,
        acc.to(out_r0.dtype.element_ty),
        mask=in_f[:, None] & in_rank[None, :],
    )
