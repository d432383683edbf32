"""The gradients of a site group's adapters, one launch each: ``dS`` and all ``dA``, over up to three projections.

``dS`` is stacked by adapter, reasoning's blocks of every projection first: an adapter's columns are then one range and
``dA`` is one product with it. Adapters stay where they are: projections are told apart by pointers. A NaN stays with
the rows that use its adapter by a select for ``dS`` and by load masks for ``dA``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.low_rank import stacked
from twn_kernels.impl.triton.primitives import any_of, dot

__all__ = ["group_grad_kernel", "group_shrink_kernel"]


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
    pointers = stacked(
        j[None, :], tl.where(embedding, out_e0, out_r0), tl.where(embedding, out_e1, out_r1),
        tl.where(embedding, out_e2, out_r2), rank_0, rank_1, stride_or, stride_or, stride_or, COUNT, False,
    )  # fmt: skip
    tl.store(
        pointers + tl.program_id(2).to(tl.int64) * stride_os + f[:, None] * stride_of,
        acc.to(out_r0.dtype.element_ty),
        mask=in_f[:, None] & in_rank[None, :],
    )
