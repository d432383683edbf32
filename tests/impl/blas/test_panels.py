"""The layout of panels as plain numbers: what lies where, for any sizes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twn_kernels.impl.blas import panels

SIZES = st.integers(1, 300)
RANKS = st.tuples(st.integers(0, 40), st.integers(0, 40))
GROUPS = st.lists(st.tuples(SIZES, RANKS), min_size=1, max_size=3)


def _layout(features, group):
    outputs, ranks = zip(*group, strict=True)
    return panels.layout(features, tuple(outputs), tuple(ranks))


@settings(max_examples=100, deadline=None)
@given(SIZES, GROUPS)
def test_columns_never_overlap_and_rows_are_whole_cache_lines(features, group):
    plan = _layout(features, group)
    assert plan.left % 64 == 0 and plan.pitch % 64 == 0
    taken = torch.zeros(plan.pitch, dtype=torch.int)
    taken[plan.left : plan.left + features] += 1
    for block in plan.blocks:
        assert block.width % 8 == 0 and 0 <= block.width - block.rank < 8
        assert block.rank == group[block.projection][1][block.adapter]
        taken[block.column : block.column + block.width] += 1
    assert taken.max() == 1
    assert [(b.projection, b.adapter) for b in plan.blocks] == [(i, a) for i in range(len(group)) for a in (0, 1)]
    served = [i for panel in plan.panels for i in panel.projections]
    assert served == list(range(len(group)))
    for panel in plan.panels:
        assert panel.pitch % 64 == 0 and panel.rows == sum(group[i][0] for i in panel.projections)
        assert {block.projection for block in panel.blocks} == set(panel.projections)
        last = max([plan.left + features, *(b.column + b.width for b in panel.blocks)])
        assert panel.shift + panel.pitch >= last and panel.pitch - (last - panel.shift) < 64


@settings(max_examples=100, deadline=None)
@given(SIZES, GROUPS, st.integers(0, 3))
def test_a_product_covers_its_adapters_and_reasoning_alone_covers_nothing_else(features, group, present):
    plan = _layout(features, group)
    for panel in plan.panels:
        first, last = plan.columns(panel, present)
        assert panel.shift <= first <= plan.left and plan.left + features <= last <= panel.shift + panel.pitch
        for block in panel.blocks:
            inside = first <= block.column and block.column + block.width <= last
            needed = bool(present & (1 << block.adapter)) and block.rank > 0
            assert inside or not needed
            if block.width and (present in (0, 1) or len(group) == 1):
                assert inside == needed


@settings(max_examples=100, deadline=None)
@given(SIZES, GROUPS, st.integers(1, 3), st.data())
def test_what_is_multiplied_was_written(features, group, present, data):
    """Every column within reach belongs to the input, to a block that is written whole, or to a gap that is zeroed."""
    plan = _layout(features, group)
    written = [
        data.draw(st.sampled_from((0, block.rank))) if present & (1 << block.adapter) else 0 for block in plan.blocks
    ]
    known = torch.zeros(plan.pitch, dtype=torch.bool)
    known[plan.left : plan.left + features] = True
    for block, rank in zip(plan.blocks, written, strict=True):
        known[block.column : block.column + rank] = True
    gaps = plan.gaps(present, written)
    assert len(gaps) <= 2
    for first, last in gaps:
        assert not (first < plan.left + features and plan.left < last), "the input is not zeroed"
        known[first:last] = True
    for panel in plan.panels:
        first, last = plan.columns(panel, present)
        assert known[first:last].all()


@settings(max_examples=50, deadline=None)
@given(SIZES, GROUPS)
def test_the_key_says_the_whole_layout(features, group):
    plan = _layout(features, group)
    key = panels.key(plan, torch.empty(0, dtype=torch.bfloat16))
    assert key.numel() == 0 and panels.layout_of(key) == plan
    assert panels.layout_of(key.to("meta")) == plan


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), GROUPS)
def test_a_panel_holds_each_weight_beside_its_adapters_and_zeros(features, group):
    plan = _layout(features, group)
    outputs = [n for n, _ in group]
    weights = [torch.full((n, features), 2.0, dtype=torch.bfloat16) for n in outputs]
    B = [torch.full((outputs[b.projection], b.rank), 3.0 + b.adapter, dtype=torch.bfloat16) for b in plan.blocks]
    storages = [torch.full((p.rows, p.pitch), torch.nan, dtype=torch.bfloat16) for p in plan.panels]
    for panel, storage in zip(plan.panels, storages, strict=True):
        panels.clear_padding_(plan, panel, storage)
        for i in panel.projections:
            panels.weight_view(plan, panel, storage, i).copy_(weights[i])
    bits = panels.adapter_bits(plan, torch.device("cpu"))
    panels.fill_adapters_(plan, storages, B, bits, torch.empty_like(bits))
    total = sum(storage.float().sum().item() for storage in storages)
    assert total == sum(2.0 * w.numel() for w in weights) + sum(b.float().sum().item() for b in B)
    for panel, storage in zip(plan.panels, storages, strict=True):
        for block in panel.blocks:
            row = panel.first_row[panel.projections.index(block.projection)]
            column = block.column - panel.shift
            part = storage[row : row + outputs[block.projection], column : column + block.rank]
            assert (part == 3.0 + block.adapter).all()
            assert (bits[block.column : block.column + block.rank] == 1 << block.adapter).all()
