"""What a launch of each Triton kernel moves and computes by its tiling, and the least that its result needs.

Pure functions of shapes, tiles and routes: nothing is run or measured. What is counted:

- *moved bytes*: every load and store that the programs of the launch ask for, by its mask. An element that several
  tiles read counts each time; most of those reads come out of the L2 cache, so that DRAM sees less, down to the ideal.
- *done operations*: two for each multiply-add of every tile product, the padding of partial tiles and the rows that do
  not use an adapter included. A product in three tf32 passes counts once; norms, activations and sums are left out.
- *ideal*: every input that the result depends on is read once and every output is written once; products only over the
  rows that use an adapter.

Routes are ``segments``: runs of consecutive rows with one route, ``(rows, bitmask)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "Count",
    "Projection",
    "Segments",
    "Work",
    "grad_count",
    "group_shrink_count",
    "produce_count",
    "product_count",
    "reduce_count",
    "row_tiles",
    "shrink_count",
]

Segments = Sequence[tuple[int, int]]

_FP32 = 4  # parts of a split sum
_ROUTE = 1  # int8


class Work(NamedTuple):
    """Bytes moved, and floating-point operations."""

    bytes: int
    flops: int


class Count(NamedTuple):
    """One launch: what its tiling does, and the least that its result needs."""

    done: Work
    ideal: Work


class Rows(NamedTuple):
    """One tile of rows: how many there are, and how many use each adapter."""

    rows: int
    reasoning: int
    embedding: int

    def users(self, adapter: int) -> int:
        """Rows that use adapter 0 (reasoning) or 1 (embedding)."""
        return self.embedding if adapter else self.reasoning


@dataclass(frozen=True)
class Projection:
    """A linear: ``outputs`` columns, ranks of both adapters (0: absent)."""

    outputs: int
    ranks: tuple[int, int]


def row_tiles(segments: Segments, block: int) -> Iterator[Rows]:
    """The tiles of ``block`` rows over all segments; the last one may be partial."""
    routes = [mask for rows, mask in segments for _ in range(rows)]
    for start in range(0, len(routes), block):
        tile = routes[start : start + block]
        yield Rows(len(tile), sum(mask & 1 for mask in tile), sum(mask >> 1 & 1 for mask in tile))


def product_count(
    segments: Segments, features: int, projections: Sequence[Projection], *, block_m: int, block_n: int, block_k: int,
    block_r: int, size: int, low_size: int, present: int = 3, bias: bool = False, fanout: bool = False,
    joined: bool = False, residual: bool = False,
) -> Count:  # fmt: skip
    """The fused product: base range, then the low-rank range of each adapter that a row of the tile uses.

    Args:
        segments: routes of the rows.
        features: K of the base product.
        projections: linears of one launch.
        block_m, block_n, block_k, block_r: the tile.
        size: bytes of an element of x, weight and y.
        low_size: bytes of an element of s and B.
        present: adapters that can occur; 0: nothing of the adapters is read.
        bias: whether each projection has one.
        fanout: two outputs.
        joined: two projections become ``silu(gate) * up``: one tile reads x once for both and stores once.
        residual: whether ``[tokens, outputs]`` more is read.
    """
    stores = 2 if fanout else 1
    moved = flops = 0
    tiles = list(row_tiles(segments, block_m))
    passes = [projections] if joined else [[projection] for projection in projections]
    for together in passes:
        for columns in _spans(together[0].outputs, block_n):
            for tile in tiles:
                moved += size * tile.rows * (features + columns * (stores + residual))
                moved += _ROUTE * tile.rows if present else 0
                for projection in together:
                    moved += size * columns * (features + bias)
                    steps = _padded(features, block_k)
                    for _, rank in _used(projection.ranks, present, tile):
                        moved += low_size * rank * (tile.rows + columns)
                        steps += _padded(rank, block_r)
                    flops += 2 * block_m * block_n * steps
    ideal = _product_ideal(segments, features, projections, size, low_size, present, bias)
    tokens = sum(rows for rows, _ in segments)
    outputs = projections[0].outputs if joined else sum(projection.outputs for projection in projections)
    ideal = Work(ideal.bytes + size * tokens * outputs * (stores + residual), ideal.flops)
    return Count(Work(moved, flops), ideal)


def _product_ideal(segments, features, projections, size, low_size, present, bias) -> Work:
    """Inputs and operations; outputs are the caller's."""
    (everything,) = row_tiles(segments, max(sum(rows for rows, _ in segments), 1))
    moved = size * everything.rows * features + (_ROUTE * everything.rows if present else 0)
    flops = 0
    for projection in projections:
        moved += size * projection.outputs * (features + bias)
        flops += 2 * everything.rows * projection.outputs * features
        for adapter, rank in _used(projection.ranks, present, everything):
            users = everything.users(adapter)
            moved += low_size * rank * (users + projection.outputs)
            flops += 2 * users * projection.outputs * rank
    return Work(moved, flops)


