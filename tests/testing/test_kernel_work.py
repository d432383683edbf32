"""The counts of the static report against numbers that were worked out by hand, tile by tile."""

from __future__ import annotations

import pytest

from twn_kernels.testing.kernel_work import (
    Projection,
    grad_count,
    group_shrink_count,
    produce_count,
    product_count,
    reduce_count,
    row_tiles,
    shrink_count,
)

# Five rows: two of reasoning, one of the base, two of both. In tiles of two rows: [R R] [- B] [B].
ROWS = [(2, 1), (1, 0), (2, 3)]


def test_tiles_of_rows_count_their_users():
    assert [tuple(tile) for tile in row_tiles(ROWS, 2)] == [(2, 2, 0), (2, 1, 1), (1, 1, 1)]
    assert list(row_tiles([], 4)) == []


def test_a_product():
    count = product_count(
        ROWS, 6, [Projection(3, (2, 1))], block_m=2, block_n=2, block_k=4, block_r=2, size=2, low_size=4, bias=True
    )
    # Column tiles are 2 and 1 wide, row tiles 2, 2 and 1 high; x is read by both column tiles, w by three row tiles.
    x, w, bias, y, routes = 2 * 5 * 6 * 2, 3 * 3 * 6 * 2, 3 * 3 * 2, 5 * 3 * 2, 2 * 5
    # reasoning's s and B in every row tile, embedding's in the last two; both column tiles read s.
    s = 4 * (2 * 5 * 2 + 2 * 3 * 1)
    b = 4 * (3 * 3 * 2 + 2 * 3 * 1)
    assert count.done.bytes == x + w + bias + y + routes + s + b
    # K is padded from 6 to 8 and both ranks to 2; six tiles of 2 x 2, embedding in four of them.
    assert count.done.flops == 2 * 2 * 2 * (6 * 8 + 6 * 2 + 4 * 2)
    ideal = 2 * (5 * 6 + 3 * 6 + 3 + 5 * 3) + 5 + 4 * (2 * (4 + 3) + 1 * (2 + 3))
    assert count.ideal == (ideal, 2 * (5 * 3 * 6 + 4 * 3 * 2 + 2 * 3 * 1))


def test_a_tile_that_covers_everything_moves_the_ideal():
    rows = [(8, 1)]
    count = product_count(
        rows, 16, [Projection(8, (4, 4))], block_m=8, block_n=8, block_k=16, block_r=4, size=2, low_size=2
    )
    assert count.done == count.ideal == (2 * (8 * 16 + 8 * 16 + 8 * 4 + 8 * 4 + 8 * 8) + 8, 2 * 8 * 8 * (16 + 4))


def test_a_product_without_adapters_reads_none():
    count = product_count(
        ROWS, 4, [Projection(2, (2, 2))], block_m=8, block_n=2, block_k=4, block_r=2, size=2, low_size=2, present=0
    )
    assert count.done.bytes == count.ideal.bytes == 2 * (5 * 4 + 2 * 4 + 5 * 2)
    assert count.done.flops == 2 * 8 * 2 * 4 and count.ideal.flops == 2 * 5 * 2 * 4


def test_a_joined_pair_reads_x_once_and_stores_once():
    pair = [Projection(4, (2, 0)), Projection(4, (2, 0))]
    tile = {"block_m": 4, "block_n": 4, "block_k": 4, "block_r": 2, "size": 2, "low_size": 2}
    joined = product_count([(4, 1)], 4, pair, joined=True, **tile)
    assert joined.done == (2 * (16 + 2 * 16 + 2 * (2 * 4 + 2 * 4) + 16) + 4, 2 * 2 * 4 * 4 * (4 + 2))
    assert joined.ideal == (2 * (16 + 2 * 16 + 2 * (2 * 4 + 2 * 4) + 16) + 4, joined.done.flops)
    apart = product_count([(4, 1)], 4, pair, **tile)
    assert apart.done.bytes == joined.done.bytes + 2 * 16 + 2 * 16 + 4
    assert apart.ideal.bytes == joined.ideal.bytes + 2 * 16


def test_fanout_and_residual_move_one_more_output():
    tile = {"block_m": 4, "block_n": 4, "block_k": 4, "block_r": 2, "size": 2, "low_size": 2}
    plain = product_count([(4, 3)], 4, [Projection(4, (2, 2))], **tile)
    for option in ("fanout", "residual"):
        more = product_count([(4, 3)], 4, [Projection(4, (2, 2))], **tile, **{option: True})
        assert more.done.bytes == plain.done.bytes + 2 * 16 and more.ideal.bytes == plain.ideal.bytes + 2 * 16


def test_a_shrink():
    count = shrink_count(ROWS, 6, (3, 1), block_m=2, block_r=2, block_k=4, splits=1, size=2, low_size=2)
    # reasoning has two tiles of rank (2, 1) and users 2, 1, 1; embedding one tile and users 0, 1, 1.
    x = 2 * 6 * (2 * (2 + 1 + 1) + (1 + 1))
    a = 2 * 6 * (3 * 3 + 2 * 1)
    s, routes = 2 * 5 * 4, 5 * 3
    assert count.done.bytes == x + a + s + routes
    assert count.done.flops == 2 * 2 * 2 * 8 * (3 * 2 + 2)
    assert count.ideal == (2 * 4 * 6 + 5 + 2 * 5 * 4 + 2 * 6 * 4, 2 * 6 * (4 * 3 + 2 * 1))


