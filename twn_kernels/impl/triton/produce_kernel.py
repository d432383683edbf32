"""The producer: RMSNorm, gated SiLU or neither, and the masked shrinks of a site group from the values it rounded.

One launch reads ``x``, writes what the weights will be multiplied with (``x^``) and accumulates ``x^ A^T`` for up to
three projections with two adapters each. The six ``A`` stay where they are: their rows are *stacked by address*. Row
``j`` of the stack is row ``j - start`` of the block that holds it: unequal ranks leave no gaps, nothing is copied.

A program owns rows and a range of stacked columns. It computes the row statistic itself (a second look at rows that
are in cache, instead of a launch or a wait), and columns that no row of it uses are neither read nor multiplied. The
programs of the same rows take turns to write ``x^``, chunk by chunk.

Isolation: row ``m`` of ``s`` needs row ``m`` of ``x`` and its own adapters, so a select at the end is all there is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from twn_kernels.impl.triton.primitives import INTERPRETING, any_of, dot

__all__ = ["produce_kernel"]


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """``value`` in ``dtype``, to nearest even in the interpreter too, which truncates when it casts to bf16."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(value == value, nearest, value).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def _input_tile(
    x_rows,  # [BLOCK_M, 1] pointers to the rows of x
    norm_weight,
    scale,  # [BLOCK_M]: what the norm multiplies each row with
    k,
    in_rows,
    in_k,
    K,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``x^ [BLOCK_M, BLOCK_K]``, rounded after every step where eager PyTorch rounds."""
    dtype: tl.constexpr = x_rows.dtype.element_ty
    mask = in_rows[:, None] & in_k[None, :]
    tile = tl.load(x_rows + k[None, :], mask=mask, other=0.0)
    if norm_weight is not None:
        weight = tl.load(norm_weight + k, mask=in_k, other=0.0).to(WIDE)
        normed = rounded(tile.to(WIDE) * scale[:, None], dtype)
        tile = rounded(normed.to(WIDE) * weight[None, :], dtype)
    if GATED:
        gate = tile.to(WIDE)
        up = tl.load(x_rows + K + k[None, :], mask=mask, other=0.0)
        tile = rounded(rounded(gate / (1.0 + tl.exp(-gate)), dtype).to(WIDE) * up.to(WIDE), dtype)
    return tile


@triton.jit
def _norm_scale(x_rows, in_rows, K, eps, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` of each row."""
    squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=WIDE)
    k = tl.arange(0, BLOCK_K)
    for k0 in tl.range(0, K, BLOCK_K):
        tile = tl.load(x_rows + (k0 + k)[None, :], mask=in_rows[:, None] & (k < K - k0)[None, :], other=0.0).to(WIDE)
        squares += tile * tile
    return tl.rsqrt(tl.sum(squares, axis=1) / tl.cast(K, WIDE) + tl.cast(eps, tl.float32))


@triton.jit
def _add_block(a_rows, bits, j, start, a, stride_a, bit: tl.constexpr):
    """The stack with one more block on it: from row ``start`` on, everything belongs to this block."""
    here = j >= start
    return tl.where(here, a + (j - start) * stride_a, a_rows), tl.where(here, bit, bits)


