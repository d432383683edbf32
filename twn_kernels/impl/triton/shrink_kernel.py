"""The masked stacked shrink, both adapters in one launch, and the sum over its split reduction.

``s = select(row uses the adapter, scaling * x A^T, 0)``: a select, because 0 * NaN is NaN. The same kernel computes
``dS = select(..., scaling * dy B, 0)`` in the backward pass; only pointers and strides differ. Few tokens leave most of
a GPU idle, so the sum over features may be split; the parts are added by a second kernel in a fixed order (no atomics:
equal input, equal bits).
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.primitives import (
    any_of,
    dot,
    dropout_keep,
    dropout_rows,
)

__all__ = ["reduce_kernel", "shrink_kernel"]


@triton.jit
def _shrink_tile(
    x,
    a,
    routes,
    seed,
    out,
    tile_r,
    M,
    K,
    rank,
    features_per_split,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_om,
    stride_os,
    scaling,
    threshold,
    adapter: tl.constexpr,  # 0 or 1
    USED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = (tile_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    in_rows = rows < M
    in_rank = r < rank
    acc_type: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=acc_type)
    if USED:
        route = tl.load(routes + rows, mask=in_rows, other=0).to(tl.int32)
        uses = (route & (1 << adapter)) != 0
        begin = tl.program_id(2) * features_per_split
        end = tl.minimum(K, begin + features_per_split)
        end = tl.where(any_of(uses) > 0, end, begin)  # no row uses the adapter: no iteration, zeros are stored
        if DROPOUT:
            hashes = dropout_rows(seed, adapter, rows)
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        for k0 in tl.range(begin, end, BLOCK_K):
            in_k = k < end - k0
            x_tile = tl.load(  # [BLOCK_M, BLOCK_K]
                x + rows[:, None] * stride_xm + (k0 + k)[None, :] * stride_xk,
                mask=uses[:, None] & in_k[None, :],
                other=0.0,
            )
            a_tile = tl.load(  # [BLOCK_K, BLOCK_R]
                a + (k0 + k)[:, None] * stride_ak + r[None, :] * stride_ar,
                mask=in_k[:, None] & in_rank[None, :],
                other=0.0,
            )
            if DROPOUT:
                x_tile = tl.where(dropout_keep(hashes[:, None], (k0 + k)[None, :], threshold), x_tile, 0.0)
            acc = dot(x_tile.to(a.dtype.element_ty), a_tile, acc, PRECISION)
        acc = tl.where(uses[:, None], acc * tl.cast(scaling, tl.float32), 0.0)
    tl.store(
        out + tl.program_id(2).to(tl.int64) * stride_os + rows[:, None] * stride_om + r[None, :],
        acc.to(out.dtype.element_ty),
        mask=in_rows[:, None] & in_rank[None, :],
    )


@triton.jit(do_not_specialize=["M", "threshold_r", "threshold_e"])
def shrink_kernel(
    x_r,  # [M, K], what reasoning shrinks: x, or dy in the backward pass
    x_e,  # [M, K]; the same tensor unless a fan-out is differentiated
    a_r,  # [rank_r, K] by strides
    a_e,  # [rank_e, K] by strides
    routes,  # int8 [M]
    seed,  # int64 [1] or None
    out_r,  # [splits, M, rank_r] by strides: s itself, or fp32 parts of it
    out_e,
    M,
    K,
    rank_r,
    rank_e,
    features_per_split,  # multiple of BLOCK_K
    stride_xrm,
    stride_xrk,
    stride_xem,
    stride_xek,
    stride_arr,
    stride_ark,
    stride_aer,
    stride_aek,
    stride_om,
    stride_os,
    scaling_r,  # divided by the keep probability; 1 where parts are written
    scaling_e,
    threshold_r,
    threshold_e,
    PRESENT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(1)
    tiles_r = tl.cdiv(rank_r, BLOCK_R)
    if tile < tiles_r:
        _shrink_tile(
            x_r, a_r, routes, seed, out_r, tile, M, K, rank_r, features_per_split, stride_xrm, stride_xrk,
            stride_arr, stride_ark, stride_om, stride_os, scaling_r, threshold_r,
            0, (PRESENT & 1) != 0, DROPOUT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        _shrink_tile(
            x_e, a_e, routes, seed, out_e, tile - tiles_r, M, K, rank_e, features_per_split, stride_xem, stride_xek,
            stride_aer, stride_aek, stride_om, stride_os, scaling_e, threshold_e,
            1, (PRESENT & 2) != 0, DROPOUT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _reduce_tile(
    parts,
    out,
    routes,
    tile_r,
    L,
    rank,
    splits,
    stride_ps,
    stride_pl,
    stride_ol,
    stride_or,
    scaling,
    bit: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    r = (tile_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    inside = (i < L)[:, None] & (r < rank)[None, :]
    acc = tl.zeros([BLOCK_L, BLOCK_R], dtype=parts.dtype.element_ty)
    sources = parts + i[:, None] * stride_pl + r[None, :]
    for _ in tl.range(0, splits):
        acc += tl.load(sources, mask=inside, other=0.0)
        sources += tl.cast(stride_ps, tl.int64)
    acc *= tl.cast(scaling, tl.float32)
    if MASKED:
        route = tl.load(routes + i, mask=i < L, other=0).to(tl.int32)
        acc = tl.where(((route & bit) != 0)[:, None], acc, 0.0)
    tl.store(out + i[:, None] * stride_ol + r[None, :] * stride_or, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["L", "splits"])
def reduce_kernel(
    parts,  # fp32 [splits, L, rank_r + rank_e]
    out_r,  # [L, rank_r] by strides
    out_e,  # [L, rank_e] by strides
    routes,  # int8 [L] where MASKED
    L,
    rank_r,
    rank_e,
    splits,
    stride_ps,
    stride_pl,
    stride_orl,
    stride_orr,
    stride_oel,
    stride_oer,
    scaling_r,
    scaling_e,
    PRESENT: tl.constexpr,
    MASKED: tl.constexpr,  # the parts are rows of tokens: select them by route
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(1)
    tiles_r = tl.cdiv(rank_r, BLOCK_R)
    if tile < tiles_r:
        _reduce_tile(
            parts, out_r, routes, tile, L, rank_r, splits, stride_ps, stride_pl, stride_orl, stride_orr,
            scaling_r, 1 & PRESENT, MASKED, BLOCK_L, BLOCK_R,
        )  # fmt: skip
    else:
        _reduce_tile(
            parts + rank_r, out_e, routes, tile - tiles_r, L, rank_e, splits, stride_ps, stride_pl, stride_oel,
            stride_oer, scaling_e, 2 & PRESENT, MASKED, BLOCK_L, BLOCK_R,
        )  # fmt: skip
