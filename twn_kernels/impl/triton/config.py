"""Launch configurations: pure functions of the problem, printable, and enumerable so that tests can compile them all.

No tile here was measured on a GPU yet. Each was chosen by its register and shared-memory budget: no spills with both
adapters and bias on sm_80, sm_90 and sm_100 (the ahead-of-time tests hold it to that), and at most the shared memory of
the architecture. Benchmarks replace them row by row.
"""

from __future__ import annotations

import dataclasses
import functools

__all__ = [
    "ARCHITECTURES",
    "MAX_REGISTERS",
    "GemmConfig",
    "GradConfig",
    "ReduceConfig",
    "ShrinkConfig",
    "all_configs",
    "gemm_config",
    "grad_config",
    "reduce_config",
    "shrink_config",
]

# Streaming multiprocessors of the usual part of each architecture (A100, A10, L40S, H100 SXM, B200, RTX 5090). They
# only decide how far a sum is split; a part with other counts runs the same code.
_PROCESSORS = {80: 108, 86: 72, 89: 142, 90: 132, 100: 148, 120: 170}
ARCHITECTURES = tuple(_PROCESSORS)
_SMALL_SHARED = (86, 89, 120)  # 99 KiB a block; the others have 163 or 227

_DECODE_TOKENS = 16  # one tensor-core tile of rows
_FEW_TOKENS = 64
# Triton 3.6 gives a plain fp32 dot of 64 rows and more to Blackwell's tf32 tensor cores (seen in the machine code of
# sm_100); those need 64 rows, so tiles of fp32 problems have fewer. The ahead-of-time tests look for it.
_EXACT_ROWS = 32

MAX_REGISTERS = 255  # said aloud: left alone, ptxas spills a few bytes to fit two blocks on a processor

_MAX_SPLIT = 16  # parts are read back by one program each: beyond this the second kernel costs what the split gains


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Tile of the fused product: ``block_r`` is the step through the rank, ``group_m`` the tile rows of an L2 band."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclasses.dataclass(frozen=True)
class ShrinkConfig:
    """Tile of the shrink and how many parts its sum over features is split into."""

    block_m: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class GradConfig:
    """Tile of an adapter gradient; ``stretch`` is the run of tokens that is skipped when none uses the adapter."""

    block_f: int
    block_r: int
    block_t: int
    stretch: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class ReduceConfig:
    """Tile of the sum over parts."""

    block_l: int
    block_r: int
    num_warps: int
    num_stages: int = 2


def _known(arch: int) -> int:
    """The newest architecture of the tables that is not newer than ``arch``."""
    return max((a for a in ARCHITECTURES if a <= arch), default=80)


def bucket(tokens: int) -> int:
    """The next power of two: configurations and splits change only there."""
    return 1 << max(tokens - 1, 0).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def gemm_config(
    tokens: int, wide: bool, separate: bool, arch: int, *, base_aligned: bool = True, low_rank_aligned: bool = True
) -> GemmConfig:
    """Configuration of the fused product.

    Args:
        tokens: rows of ``x``; only its power-of-two bucket matters.
        wide: fp32 operands in the base product.
        separate: low-rank terms need their own accumulator (fan-out, dropout, fp32 adapters next to 16-bit ``x``).
        arch: compute capability without the dot: 80, 90, 100, ...
        base_aligned: ``x`` and ``weight`` can be read in 16-byte words. Where not, each element costs an address, and
            smaller tiles leave registers for them.
        low_rank_aligned: the same for ``s`` and ``B`` (false for a rank that is no multiple of 16).
    """
    return _gemm_config(bucket(tokens), wide, separate, _known(arch), base_aligned, low_rank_aligned)


@functools.cache
def _gemm_config(
    tokens: int, wide: bool, separate: bool, arch: int, base_aligned: bool, low_rank_aligned: bool
) -> GemmConfig:
    if wide:  # plain fp32 multiplies on CUDA cores
        if tokens <= _DECODE_TOKENS:
            return GemmConfig(16, 64, 32, 16, num_warps=4, num_stages=3)
        return GemmConfig(_EXACT_ROWS, 64, 32, 16, num_warps=8, num_stages=3)
    if tokens <= _DECODE_TOKENS:
        # bound by reading the weight: narrow tiles for many programs, deep ones for bytes in flight
        return GemmConfig(16, 32, 128, 32, num_warps=4, num_stages=5)
    if not base_aligned or (separate and not low_rank_aligned):
        return GemmConfig(64, 32, 32, 16, num_warps=8, num_stages=3)
    if separate:
        return GemmConfig(64 if tokens <= _FEW_TOKENS else 128, 64, 64, 16, num_warps=8, num_stages=4)
    if tokens <= _FEW_TOKENS:
        return GemmConfig(64, 64, 64, 32, num_warps=8, num_stages=4)
    if not low_rank_aligned:
        return GemmConfig(128, 128, 64, 16, num_warps=8, num_stages=3 if arch in _SMALL_SHARED else 4)
    if arch in (90, 100):  # registers for the largest tile, shared memory for four stages of it (192 KiB)
        return GemmConfig(128, 256, 64, 32, num_warps=8, num_stages=4)
    return GemmConfig(128, 128, 64, 32, num_warps=8, num_stages=3 if arch in _SMALL_SHARED else 4)


