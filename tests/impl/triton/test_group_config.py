"""Launch configurations of a site group's product: pure, printable, enumerated, and tiles that suit their problem."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twn_kernels.impl.triton.config import ARCHITECTURES, bucket
from twn_kernels.impl.triton.group_config import all_group_configs, group_config, group_kind
from twn_kernels.impl.triton.group_product import _LARGEST_PITCH

arches = st.sampled_from([*ARCHITECTURES, 87, 103, 121, 200])
widths = st.lists(st.integers(1, 200_000), min_size=1, max_size=3).map(tuple)
flags = st.booleans()

QKV, GATE_UP = (4096, 1024, 1024), (12288,)  # Qwen3-VL 8B


@given(st.integers(1, 2**31), widths, st.integers(1, 300), flags, flags, flags, arches, flags, flags, flags)
def test_every_configuration_is_enumerated(
    tokens, widths, processors, wide, swiglu, exact, arch, base_aligned, low_rank_aligned, describable
):
    kind = (widths, wide, swiglu, exact, arch)
    flags = {"base_aligned": base_aligned, "low_rank_aligned": low_rank_aligned, "describable": describable}
    chosen = group_config(tokens, *kind, **flags, processors=processors)
    assert chosen == group_config(bucket(tokens), *kind, **flags, processors=processors)
    listed = all_group_configs(arch)[group_kind(wide, swiglu, exact, base_aligned, low_rank_aligned)]
    assert chosen in listed
    if chosen.descriptors:
        assert arch >= 90 and base_aligned and describable and not wide and tokens > 64
    tiles = chosen.tiles(tokens, widths)
    assert 1 <= chosen.programs(tiles, processors) <= min(tiles, processors * chosen.resident)


def _chosen(tokens, widths, arch, **named):
    return group_config(tokens, widths, named.pop("wide", False), named.pop("swiglu", False), False, arch, **named)


@pytest.mark.parametrize("arch", [90, 100])
def test_a_long_prefill_takes_the_largest_tile_by_descriptor(arch):
    for swiglu, site, columns in ((False, QKV, 256), (True, GATE_UP, 128)):
        config = _chosen(4096, site, arch, swiglu=swiglu)
        assert (config.block_m, config.block_n, config.descriptors) == (128, columns, True)


@pytest.mark.parametrize("arch", [80, 89, 120])
def test_an_architecture_without_large_tiles_takes_the_middle_one(arch):
    config = _chosen(4096, QKV, arch)
    assert (config.block_m, config.block_n) == (128, 128) and config.descriptors == (arch >= 90)


def test_few_tokens_take_small_tiles_rather_than_leave_processors_idle():
    assert _chosen(128, (2048,), 90).block_n < 256
    assert _chosen(128, (2048,), 90).tiles(128, (2048,)) > 16


def test_decode_narrows_its_tiles_where_columns_are_few():
    assert _chosen(1, (12288,), 90).block_n == 32
    narrow = _chosen(1, (2048,), 90)
    assert narrow.block_n == 16 and narrow.tiles(1, (2048,)) == 128
    assert not narrow.descriptors


def test_tiles_do_not_straddle_projections():
    config = _chosen(4096, QKV, 90)
    assert config.tiles(130, (257, 1, 256)) == 2 * (2 + 1 + 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_offsets_inside_a_tile_fit_32_bits(arch):
    """Rows of a residual in ``block_m``, rows of a ``B`` in ``block_n``; a larger pitch costs a copy."""
    for config in (config for configs in all_group_configs(arch).values() for config in configs):
        rows = max(config.block_m, config.block_n)
        assert rows * (_LARGEST_PITCH + 1) <= 2**31, config


def test_configurations_are_frozen_and_print_their_fields():
    for configs in all_group_configs(90).values():
        for config in configs:
            with pytest.raises(dataclasses.FrozenInstanceError):
                config.num_warps = 1
            assert "descriptors=" in repr(config)


def test_an_architecture_newer_than_the_table_takes_the_newest_known():
    assert _chosen(4096, QKV, 999) == _chosen(4096, QKV, max(ARCHITECTURES))
    assert _chosen(4096, QKV, 103) == _chosen(4096, QKV, 100)
