"""Launch configurations: pure, printable, enumerated, and splits that make sense."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twn_kernels.impl.triton import config

arches = st.sampled_from([*config.ARCHITECTURES, 87, 103, 121, 200])
tokens = st.integers(1, 2**31)
features = st.integers(1, 200_000)
ranks = st.integers(0, 256)
flags = st.booleans()


@given(tokens, flags, flags, arches, flags, flags)
def test_every_gemm_configuration_is_enumerated(tokens, wide, separate, arch, base_aligned, low_rank_aligned):
    arguments = {"base_aligned": base_aligned, "low_rank_aligned": low_rank_aligned}
    chosen = config.gemm_config(tokens, wide, separate, arch, **arguments)
    assert chosen == config.gemm_config(config.bucket(tokens), wide, separate, arch, **arguments)
    kind = "wide" if wide else "separate" * separate
    if not wide and not base_aligned:
        kind = f"{kind}_unaligned" if kind else "unaligned"
    elif not wide and not low_rank_aligned:
        kind = "separate_unaligned" if separate else "low_rank_unaligned"
    assert chosen in config.all_configs(arch)[f"gemm_{kind}" if kind else "gemm"]


@given(tokens, features, ranks, ranks, flags, arches, flags)
def test_every_other_configuration_is_enumerated_and_splits_fit(tokens, features, rank_r, rank_e, wide, arch, aligned):
    known = config.all_configs(arch)
    for name, choose, length in (("shrink", config.shrink_config, features), ("grad", config.grad_config, tokens)):
        chosen = choose(tokens, features, rank_r, rank_e, wide, arch, aligned=aligned)
        assert dataclasses.replace(chosen, splits=1) in known[f"{name}_wide" if wide or not aligned else name]
        assert 1 <= chosen.splits <= 16
        step = chosen.block_k if name == "shrink" else chosen.stretch
        assert chosen.splits == 1 or config.bucket(length) >= chosen.splits * step


def test_few_tokens_split_a_long_sum_and_many_do_not():
    few = config.shrink_config(1, 12288, 64, 64, False, 90)
    many = config.shrink_config(16384, 12288, 64, 64, False, 90)
    assert few.splits > 1 and many.splits == 1


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_configurations_are_frozen_and_print_their_fields(arch):
    for configs in config.all_configs(arch).values():
        for chosen in configs:
            with pytest.raises(dataclasses.FrozenInstanceError):
                chosen.num_warps = 1
            assert "num_warps=" in repr(chosen)


def test_an_architecture_newer_than_the_table_takes_the_newest_known():
    def chosen(arch):
        return config.gemm_config(4096, False, False, arch)

    assert chosen(999) == chosen(max(config.ARCHITECTURES))
    assert chosen(103) == chosen(100)