def shrink_config(
    tokens: int, features: int, rank_r: int, rank_e: int, wide: bool, arch: int, *, aligned: bool = True
) -> ShrinkConfig:
    """Configuration of the shrink; ``wide``: the adapters are fp32; ``aligned``: operands can be read in 16-byte words.

    The split fills one wave of the GPU.
    """
    return _shrink_config(bucket(tokens), features, rank_r, rank_e, wide, _known(arch), aligned)


@functools.lru_cache(maxsize=4096)
def _shrink_config(
    tokens: int, features: int, rank_r: int, rank_e: int, wide: bool, arch: int, aligned: bool
) -> ShrinkConfig:
    config = _shrink_tile(tokens, wide, aligned)
    programs = _cdiv(tokens, config.block_m) * (_cdiv(rank_r, config.block_r) + _cdiv(rank_e, config.block_r))
    steps = _cdiv(features, config.block_k)
    return dataclasses.replace(config, splits=_splits(programs, steps, arch))


def _shrink_tile(tokens: int, wide: bool, aligned: bool) -> ShrinkConfig:
    if wide or not aligned:
        if tokens <= _DECODE_TOKENS:
            return ShrinkConfig(16, 64, 32, num_warps=8, num_stages=3)
        return ShrinkConfig(_EXACT_ROWS, 64, 16, num_warps=8, num_stages=3)
    if tokens <= _DECODE_TOKENS:
        return ShrinkConfig(16, 64, 128, num_warps=4, num_stages=3)
    return ShrinkConfig(64, 64, 64, num_warps=4, num_stages=4)


def grad_config(
    tokens: int, features: int, rank_r: int, rank_e: int, wide: bool, arch: int, *, aligned: bool = True
) -> GradConfig:
    """Configuration of dA or dB; ``wide``: the adapters are fp32; ``aligned``: operands can be read in 16-byte words.

    The split over tokens fills one wave of the GPU.
    """
    return _grad_config(bucket(tokens), features, rank_r, rank_e, wide, _known(arch), aligned)


@functools.lru_cache(maxsize=4096)
def _grad_config(
    tokens: int, features: int, rank_r: int, rank_e: int, wide: bool, arch: int, aligned: bool
) -> GradConfig:
    config = _grad_tile(wide, aligned)
    programs = _cdiv(features, config.block_f) * (_cdiv(rank_r, config.block_r) + _cdiv(rank_e, config.block_r))
    return dataclasses.replace(config, splits=_splits(programs, _cdiv(tokens, config.stretch), arch))


def _grad_tile(wide: bool, aligned: bool) -> GradConfig:
    if wide or not aligned:
        return GradConfig(_EXACT_ROWS, 32, 32, stretch=256, num_warps=8, num_stages=3)
    return GradConfig(128, 64, 64, stretch=256, num_warps=8, num_stages=3)


def reduce_config() -> ReduceConfig:
    """Configuration of the sum over parts; the same for every problem."""
    return ReduceConfig(16, 64, num_warps=4)


def _splits(programs: int, steps: int, arch: int) -> int:
    """Power of two that brings ``programs`` to about one wave, with at least four steps left to each part."""
    splits = 1
    while splits < _MAX_SPLIT and programs * splits * 2 <= _PROCESSORS[arch] and steps >= splits * 2 * 4:
        splits *= 2
    return splits


def all_configs(arch: int) -> dict[str, list]:
    """Every tile that the functions above can return for ``arch``, by kernel; splits do not change machine code."""
    tokens = (_DECODE_TOKENS, _FEW_TOKENS, 2 * _FEW_TOKENS)
    flags = (True, False)

    def gemm(wide: bool, separate: bool, base_aligned: bool, low_rank_aligned: bool) -> list[GemmConfig]:
        return [
            gemm_config(t, wide, separate, arch, base_aligned=base_aligned, low_rank_aligned=low_rank_aligned)
            for t in tokens
        ]

    return {
        "gemm": _unique(gemm(False, False, True, True)),
        "gemm_low_rank_unaligned": _unique(gemm(False, False, True, False)),
        "gemm_unaligned": _unique(gemm(False, False, False, False)),
        "gemm_separate": _unique(gemm(False, True, True, True)),
        "gemm_separate_unaligned": _unique(gemm(False, True, False, False)),
        "gemm_wide": _unique(c for separate in flags for c in gemm(True, separate, True, True)),
        "shrink": _unique(_shrink_tile(t, False, True) for t in tokens),
        "shrink_wide": _unique(_shrink_tile(t, True, False) for t in tokens),  # also what is not aligned
        "grad": [_grad_tile(False, True)],
        "grad_wide": [_grad_tile(True, False)],
        "reduce": [reduce_config()],
    }


def _unique(configs) -> list:
    return list(dict.fromkeys(configs))
