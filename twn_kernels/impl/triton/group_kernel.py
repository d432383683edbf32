"""The product of a site group: up to three projections of one input in one persistent launch.

A program walks tiles of all projections in one order. A tile runs the base range of its projection, then, only if a
row of the tile uses the adapter, the low-rank range of ``reasoning`` and that of ``embedding``; a base-only tile does
no work for adapters. Base weights, biases and ``B`` stay where they are: each projection brings its own pointers.
The epilogue adds the bias, and either a residual, or joins two projections to ``silu(gate) * up``, in fp32 before the
one rounding. How a NaN in ``B`` stays with the rows that use it: ``low_rank``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from twn_kernels.impl.triton.low_rank import add_adapter, count_users
from twn_kernels.impl.triton.primitives import dot, grouped_position

__all__ = ["group_kernel"]

_MIXED_STEP = tl.constexpr(16)  # the smallest step through the rank, and the one that costs the fewest registers


@triton.jit
def _base_range(
    acc,  # [BLOCK_M, BLOCK_N]
    x,
    w,
    x_descriptor,
    w_descriptor,
    tile_m,
    tile_n,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc + x[rows] @ w[columns]^T`` over all features."""
    if DESCRIPTORS:
        for k0 in tl.range(0, K, BLOCK_K):
            x_tile = x_descriptor.load([tile_m * BLOCK_M, k0])
            w_tile = w_descriptor.load([tile_n * BLOCK_N, k0])
            acc = dot(x_tile, w_tile.T, acc, PRECISION)
    else:
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = (rows < M)[:, None]
        in_columns = (columns < N)[None, :]
        k = tl.arange(0, BLOCK_K)
        x_tiles = x + rows[:, None] * stride_xm + k[None, :]
        w_tiles = w + columns[None, :] * stride_wn + k[:, None]
        for k0 in tl.range(0, K, BLOCK_K):
            in_k = k < K - k0
            x_tile = tl.load(x_tiles, mask=in_rows & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            w_tile = tl.load(w_tiles, mask=in_k[:, None] & in_columns, other=0.0)  # [BLOCK_K, BLOCK_N]
            acc = dot(x_tile, w_tile, acc, PRECISION)
            x_tiles += BLOCK_K
            w_tiles += BLOCK_K
    return acc


@triton.jit
def _two_base_ranges(
    gate,  # [BLOCK_M, BLOCK_N]
    up,
    x,
    w_0,
    w_1,
    x_descriptor,
    w_0_descriptor,
    w_1_descriptor,
    tile_m,
    tile_n,
    M,
    N,
    K,
    stride_xm,
    stride_w0n,
    stride_w1n,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The base ranges of the same columns of two projections; each tile of x is read once."""
    if DESCRIPTORS:
        for k0 in tl.range(0, K, BLOCK_K):
            x_tile = x_descriptor.load([tile_m * BLOCK_M, k0])
            gate = dot(x_tile, w_0_descriptor.load([tile_n * BLOCK_N, k0]).T, gate, PRECISION)
            up = dot(x_tile, w_1_descriptor.load([tile_n * BLOCK_N, k0]).T, up, PRECISION)
    else:
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = (rows < M)[:, None]
        in_columns = (columns < N)[None, :]
        k = tl.arange(0, BLOCK_K)
        x_tiles = x + rows[:, None] * stride_xm + k[None, :]
        w_0_tiles = w_0 + columns[None, :] * stride_w0n + k[:, None]
        w_1_tiles = w_1 + columns[None, :] * stride_w1n + k[:, None]
        for k0 in tl.range(0, K, BLOCK_K):
            in_k = k < K - k0
            x_tile = tl.load(x_tiles, mask=in_rows & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            in_w = in_k[:, None] & in_columns
            gate = dot(x_tile, tl.load(w_0_tiles, mask=in_w, other=0.0), gate, PRECISION)
            up = dot(x_tile, tl.load(w_1_tiles, mask=in_w, other=0.0), up, PRECISION)
            x_tiles += BLOCK_K
            w_0_tiles += BLOCK_K
            w_1_tiles += BLOCK_K
    return gate, up


@triton.jit
def _low_rank_ranges(
    acc,
    s,  # first column of the projection's blocks in the first row of the tile
    b_r,  # first row that the tile uses
    b_e,
    rank_r,
    rank_e,
    stride_sm,
    stride_brn,
    stride_ben,
    rows,
    in_rows,
    route,
    users_r,
    users_e,
    users_all,
    columns,
    in_columns,
    PRESENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``acc`` plus the terms of the adapters that rows of this tile use."""
    if PRESENT & 1:
        acc = add_adapter(
            acc, s, b_r, rows, in_rows, (route & 1) != 0, users_r, users_all, columns, in_columns, rank_r,
            stride_sm, stride_brn, 1, None, 0, 0, 1.0, False, False,
            PRECISION, BLOCK_R, _MIXED_STEP, BLOCK_N,
        )  # fmt: skip
    if PRESENT & 2:
        acc = add_adapter(
            acc, s + rank_r, b_e, rows, in_rows, (route & 2) != 0, users_e, users_all, columns, in_columns,
            rank_e, stride_sm, stride_ben, 1, None, 1, 0, 1.0, False, False,
            PRECISION, BLOCK_R, _MIXED_STEP, BLOCK_N,
        )  # fmt: skip
    return acc


@triton.jit
def _one_of(projection, first, second, third, COUNT: tl.constexpr):
    """The value, or pointer, of a projection."""
    value = first
    if COUNT > 1:
        value = tl.where(projection == 1, second, value)
    if COUNT > 2:
        value = tl.where(projection == 2, third, value)
    return value


@triton.jit
def _store_part(
    acc,  # [BLOCK_M, WIDTH]
    up,  # the same columns of the second projection where SWIGLU
    projection,
    bias_0,
    bias_1,
    bias_2,
    residual,
    y,
    row,
    in_rows,
    first_row,
    first_column,
    N,
    offset,
    stride_residual_m,
    stride_ym,
    SELECTED: tl.constexpr,
    SWIGLU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The epilogue of a tile's columns from ``first_column`` on: bias, gate, residual, one rounding."""
    column = tl.arange(0, WIDTH)
    in_columns = column < N - first_column
    if SELECTED > 1:
        owner = projection + tl.zeros_like(column)  # a vector: Triton 3.9 interprets `vector & scalar` wrongly
        acc = _add_bias(acc, bias_0, first_column, column, in_columns & (owner == 0))
        acc = _add_bias(acc, bias_1, first_column, column, in_columns & (owner == 1))
        acc = _add_bias(acc, bias_2, first_column, column, in_columns & (owner == 2))
    else:
        acc = _add_bias(acc, bias_0, first_column, column, in_columns)
    if SWIGLU:
        up = _add_bias(up, bias_1, first_column, column, in_columns)
        acc = acc / (1.0 + tl.exp(-acc)) * up
    in_part = in_rows[:, None] & in_columns[None, :]
    if residual is not None:
        sources = residual + first_row * stride_residual_m + first_column
        offsets = row[:, None] * stride_residual_m + column[None, :]
        acc += tl.load(sources + offsets, mask=in_part, other=0.0).to(acc.dtype)
    targets = y + first_row * stride_ym + first_column + offset
    tl.store(targets + row[:, None] * stride_ym + column[None, :], acc.to(y.dtype.element_ty), mask=in_part)


@triton.jit
def _halves(acc):
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _parts(acc, PARTS: tl.constexpr):
    """A tuple of the tile's columns in ``PARTS`` equal runs."""
    if PARTS == 1:
        parts = (acc,)
    elif PARTS == 2:
        parts = _halves(acc)
    else:
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def _add_bias(acc, bias, first_column, column, in_columns):
    if bias is not None:
        acc += tl.load(bias + first_column + column, mask=in_columns, other=0.0).to(acc.dtype)[None, :]
    return acc


@triton.jit
def _prefetch(w, tile_n, N, K, stride_wn, LINES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for the first 128-byte lines of each row of a weight tile, without waiting for them.

    It only moves lines into L2, so it may run before the kernels in front have ended, whatever they write.
    """
    columns = tl.minimum(tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    line: tl.constexpr = 128 // (w.dtype.element_ty.primitive_bitwidth // 8)
    features = tl.minimum(tl.arange(0, LINES) * line, K - 1)
    addresses = (w + columns[:, None] * stride_wn + features[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _place(tile, tiles_m, tiles_n, tiles_0, tiles_1, SELECTED: tl.constexpr, GROUP_M: tl.constexpr):
    """``(tile row, projection, tile column in it)`` of the tile with this number."""
    tile_m, tile_n = grouped_position(tile, tiles_m, tiles_n, GROUP_M)
    projection = 0
    if SELECTED > 1:
        projection = (tile_n >= tiles_0).to(tl.int32)
        if SELECTED > 2:
            projection += (tile_n >= tiles_1).to(tl.int32)
        tile_n -= _one_of(projection, 0, tiles_0, tiles_1, SELECTED)
    return tile_m, projection, tile_n


@triton.jit(do_not_specialize=["M"])
def group_kernel(
    x,  # [M, K]
    w_0,  # [N_i, K]
    w_1,
    w_2,
    x_descriptor,  # the same tensors where DESCRIPTORS
    w_0_descriptor,
    w_1_descriptor,
    w_2_descriptor,
    bias_0,  # [N_i] or None
    bias_1,
    bias_2,
    s,  # [M, sum of ranks]
    b_r0,  # [N_i, rank_ri]
    b_e0,  # [N_i, rank_ei]
    b_r1,
    b_e1,
    b_r2,
    b_e2,
    routes,  # int8 [M]; None: every row uses what is PRESENT
    residual,  # [M, N_0] or None
    y,  # [M, sum of N_i], or [M, N_0] where SWIGLU
    M,
    N_0,
    N_1,
    N_2,
    K,
    rank_r0,
    rank_e0,
    rank_r1,
    rank_e1,
    rank_r2,
    rank_e2,
    stride_xm,
    stride_w0n,
    stride_w1n,
    stride_w2n,
    stride_sm,
    stride_br0n,
    stride_be0n,
    stride_br1n,
    stride_be1n,
    stride_br2n,
    stride_be2n,
    stride_residual_m,
    stride_ym,
    COUNT: tl.constexpr,  # projections
    SWIGLU: tl.constexpr,  # two projections, gate and up, one output
    PRESENT: tl.constexpr,  # adapters that can occur: 0 is the plain projections
    DESCRIPTORS: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched before the previous kernel has ended
    PREFETCH: tl.constexpr,  # lines of each row of the first weight tile to ask for before that end
    BASE_PRECISION: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,  # 1, 2 or 4 parts of the tile's columns go through the epilogue one after the other
):
    SELECTED: tl.constexpr = 1 if SWIGLU else COUNT  # projections that a tile is of one of
    acc_type: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_0 = tl.cdiv(N_0, BLOCK_N)
    tiles_1 = tiles_0
    tiles_n = tiles_0
    if SELECTED > 1:
        tiles_1 = tiles_0 + tl.cdiv(N_1, BLOCK_N)
        tiles_n = tiles_1
    if SELECTED > 2:
        tiles_n = tiles_1 + tl.cdiv(N_2, BLOCK_N)

    if DEPENDENT:
        cuda.gdc_launch_dependents()  # they wait for the end of this grid before they read
        if PREFETCH > 0:
            _, projection, tile_n = _place(tl.program_id(0), tiles_m, tiles_n, tiles_0, tiles_1, SELECTED, GROUP_M)
            N = _one_of(projection, N_0, N_1, N_2, SELECTED)
            stride_wn = _one_of(projection, stride_w0n, stride_w1n, stride_w2n, SELECTED)
            _prefetch(_one_of(projection, w_0, w_1, w_2, SELECTED), tile_n, N, K, stride_wn, PREFETCH, BLOCK_N)
            if SWIGLU:
                _prefetch(w_1, tile_n, N, K, stride_w1n, PREFETCH, BLOCK_N)
        cuda.gdc_wait()

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, projection, tile_n = _place(tile, tiles_m, tiles_n, tiles_0, tiles_1, SELECTED, GROUP_M)
        N = _one_of(projection, N_0, N_1, N_2, SELECTED)
        offset = _one_of(projection, 0, N_0, N_0 + N_1, SELECTED)  # of the projection's columns in y

        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc_type)
        if SWIGLU:
            acc, up = _two_base_ranges(
                acc, tl.zeros([BLOCK_M, BLOCK_N], dtype=acc_type), x, w_0, w_1,
                x_descriptor, w_0_descriptor, w_1_descriptor, tile_m, tile_n, M, N, K, stride_xm, stride_w0n,
                stride_w1n, DESCRIPTORS, BASE_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            w_descriptor = w_0_descriptor
            if DESCRIPTORS and SELECTED > 1:
                if projection == 1:
                    w_descriptor = w_1_descriptor
                if SELECTED > 2:
                    if projection == 2:
                        w_descriptor = w_2_descriptor
            acc = _base_range(
                acc, x, _one_of(projection, w_0, w_1, w_2, SELECTED), x_descriptor, w_descriptor, tile_m, tile_n, M, N,
                K, stride_xm, _one_of(projection, stride_w0n, stride_w1n, stride_w2n, SELECTED),
                DESCRIPTORS, BASE_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip

        # one 64-bit address a tile and 32-bit offsets in it leave registers for the accumulator
        first_row = tile_m.to(tl.int64) * BLOCK_M
        first_column = tile_n.to(tl.int64) * BLOCK_N
        row = tl.arange(0, BLOCK_M)
        column = tl.arange(0, BLOCK_N)
        in_rows = row < M - first_row
        in_columns = column < N - first_column

        if PRESENT != 0:
            if routes is None:
                route = tl.where(in_rows, PRESENT, 0)
            else:
                route = tl.load(routes + first_row + row, mask=in_rows, other=0).to(tl.int32)
            users_r, users_e, users_all = count_users(route, in_rows)
            s_rows = s + first_row * stride_sm
            ranks_0 = rank_r0 + rank_e0
            stride_brn = _one_of(projection, stride_br0n, stride_br1n, stride_br2n, SELECTED)
            stride_ben = _one_of(projection, stride_be0n, stride_be1n, stride_be2n, SELECTED)
            acc = _low_rank_ranges(
                acc, s_rows + _one_of(projection, 0, ranks_0, ranks_0 + rank_r1 + rank_e1, SELECTED),
                _one_of(projection, b_r0, b_r1, b_r2, SELECTED) + first_column * stride_brn,
                _one_of(projection, b_e0, b_e1, b_e2, SELECTED) + first_column * stride_ben,
                _one_of(projection, rank_r0, rank_r1, rank_r2, SELECTED),
                _one_of(projection, rank_e0, rank_e1, rank_e2, SELECTED),
                stride_sm, stride_brn, stride_ben, row, in_rows, route, users_r, users_e, users_all, column, in_columns,
                PRESENT, LOW_RANK_PRECISION, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            if SWIGLU:
                up = _low_rank_ranges(
                    up, s_rows + ranks_0, b_r1 + first_column * stride_br1n, b_e1 + first_column * stride_be1n,
                    rank_r1, rank_e1, stride_sm, stride_br1n, stride_be1n,
                    row, in_rows, route, users_r, users_e, users_all, column, in_columns,
                    PRESENT, LOW_RANK_PRECISION, BLOCK_R, BLOCK_N,
                )  # fmt: skip

        part: tl.constexpr = BLOCK_N // PARTS
        accs = _parts(acc, PARTS)
        ups = _parts(up, PARTS) if SWIGLU else accs
        for i in tl.static_range(PARTS):
            _store_part(
                accs[i], ups[i], projection, bias_0, bias_1, bias_2, residual, y, row, in_rows,
                first_row, first_column + i * part, N, offset, stride_residual_m, stride_ym, SELECTED, SWIGLU, part,
            )  # fmt: skip
