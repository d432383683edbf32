"""The low-rank ranges of a product: add ``s B^T`` to a tile for the rows that use an adapter, and for no other.

Device functions of the fused products; nothing here is launched on its own.

Isolation. ``s`` holds exact zeros where a row does not use an adapter, but 0 * NaN is NaN, so a NaN in ``B`` would
cross rows inside a tile. A tile whose rows all use the adapter needs no care. A mixed tile replaces the NaN and Inf of
its slice of ``B`` by zeros and afterwards writes NaN where a row does use the adapter and its column had one. That
needs no second accumulator, so the largest tiles stay free of spills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twn_kernels.impl.triton.primitives import dot, dropout_keep, dropout_rows

__all__ = ["add_adapter", "add_low_rank", "add_low_rank_to_mixed", "add_selected", "count_users", "stacked"]


@triton.jit
def count_users(route, in_rows):
    """``(rows that use reasoning, rows that use embedding, rows)`` of a tile; ``route`` is 0 past the end of x.

    One reduction counts all three, 10 bits each: tiles have fewer than 1024 rows.
    """
    counts = (route & 1) + ((route & 2) << 9) + (in_rows.to(tl.int32) << 20)
    counts = tl.sum(counts, axis=0)
    return counts & 1023, (counts >> 10) & 1023, counts >> 20


@triton.jit
def add_low_rank(
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
    r = tl.arange(0, BLOCK_R).to(rows.dtype)
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
def add_low_rank_to_mixed(
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
    r = tl.arange(0, BLOCK_R).to(rows.dtype)
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
def add_selected(
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
    delta = add_low_rank(
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
def add_adapter(
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
    MIXED_R: tl.constexpr,  # the step in a mixed tile, whose slices of b pass through registers
    BLOCK_N: tl.constexpr,
):
    """``acc`` plus one adapter's term for the rows that use it; a tile without such rows runs no iteration."""
    if SEPARATE:
        limit = tl.where(users > 0, rank, 0)
        return add_selected(
            acc, s, b, rows, in_rows, uses, columns, in_columns, rank, limit, stride_sm, stride_bn, stride_bk,
            seed, adapter, threshold, inverse_keep, DROPOUT, PRECISION, BLOCK_R,
        )  # fmt: skip
    else:
        pure = tl.where(users == users_all, rank, 0)
        mixed = tl.where((users > 0) & (users < users_all), rank, 0)
        acc = add_low_rank(
            acc, s, b, rows, in_rows, columns, in_columns, rank, pure,
            stride_sm, stride_bn, stride_bk, PRECISION, BLOCK_R,
        )  # fmt: skip
        return add_low_rank_to_mixed(
            acc, s, b, rows, in_rows, uses, columns, in_columns, rank, mixed,
            stride_sm, stride_bn, stride_bk, PRECISION, MIXED_R, BLOCK_N,
        )  # fmt: skip


@triton.jit
def stacked(j, a_0, a_1, a_2, rank_0, rank_1, stride_0, stride_1, stride_2, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to rows ``j`` of the matrices on top of one another."""
    pointers = a_0 + j * stride_0
    if COUNT > 1:
        pointers = tl.where(j >= rank_0, a_1 + (j - rank_0) * stride_1, pointers)
    if COUNT > 2:
        pointers = tl.where(j >= rank_0 + rank_1, a_2 + (j - rank_0 - rank_1) * stride_2, pointers)
    if ALIGNED:  # a select hides it from Triton 3.9
        pointers = tl.multiple_of(pointers, [16, 16])
    return pointers