def test_a_split_shrink_writes_parts_in_fp32():
    tile = {"block_m": 8, "block_r": 4, "block_k": 4, "size": 2, "low_size": 2}
    whole = shrink_count([(4, 1)], 20, (4, 0), splits=1, **tile)
    split = shrink_count([(4, 1)], 20, (4, 0), splits=2, **tile)
    # Five steps in parts of three and two: nothing is padded twice; routes are read by both parts.
    assert split.done.flops == whole.done.flops == 2 * 8 * 4 * 20
    assert split.done.bytes == whole.done.bytes - 2 * 16 + 2 * 4 * 16 + 4
    assert split.ideal == whole.ideal


def test_an_adapter_that_is_not_present_only_stores_zeros():
    count = shrink_count([(4, 3)], 8, (4, 4), block_m=4, block_r=4, block_k=8, splits=1, size=2, low_size=2, present=1)
    assert count.done.bytes == 4 + 2 * 4 * 8 + 2 * 4 * 8 + 2 * 4 * 8
    assert count.done.flops == count.ideal.flops == 2 * 4 * 4 * 8


def test_a_producer_with_norm():
    # One projection, ranks 2 + 2, column tiles of 2: the first program of a row tile holds reasoning, the second
    # embedding. Rows [R R] [B B] in tiles of two; features 8 in chunks of 4.
    count = produce_count(
        [(2, 1), (2, 3)], 8, [(2, 2)], block_m=2, block_r=2, block_k=4, splits=1, tiles=2, size=2, low_size=4, norm=True
    )
    statistics = 2 * 2 * (2 * 8) * 2  # every program reads its rows once more
    # The second program of the first row tile has no user: it reads and writes only its own chunk.
    x_and_norm = 2 * ((2 + 1) * 8 + (2 + 1) * 4 + 2 * (2 + 1) * 8)
    a = 4 * 3 * (2 * 8)
    written, s, routes = 2 * 4 * 8, 4 * 4 * 4, 2 * 2 * 2
    assert count.done.bytes == statistics + x_and_norm + a + written + s + routes
    assert count.done.flops == 3 * 2 * 2 * 2 * 8
    ideal = 2 * (4 * 8 + 8 + 4 * 8) + 4 * (4 * 4 + 4 * 8) + 4
    assert count.ideal == (ideal, 2 * 8 * (4 * 2 + 2 * 2))


def test_a_producer_that_only_shrinks_and_one_that_only_writes():
    tile = {"block_m": 4, "block_r": 4, "block_k": 4, "splits": 1, "tiles": 1, "size": 2, "low_size": 2}
    shrinks = produce_count([(4, 1)], 8, [(4, 0)], writes=False, **tile)
    alone = shrink_count([(4, 1)], 8, (4, 0), block_m=4, block_r=4, block_k=4, splits=1, size=2, low_size=2)
    assert shrinks == alone
    writes = produce_count([(4, 0)], 8, [(4, 0)], gated=True, present=0, **tile)
    assert writes.done == writes.ideal == (2 * (2 * 32 + 32) + 2 * 16, 0)


def test_a_group_s_shrink_reads_dy_once_for_both_adapters():
    # Tiles of two rows: [R R] [B B]; the first projection has ranks 3 + 1 in tiles of two, the second 0 + 2.
    projections = [Projection(6, (3, 1)), Projection(4, (0, 2))]
    count = group_shrink_count(
        [(2, 1), (2, 3)], projections, block_m=2, block_r=2, block_k=4, splits=1, size=2, low_size=4
    )
    # Programs of a row tile: ranks 0-1 (2 and 1 wide), rank 2 (1 and 0), and 0-1 of the second (0 and 2).
    dy = 2 * (2 * 6 + 2 * 6) + 2 * (2 * 6 + 2 * 6 + 2 * 4)
    b = 4 * 6 * (2 + 1) + 4 * (6 * (3 + 1) + 4 * 2)
    ds, routes = 4 * 4 * (3 + 1 + 2), 2 * 2 * 3
    assert count.done.bytes == dy + b + ds + routes
    assert count.done.flops == 2 * 2 * 2 * (2 * 8 + (2 + 1) * 8 + 1 * 4)
    ideal = 2 * (4 * 6 + 4 * 4) + 4 * (6 * 4 + 4 * 2) + 4 * 4 * 6 + 4
    assert count.ideal == (ideal, 2 * (4 * 3 * 6 + 2 * 1 * 6 + 2 * 2 * 4))


def test_a_gradient_skips_stretches_without_a_user():
    rows = [(4, 1), (4, 2)]
    count = grad_count(rows, 6, (2, 2), block_f=4, block_r=2, block_t=4, stretch=4, splits=1, size=2, low_size=4)
    # Two feature tiles (4, 2) an adapter; each looks at all eight routes and reads four rows, and their routes again.
    wide, narrow = 2 * 2 * (4 * 6), 2 * 2 * 4 * (4 * 2)
    assert count.done.bytes == wide + narrow + 2 * 2 * (8 + 4) + 2 * 4 * (6 * 2)
    assert count.done.flops == 2 * 2 * (2 * 4 * 2 * 4)
    assert count.ideal == (2 * 8 * 6 + 4 * 2 * 2 * (4 + 6) + 8, 2 * 2 * (2 * 4 * 6))


@pytest.mark.parametrize(("masked", "routes", "least"), [(False, 0, 0), (True, 30, 10)])
def test_a_sum_over_parts_reads_each_once(masked, routes, least):
    count = reduce_count(10, (3, 2), block_r=2, splits=4, low_size=2, masked=masked)
    values = 10 * 5 * (4 * 4 + 2)
    assert count.done == (values + routes, 0) and count.ideal == (values + least, 0)
