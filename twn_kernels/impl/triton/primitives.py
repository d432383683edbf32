"""Device functions that every kernel of this package shares: the one dot, the dropout hash, the tile order.

Nothing here is launched on its own. Kernels never call ``tl.dot`` themselves: the interpreter computes garbage for
bf16 operands, and only :func:`dot` knows how to avoid it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETING = tl.constexpr(bool(knobs.runtime.interpret))

_GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in ``acc``'s dtype; ``a`` and ``b`` share a dtype.

    ``PRECISION`` matters for fp32 operands only: "ieee" is plain fp32, "tf32x3" is three tf32 products on the tensor
    cores, of fp32's accuracy class.
    """
    if INTERPRETING:
        # numpy would multiply the bit patterns of bf16 operands
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def any_of(flags):
    """Whether one element of a boolean vector is true, as int32."""
    return tl.max(flags.to(tl.int32), axis=0)


@triton.jit
def mix(v):
    """The "lowbias32" integer hash (Wellons), on uint32."""
    v ^= v >> 16
    v *= 0x7FEB352D
    v ^= v >> 15
    v *= 0x846CA68B
    v ^= v >> 16
    return v


@triton.jit
def dropout_rows(seed_ptr, adapter, rows):
    """The part of the dropout hash that depends on the token row; ``adapter`` is 0 or 1, ``rows`` any integer dtype."""
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream = (tl.zeros_like(rows) + adapter + 1).to(tl.uint32) * _GOLDEN
    return mix(mix(mix(low) ^ high ^ stream) ^ rows.to(tl.uint32))


@triton.jit
def dropout_keep(row_hash, features, threshold):
    """Whether element (row, feature) survives; ``threshold`` carries a uint32's bits in an int32."""
    return mix(row_hash + features.to(tl.uint32) * _GOLDEN) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def grouped_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """``(tile row, tile column)`` of this program in the order of :func:`grouped_position`."""
    return grouped_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)


@triton.jit
def grouped_position(tile, rows, columns, GROUP_M: tl.constexpr):
    """``(tile row, tile column)`` of the tile with this number among ``rows`` x ``columns``: columns are walked in
    bands of ``GROUP_M`` tile rows, so that the tiles that run together share weight tiles in L2."""
    band = GROUP_M * columns
    first = tile // band * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    within = tile % band
    return first + within % height, within // height
