"""Launch configurations of the producer and of the group's backward kernels: pure functions of the problem.

As in :mod:`twn_kernels.impl.triton.config`, no tile was measured on a GPU: each was chosen by its registers and shared
memory, and the ahead-of-time tests compile them all.
"""

from __future__ import annotations

import dataclasses
import functools

from twn_kernels.impl.triton.config import ARCHITECTURES, bucket

__all__ = ["ProduceConfig", "all_produce_configs", "group_shrink_config", "produce_config", "produce_tiles"]

_PROCESSORS = 108  # the smallest part that has to be filled: an A100

_FEW_TOKENS = 64
_MANY_TOKENS = 1024  # from here on there is a tile of 64 rows for many of the processors
_MAX_SPLIT = 16
_FROM_SHARED = (90, 100)  # tensor cores read their operands from shared memory: registers are left for deeper tiles
_SPLIT_STEPS = 24  # steps that a part keeps: below it a second launch costs more than the shorter sum gains (estimate)


@dataclasses.dataclass(frozen=True)
class ProduceConfig:
    """Tile of the producer: ``block_r`` stacked rank columns a program; ``splits`` parts of the sum over features."""

    block_m: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def produce_config(
    tokens: int, features: int, ranks: int, wide: bool, gated: bool, arch: int, *, aligned: bool = True
) -> ProduceConfig:
    """Configuration of the producer.

    Args:
        tokens: rows of ``x``; only the power-of-two bucket matters.
        features: columns of ``x^``.
        ranks: sum of all ranks of the group.
        wide: the adapters are fp32.
        gated: two tiles of ``x`` make one of ``x^``.
        arch: compute capability without the dot.
        aligned: ``x`` and every ``A`` can be read in 16-byte words.
    """
    return _produce_config(bucket(tokens), features, ranks, wide, gated, _known(arch), aligned)


@functools.lru_cache(maxsize=4096)
def _produce_config(
    tokens: int, features: int, ranks: int, wide: bool, gated: bool, arch: int, aligned: bool
) -> ProduceConfig:
    config = _produce_tile(tokens, ranks, wide, gated, arch, aligned)
    programs = _cdiv(tokens, config.block_m) * max(_cdiv(ranks, config.block_r), 1)
    steps, splits = _cdiv(features, config.block_k), 1
    while splits < _MAX_SPLIT and programs * splits * 2 <= _PROCESSORS and steps >= splits * 2 * _SPLIT_STEPS:
        splits *= 2
    return dataclasses.replace(config, splits=splits)


def _produce_tile(tokens: int, ranks: int, wide: bool, gated: bool, arch: int, aligned: bool) -> ProduceConfig:
    if tokens <= _FEW_TOKENS:
        # narrow columns: many programs read the adapters at once
        return ProduceConfig(16, 16, 32 if wide or not aligned else 128, num_warps=4, num_stages=3)
    if wide or not aligned:
        return ProduceConfig(32, 64, 16, num_warps=8, num_stages=3)
    if tokens <= _MANY_TOKENS:
        return ProduceConfig(32, 64, 64, num_warps=4, num_stages=4)
    # x is read again for every column tile, so the widest whose sums and pointers stay in registers: 256 spills
    return ProduceConfig(
        64, 64 if ranks <= 64 else 128, 64 if arch in _FROM_SHARED or not gated else 32, num_warps=8, num_stages=3
    )


def produce_tiles(config: ProduceConfig, tokens: int, features: int, ranks: int) -> int:
    """Programs that share the rows of one tile: its column tiles, or more where few rows leave processors idle."""
    columns = _cdiv(ranks, config.block_r)
    if tokens > _FEW_TOKENS:
        return max(columns, 1)
    chunks = _cdiv(_cdiv(features, config.block_k), config.splits)
    return max(columns, min(chunks, 16), 1)


def group_shrink_config(
    tokens: int, features: int, rank: int, wide: bool, arch: int, *, aligned: bool = True
) -> ProduceConfig:
    """Configuration of ``dS``: ``features`` of the widest projection, the largest ``rank`` of one adapter."""
    return _group_shrink_config(bucket(tokens), features, bucket(rank), wide, _known(arch), aligned)


@functools.lru_cache(maxsize=4096)
def _group_shrink_config(tokens: int, features: int, rank: int, wide: bool, arch: int, aligned: bool) -> ProduceConfig:
    config = _group_shrink_tile(tokens, rank, wide, arch, aligned)
    programs = _cdiv(tokens, config.block_m) * _cdiv(rank, config.block_r)
    steps, splits = _cdiv(features, config.block_k), 1
    while splits < _MAX_SPLIT and programs * splits * 2 <= _PROCESSORS and steps >= splits * 2 * 4:
        splits *= 2
    return dataclasses.replace(config, splits=splits)


def _group_shrink_tile(tokens: int, rank: int, wide: bool, arch: int, aligned: bool) -> ProduceConfig:
    block_r = 16 if rank <= 16 else 32 if rank <= 32 else 64
    if wide or not aligned:
        return ProduceConfig(16 if tokens <= _FEW_TOKENS else 32, 32, 16, num_warps=8, num_stages=3)
    if tokens <= _FEW_TOKENS:
        return ProduceConfig(16, block_r, 64, num_warps=4, num_stages=4)
    return ProduceConfig(64, block_r, 64 if arch in _FROM_SHARED else 32, num_warps=8, num_stages=4)


def _known(arch: int) -> int:
    return max((a for a in ARCHITECTURES if a <= arch), default=80)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def all_produce_configs(arch: int) -> dict[str, list]:
    """Every tile that the functions above can return for ``arch``, by kernel; splits do not change machine code."""
    arch = _known(arch)
    tokens, ranks, flags = (_FEW_TOKENS, _MANY_TOKENS, 2 * _MANY_TOKENS), (64, 128), (False, True)

    def produce(wide: bool, gated: tuple[bool, ...] = flags) -> list[ProduceConfig]:
        return list(
            dict.fromkeys(_produce_tile(t, r, wide, g, arch, not wide) for t in tokens for r in ranks for g in gated)
        )

    def group_shrink(wide: bool) -> list[ProduceConfig]:
        return list(dict.fromkeys(_group_shrink_tile(t, r, wide, arch, not wide) for t in tokens for r in (16, 32, 64)))

    return {
        "produce": produce(False, (False,)),
        "produce_gated": produce(False, (True,)),
        "produce_wide": produce(True),
        "group_shrink": group_shrink(False),
        "group_shrink_wide": group_shrink(True),
    }