@triton.jit
def _store_block(
    out_rows,  # [BLOCK_M, 1] pointers
    acc,
    route,
    in_rows,
    j,
    first,
    start,
    rank,
    column,
    scaling,
    bit: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Scale, select and round what the tile holds of one block. Block by block, or the largest tiles spill."""
    if (rank > 0) & (start < first + BLOCK_R) & (start + rank > first):
        inside = in_rows[:, None] & (j >= start) & (j < start + rank)
        s = tl.where((route & bit)[:, None] != 0, acc * tl.cast(scaling, tl.float32), 0.0)
        tl.store(out_rows + (j - start + column), rounded(s, out_rows.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "M", "tiles", "steps_per_split",
        "rank_0", "rank_1", "rank_2", "rank_3", "rank_4", "rank_5",
        "column_0", "column_1", "column_2", "column_3", "column_4", "column_5",
    ]
)  # fmt: skip
def produce_kernel(
    x,  # [M, K], or [M, 2 K] where GATED
    norm_weight,  # [K] or None
    a_0,  # [rank_0, K], reasoning's of the first projection; then embedding's, then those of the next
    a_1,
    a_2,
    a_3,
    a_4,
    a_5,
    routes,  # int8 [M], or None: every row takes what is PRESENT
    x_out,  # [M, K] or None
    out,  # s [M, *] at the given columns; or [splits, M, sum of ranks], without gaps
    M,
    K,
    rank_0,
    rank_1,
    rank_2,
    rank_3,
    rank_4,
    rank_5,
    column_0,
    column_1,
    column_2,
    column_3,
    column_4,
    column_5,
    stride_xm,
    stride_a0,
    stride_a1,
    stride_a2,
    stride_a3,
    stride_a4,
    stride_a5,
    stride_xom,
    stride_om,
    stride_os,
    scaling_0,  # 1 where parts are written
    scaling_1,
    scaling_2,
    scaling_3,
    scaling_4,
    scaling_5,
    eps,
    tiles,  # column tiles, at least one
    steps_per_split,  # of BLOCK_K features
    PRESENT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched before the previous kernel has ended
    ALIGNED: tl.constexpr,  # every operand can be read in 16-byte words
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    j = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[None, :]
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32

    start_1 = rank_0
    start_2 = start_1 + rank_1
    start_3 = start_2 + rank_2
    start_4 = start_3 + rank_3
    start_5 = start_4 + rank_4
    in_stack = j < start_5 + rank_5
    a_rows, bits = a_0 + j * stride_a0, tl.zeros([1, BLOCK_R], dtype=tl.int32) + 1
    a_rows, bits = _add_block(a_rows, bits, j, start_1, a_1, stride_a1, 2)
    a_rows, bits = _add_block(a_rows, bits, j, start_2, a_2, stride_a2, 1)
    a_rows, bits = _add_block(a_rows, bits, j, start_3, a_3, stride_a3, 2)
    a_rows, bits = _add_block(a_rows, bits, j, start_4, a_4, stride_a4, 1)
    a_rows, bits = _add_block(a_rows, bits, j, start_5, a_5, stride_a5, 2)
    if ALIGNED:  # a select hides it from Triton 3.9
        a_rows = tl.multiple_of(a_rows, [16, 16])

    if DEPENDENT:
        cuda.gdc_launch_dependents()  # they wait for the end of this grid before they read
        cuda.gdc_wait()
    x_rows = x + rows[:, None] * stride_xm
    scale = None
    if norm_weight is not None:
        scale = _norm_scale(x_rows, in_rows, K, eps, wide, BLOCK_M, BLOCK_K)

    begin = tl.program_id(1) * steps_per_split * BLOCK_K
    end = tl.minimum(K, begin + steps_per_split * BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    stop = begin  # of the product
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=wide)
    route = tl.zeros([BLOCK_M], dtype=tl.int32)
    if PRESENT != 0:
        if routes is None:
            route = tl.where(in_rows, PRESENT, 0)
        else:
            route = tl.load(routes + rows, mask=in_rows, other=0).to(tl.int32) & PRESENT
        occurring = any_of((route & 1) != 0) + 2 * any_of((route & 2) != 0)
        used = in_stack & ((bits & occurring) != 0)
        stop = tl.where(any_of(tl.reshape(used, [BLOCK_R])) > 0, end, begin)
        for k0 in tl.range(begin, stop, BLOCK_K):
            in_k = k < end - k0
            tile_x = _input_tile(x_rows, norm_weight, scale, k0 + k, in_rows, in_k, K, GATED, wide)
            tile_a = tl.load(  # [BLOCK_K, BLOCK_R]
                a_rows + (k0 + k)[:, None],
                mask=in_k[:, None] & used,
                other=0.0,
            )
            acc = dot(tile_x.to(tile_a.dtype), tile_a, acc, PRECISION)
            if x_out is not None:
                mine = tl.where((k0 - begin) // BLOCK_K % tiles == tile, end - k0, 0)
                targets = x_out + rows[:, None] * stride_xom + (k0 + k)[None, :]
                tl.store(targets, tile_x, mask=in_rows[:, None] & (k < mine)[None, :])

    if x_out is not None:
        for k0 in tl.range(tl.where(stop < end, begin + tile * BLOCK_K, end), end, tiles * BLOCK_K):
            in_k = k < end - k0
            tile_x = _input_tile(x_rows, norm_weight, scale, k0 + k, in_rows, in_k, K, GATED, wide)
            targets = x_out + rows[:, None] * stride_xom + (k0 + k)[None, :]
            tl.store(targets, tile_x, mask=in_rows[:, None] & in_k[None, :])

    first = tile * BLOCK_R
    out_rows = out + tl.program_id(1).to(tl.int64) * stride_os + rows[:, None] * stride_om
    _store_block(out_rows, acc, route, in_rows, j, first, 0, rank_0, column_0, scaling_0, 1, BLOCK_R)
    _store_block(out_rows, acc, route, in_rows, j, first, start_1, rank_1, column_1, scaling_1, 2, BLOCK_R)
    _store_block(out_rows, acc, route, in_rows, j, first, start_2, rank_2, column_2, scaling_2, 1, BLOCK_R)
    _store_block(out_rows, acc, route, in_rows, j, first, start_3, rank_3, column_3, scaling_3, 2, BLOCK_R)
    _store_block(out_rows, acc, route, in_rows, j, first, start_4, rank_4, column_4, scaling_4, 1, BLOCK_R)
    _store_block(out_rows, acc, route, in_rows, j, first, start_5, rank_5, column_5, scaling_5, 2, BLOCK_R)