def shrink_count(
    segments: Segments, features: int, ranks: tuple[int, int], *, block_m: int, block_r: int, block_k: int, splits: int,
    size: int, low_size: int, present: int = 3,
) -> Count:  # fmt: skip
    """``s``: each adapter's stacked tiles of rank; a tile without a user only stores zeros.

    Args:
        segments, features, present: as in :func:`product_count`.
        ranks: of both adapters.
        block_m, block_r, block_k, splits: the tile, and the parts of the sum over features.
        size, low_size: bytes of an element of x, and of A and s.
    """
    moved = flops = 0
    out_size = low_size if splits == 1 else _FP32
    parts = list(_parts(features, block_k, splits))
    for tile in row_tiles(segments, block_m):
        for adapter, rank in enumerate(ranks):
            for columns in _spans(rank, block_r):
                moved += out_size * splits * tile.rows * columns
                if not present & (1 << adapter):
                    continue
                moved += _ROUTE * splits * tile.rows
                if tile.users(adapter):
                    moved += features * (size * tile.users(adapter) + low_size * columns)
                    flops += sum(2 * block_m * block_r * _padded(part, block_k) for part in parts)
    return Count(Work(moved, flops), _shrink_ideal(segments, features, [ranks], size, low_size, present))


def _shrink_ideal(segments, features, ranks, size, low_size, present) -> Work:
    (everything,) = row_tiles(segments, max(sum(rows for rows, _ in segments), 1))
    readers = sum(rows for rows, mask in segments if mask & present)
    moved = size * readers * features + (_ROUTE * everything.rows if present else 0)
    flops = 0
    for pair in ranks:
        moved += low_size * everything.rows * sum(pair)
        for adapter, rank in _used(pair, present, everything):
            moved += low_size * rank * features
            flops += 2 * everything.users(adapter) * rank * features
    return Work(moved, flops)


def produce_count(
    segments: Segments, features: int, ranks: Sequence[tuple[int, int]], *, block_m: int, block_r: int, block_k: int,
    splits: int, tiles: int, size: int, low_size: int, norm: bool = False, gated: bool = False, writes: bool = True,
    present: int = 3,
) -> Count:  # fmt: skip
    """The producer: ``x^`` written once, and every projection's shrinks in the same pass over it.

    Args:
        segments, features, present, size, low_size: as in :func:`shrink_count`.
        ranks: of both adapters, one pair a projection; their columns are stacked in this order.
        block_m, block_r, block_k, splits: the tile, and the parts of the sum over features.
        tiles: programs that share the rows of one tile.
        norm, gated: what stands in front: RMSNorm (each program reads its rows twice), or two inputs side by side.
        writes: whether ``x^`` is written.
    """
    owners = [adapter for pair in ranks for adapter, rank in enumerate(pair) for _ in range(rank)]
    inputs = 2 if gated else 1
    parts = list(_parts(features, block_k, splits))
    moved = flops = 0
    for tile in row_tiles(segments, block_m):
        moved += size * tile.rows * features * writes
        moved += (low_size if splits == 1 else _FP32) * splits * tile.rows * len(owners)
        occurring = {adapter for adapter in (0, 1) if present & (1 << adapter) and tile.users(adapter)}
        for index in range(tiles):
            columns = owners[index * block_r : (index + 1) * block_r]
            used = sum(adapter in occurring for adapter in columns)
            moved += _ROUTE * splits * tile.rows if present else 0
            moved += size * splits * tile.rows * features if norm else 0
            for part in parts:
                read = part if used else _share(part, block_k, tiles, index) * writes
                moved += size * read * (tile.rows * inputs + norm) + low_size * used * part
                flops += 2 * block_m * block_r * _padded(part, block_k) if used else 0
    tokens = sum(rows for rows, _ in segments)
    low = _shrink_ideal(segments, features, ranks, size, low_size, present)
    readers = sum(rows for rows, mask in segments if mask & present)
    reads = (tokens * inputs if writes else readers * inputs) - readers
    ideal = low.bytes + size * features * (reads + norm + tokens * writes)
    return Count(Work(moved, flops), Work(ideal, low.flops))


