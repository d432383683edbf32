"""The adapters' weight gradients: ``dB = dy^T S`` and ``dA = dS^T x``, both adapters in one launch of one kernel.

Both are ``wide^T @ narrow`` over the rows that use the adapter (``dA`` is stored transposed, by strides). Rows are
chosen by a load mask, so a NaN in another row never enters; stretches of rows without the adapter are skipped. The sum
over tokens may be split; ``reduce_kernel`` adds the parts in a fixed order (no atomics: equal input, equal bits).
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.primitives import any_of, dot, dropout_keep, dropout_rows

__all__ = ["grad_kernel"]


@triton.jit
def _grad_tile(
    wide,
    narrow,
    routes,
    seed,
    out,
    tile_r,
    M,
    F,
    rank,
    tokens_per_split,
    stride_wm,
    stride_wf,
    stride_nm,
    stride_of,
    stride_or,
    stride_os,
    scaling,
    threshold,
    adapter: tl.constexpr,  # 0 or 1
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STRETCH: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    r = (tile_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    in_f = f < F
    in_rank = r < rank
    acc_type: tl.constexpr = tl.float64 if wide.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_F, BLOCK_R], dtype=acc_type)
    begin = tl.program_id(2) * tokens_per_split
    end = begin + tl.minimum(M - begin, tokens_per_split)
    t = tl.arange(0, BLOCK_T)
    stretch = tl.arange(0, STRETCH)
    for start in tl.range(begin, end, STRETCH, num_stages=1):
        ahead = tl.load(routes + (start + stretch).to(tl.int64), mask=start + stretch < end, other=0).to(tl.int32)
        used = any_of((ahead & (1 << adapter)) != 0) > 0
        stop = tl.where(used, tl.minimum(start + STRETCH, end), start)
        for t0 in tl.range(start, stop, BLOCK_T):
            rows = (t0 + t).to(tl.int64)
            route = tl.load(routes + rows, mask=t0 + t < stop, other=0).to(tl.int32)
            uses = (route & (1 << adapter)) != 0
            wide_tile = tl.load(  # [BLOCK_T, BLOCK_F]
                wide + rows[:, None] * stride_wm + f[None, :] * stride_wf,
                mask=uses[:, None] & in_f[None, :],
                other=0.0,
            )
            narrow_tile = tl.load(  # [BLOCK_T, BLOCK_R]
                narrow + rows[:, None] * stride_nm + r[None, :],
                mask=uses[:, None] & in_rank[None, :],
                other=0.0,
            )
            if DROPOUT:
                hashes = dropout_rows(seed, adapter, rows)
                wide_tile = tl.where(dropout_keep(hashes[:, None], f[None, :], threshold), wide_tile, 0.0)
            acc = dot(tl.trans(wide_tile.to(narrow.dtype.element_ty)), narrow_tile, acc, PRECISION)
    acc *= tl.cast(scaling, tl.float32)
    tl.store(
        out + tl.program_id(2).to(tl.int64) * stride_os + f[:, None] * stride_of + r[None, :] * stride_or,
        acc.to(out.dtype.element_ty),
        mask=in_f[:, None] & in_rank[None, :],
    )


@triton.jit(do_not_specialize=["M", "tokens_per_split", "threshold_r", "threshold_e"])
def grad_kernel(
    wide_r,  # [M, F] by strides: dy (for dB) or x (for dA)
    wide_e,
    narrow_r,  # [M, rank_r]: S (for dB) or dS (for dA)
    narrow_e,
    routes,  # int8 [M]
    seed,  # int64 [1] or None
    out_r,  # [splits, F, rank_r] by strides: the gradient, or fp32 parts of it
    out_e,
    M,
    F,
    rank_r,  # 0 where reasoning's gradient is not wanted
    rank_e,
    tokens_per_split,
    stride_wrm,
    stride_wrf,
    stride_wem,
    stride_wef,
    stride_nm,
    stride_orf,
    stride_orr,
    stride_oef,
    stride_oer,
    stride_os,
    scaling_r,  # 1 / keep probability for dA, else 1
    scaling_e,
    threshold_r,
    threshold_e,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STRETCH: tl.constexpr,
):
    tile = tl.program_id(1)
    tiles_r = tl.cdiv(rank_r, BLOCK_R)
    if tile < tiles_r:
        _grad_tile(
            wide_r, narrow_r, routes, seed, out_r, tile, M, F, rank_r, tokens_per_split, stride_wrm, stride_wrf,
            stride_nm, stride_orf, stride_orr, stride_os, scaling_r, threshold_r,
            0, DROPOUT, PRECISION, BLOCK_F, BLOCK_R, BLOCK_T, STRETCH,
        )  # fmt: skip
    else:
        _grad_tile(
            wide_e, narrow_e, routes, seed, out_e, tile - tiles_r, M, F, rank_e, tokens_per_split, stride_wem,
            stride_wef, stride_nm, stride_oef, stride_oer, stride_os, scaling_e, threshold_e,
            1, DROPOUT, PRECISION, BLOCK_F, BLOCK_R, BLOCK_T, STRETCH,
        )  # fmt: skip