def group_shrink_count(
    segments: Segments, projections: Sequence[Projection], *, block_m: int, block_r: int, block_k: int, splits: int,
    size: int, low_size: int,
) -> Count:  # fmt: skip
    """``dS`` of a group: a program has the same ranks of both adapters of one projection and reads its ``dy`` once.

    Args:
        segments: routes of the rows.
        projections: each with its columns of ``dy``, over which the sum runs.
        block_m, block_r, block_k, splits: the tile, and the parts of the sum.
        size, low_size: bytes of an element of dy, and of B and dS.
    """
    moved = flops = 0
    out_size = low_size if splits == 1 else _FP32
    for tile in row_tiles(segments, block_m):
        for projection in projections:
            parts = list(_parts(projection.outputs, block_k, splits))
            for start in range(0, max(projection.ranks), block_r):
                columns = [min(max(rank - start, 0), block_r) for rank in projection.ranks]
                used = [width for adapter, width in enumerate(columns) if width and tile.users(adapter)]
                moved += splits * tile.rows * (_ROUTE + out_size * sum(columns))
                if used:
                    moved += projection.outputs * (size * tile.rows + low_size * sum(used))
                    flops += sum(len(used) * 2 * block_m * block_r * _padded(part, block_k) for part in parts)
    ideals = [_shrink_ideal(segments, p.outputs, [p.ranks], size, low_size, 3) for p in projections]
    again = _ROUTE * sum(rows for rows, _ in segments) * (len(projections) - 1)
    return Count(Work(moved, flops), Work(sum(i.bytes for i in ideals) - again, sum(i.flops for i in ideals)))


def grad_count(
    segments: Segments, features: int, ranks: tuple[int, int], *, block_f: int, block_r: int, block_t: int,
    stretch: int, splits: int, size: int, low_size: int,
) -> Count:  # fmt: skip
    """``wide^T narrow`` over each adapter's rows; stretches of tokens without a user are skipped.

    Args:
        segments: routes of the rows.
        features: columns of the wide operand (dy or x).
        ranks: of both adapters; 0: that gradient is not wanted.
        block_f, block_r, block_t, stretch, splits: the tile, and the parts of the sum over tokens.
        size, low_size: bytes of an element of the wide operand, and of the narrow one and the gradient.
    """
    tokens = sum(rows for rows, _ in segments)
    out_size = low_size if splits == 1 else _FP32
    stretches = list(row_tiles(segments, stretch))
    moved = flops = 0
    for adapter, rank in enumerate(ranks):
        for wide in _spans(features, block_f):
            for columns in _spans(rank, block_r):
                moved += out_size * splits * wide * columns + _ROUTE * tokens
                for run in stretches:
                    if run.users(adapter):
                        moved += _ROUTE * run.rows + run.users(adapter) * (size * wide + low_size * columns)
                        flops += 2 * block_f * block_r * _padded(run.rows, block_t)
    (everything,) = row_tiles(segments, max(tokens, 1))
    readers = sum(rows for rows, mask in segments if any(rank and mask & (1 << a) for a, rank in enumerate(ranks)))
    users = [everything.users(adapter) for adapter in (0, 1)]
    low = sum(rank * (rows + features) for rank, rows in zip(ranks, users, strict=True))
    products = sum(2 * rank * rows * features for rank, rows in zip(ranks, users, strict=True))
    ideal = size * readers * features + low_size * low + _ROUTE * tokens
    return Count(Work(moved, flops), Work(ideal, products))


def reduce_count(
    length: int, ranks: tuple[int, int], *, block_r: int, splits: int, low_size: int, masked: bool
) -> Count:
    """The sum over parts ``[splits, length, ranks]``; ``masked``: each tile reads its rows' routes."""
    values = length * sum(ranks) * (_FP32 * splits + low_size)
    tiles = sum(-(-rank // block_r) for rank in ranks)
    return Count(Work(values + _ROUTE * length * tiles * masked, 0), Work(values + _ROUTE * length * masked, 0))


def _used(ranks: tuple[int, int], present: int, tile: Rows) -> Iterator[tuple[int, int]]:
    """``(adapter, rank)`` of what a tile multiplies."""
    for adapter, rank in enumerate(ranks):
        if rank and present & (1 << adapter) and tile.users(adapter):
            yield adapter, rank


def _spans(size: int, block: int) -> Iterator[int]:
    """The widths of the tiles over ``size``."""
    for start in range(0, size, block):
        yield min(block, size - start)


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _parts(features: int, block_k: int, splits: int) -> Iterator[int]:
    """Features of each part; the last may be smaller, or empty."""
    steps = _padded(_padded(features, block_k) // block_k, splits) // splits * block_k
    for index in range(splits):
        yield max(min(features - index * steps, steps), 0)


def _share(part: int, block_k: int, tiles: int, index: int) -> int:
    """Features that one of ``tiles`` programs writes of a part, chunk by chunk in turn."""
    chunks = list(_spans(part, block_k))
    return sum(chunks[index::tiles])
